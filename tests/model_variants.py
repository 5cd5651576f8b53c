"""Tiny models of every kind, compiled once and shared by all tests that judge models."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from s2s.batch import Batch
from s2s.config import ATTENTIONS, TIES, ModelConfig
from s2s.nn.dropout import Dropout
from s2s.nn.seq2seq import Seq2Seq

VOCAB = 11

_BASE = {"embedding": 4, "hidden": 6, "layers": 2, "dropout": 0.0}
_CELLS = "gru", "tanh", "relu", "lstm", "lstm"
_BRIDGES = "copy", "zero", "dense", "copy", "zero"
VARIANTS: dict[str, ModelConfig] = {
    **{
        f"{attention}{'-feeding' * feeding}": ModelConfig(attention=attention, input_feeding=feeding, **_BASE)
        for attention in ATTENTIONS
        for feeding in (False, True)
    },
    **{
        f"{cell}-{bridge}": ModelConfig(cell=cell, bridge=bridge, input_feeding=cell != "gru", **_BASE)
        for cell, bridge in zip(_CELLS, _BRIDGES, strict=True)
    },
    **{f"tie-{tie}": ModelConfig(tie=tie, **_BASE) for tie in TIES[1:]},
    "tie-all-equal": ModelConfig(tie="all", attention="dot", **_BASE | {"embedding": 6}),
    "one-way": ModelConfig(bidirectional=False, encoder_hidden=5, **_BASE | {"layers": 1}),
    "deep-encoder": ModelConfig(encoder_layers=3, input_feeding=True, **_BASE),
    "deep-decoder": ModelConfig(encoder_layers=1, **_BASE | {"layers": 3}),
}


# Compiling is most of the time of these tests; what is compiled runs in microseconds.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_batch(sources: int = 5, targets: int = 4) -> Batch:
    """Four pairs, the last a filler of no length; ids on pads are arbitrary, and must not matter."""
    rng = np.random.default_rng(0)
    real = Batch(
        source_BS=rng.integers(4, VOCAB, (4, 5)).astype(np.int32),
        source_length_B=np.array([5, 3, 1, 0], np.int32),
        target_BT=rng.integers(4, VOCAB, (4, 4)).astype(np.int32),
        target_length_B=np.array([2, 4, 3, 0], np.int32),
        index_B=np.array([0, 1, 2, -1], np.int32),
    )
    return real._replace(
        source_BS=np.pad(real.source_BS, ((0, 0), (0, sources - 5)), constant_values=7),
        target_BT=np.pad(real.target_BT, ((0, 0), (0, targets - 4)), constant_values=7),
    )


def perturbed(params: Any, seed: int = 0) -> Any:
    """Every parameter moved away from its start, where zeros and identities would hide mistakes."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(treedef, moved)


class Built:
    """A model as pure functions of parameters."""

    def __init__(self, cfg: ModelConfig, dtype: Any, param_dtype: Any):
        self.cfg = cfg
        model = Seq2Seq(cfg, VOCAB, VOCAB, rngs=nnx.Rngs(3), dtype=dtype, param_dtype=param_dtype)
        self.graphdef, self.initial = nnx.split(model, nnx.Param)
        self.params = perturbed(self.initial)
        self.graded = quick_jit(jax.value_and_grad(self.loss, has_aux=True))
        self.forward = quick_jit(self.plain_forward)
        self.replicated = quick_jit(jax.vmap(self.plain_forward, in_axes=(0, None, 0, 0)))
        self.start = quick_jit(self.plain_start)
        self.advance = quick_jit(self.plain_advance)

    def model(self, params: Any) -> Seq2Seq:
        return nnx.merge(self.graphdef, params)

    def plain_forward(self, params: Any, batch: Batch, key: Any = None, rate: Any = 0.0) -> Any:
        model = self.model(params)
        output_BTH, align_BTS = model(batch, Dropout(key, batch.index_B, rate, rate, rate))
        return model.softmax().logits(output_BTH), align_BTS

    def plain_start(self, params: Any, batch: Batch) -> Any:
        memory = self.model(params).encode(batch)
        return memory, self.model(params).start(memory, 2)

    def plain_advance(self, params: Any, *arguments: Any) -> Any:
        model = self.model(params)
        state, output_BKE, align_BKS = model.advance(*arguments)
        return state, model.softmax().logits(output_BKE), align_BKS

    def loss(self, params: Any, batch: Batch) -> Any:
        logits_BTV, align_BTS = self.plain_forward(params, batch)
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        nll_BT = -jnp.take_along_axis(log_probs_BTV, jnp.asarray(batch.target_BT)[..., None], axis=-1)[..., 0]
        return jnp.where(batch.target_mask_BT, nll_BT, 0).sum(), (logits_BTV, align_BTS)


@functools.cache
def built(name: str) -> Built:
    """A variant in double precision; ask for it with x64 on."""
    return Built(VARIANTS[name], jnp.float64, jnp.float64)
