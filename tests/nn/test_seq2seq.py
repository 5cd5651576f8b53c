"""What the whole model refuses, and what its parameters are called."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from s2s.config import ModelConfig
from s2s.nn.seq2seq import Seq2Seq
from tests.model_variants import VARIANTS, VOCAB, make_batch


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: Seq2Seq(cfg, VOCAB, VOCAB, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): leaf.shape for path, leaf in flat}


def test_parameter_names_are_a_file_format():
    """Checkpoints are read by these names: a change here orphans every trained model."""
    assert parameter_shapes(VARIANTS["general-feeding"]) == {
        "source_embedding": (11, 4),
        "target_embedding": (11, 4),
        **{
            f"encoder/{way}/{layer}/{name}": shape
            for way in ("forward", "backward")
            for layer, size in ((0, 4), (1, 6))
            for name, shape in (("input_kernel", (size, 12)), ("recurrent_kernel", (3, 12)), ("bias", (12,)))
        },
        **{
            f"decoder/stack/cells/{layer}/{name}": shape
            for layer, size in ((0, 4), (1, 6))
            for name, shape in (("input_kernel", (size, 24)), ("recurrent_kernel", (6, 24)), ("bias", (24,)))
        },
        "decoder/feed_kernel": (6, 24),
        **{
            f"decoder/bridge/{maps}/{layer}/{name}": shape
            for maps in ("hidden_maps", "cell_maps")
            for layer in (0, 1)
            for name, shape in (("kernel", (6, 6)), ("bias", (6,)))
        },
        "decoder/attention/score/memory_kernel": (6, 6),
        "decoder/attentional_kernel": (12, 6),
        "softmax_kernel": (6, 11),
        "softmax_bias": (11,),
    }


@pytest.mark.parametrize(
    "name,present",
    [
        ("general", {"source_embedding", "softmax_kernel"}),
        ("tie-target", {"source_embedding", "to_embedding/kernel"}),
        ("tie-all", {"to_embedding/kernel"}),
        ("tie-all-equal", set()),
    ],
)
def test_ties_leave_parameters_out(name, present):
    tied = {"source_embedding", "softmax_kernel", "to_embedding/kernel"}
    assert tied & set(parameter_shapes(VARIANTS[name])) == present


def test_one_table_needs_one_vocabulary():
    with pytest.raises(ValueError, match="not 11 source and 12 target entries"):
        Seq2Seq(VARIANTS["tie-all"], 11, 12, rngs=nnx.Rngs(0))


def test_batch_must_agree_with_itself():
    batch = make_batch()
    model = Seq2Seq(VARIANTS["dot"], VOCAB, VOCAB, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="target_BT has B=3, but source_BS has B=4"):
        jax.eval_shape(model, batch._replace(target_BT=batch.target_BT[:3]))


def test_another_seed_is_another_model():
    kernels = [
        np.asarray(Seq2Seq(VARIANTS["one-way"], VOCAB, VOCAB, rngs=nnx.Rngs(seed)).softmax_kernel[...])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()
