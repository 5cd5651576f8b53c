"""Two epochs of real batches compile an update once a shape, and move nothing unasked."""

import jax

from s2s import config as config_lib
from s2s.data import corpora, encode, pipeline, plan, vocab
from s2s.infra import sharding
from s2s.learn import optim
from s2s.learn import step as step_lib
from tests.system.conftest import small


def test_one_compilation_a_batch_shape(cache):
    cfg = config_lib.freeze(small(data__cache=str(cache), data__task_size=600, data__batch_tokens=256))
    corpus = corpora.open_corpus(cfg.data, "train", seed=1, progress=False)
    vocabs = vocab.train_vocabularies(corpus, cfg.data.vocab, seed=1, progress=False)
    encoded = encode.encode_corpus(
        corpus, vocabs, max_source=None, max_target=None, cache=str(cache), progress=False
    )
    mesh = sharding.make_mesh()
    layout = plan.make_plan(
        encoded.source_lengths, encoded.target_lengths, batch_tokens=256, max_shapes=2,
        rows_multiple=sharding.rows_multiple(mesh), seed=1,
    )  # fmt: skip
    assert len(layout.buckets) == 2
    optimizer = optim.make_optimizer(
        cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=10, total_steps=100)
    )
    graphdef, state = step_lib.init_state(cfg, vocabs.source.size, vocabs.target.size, optimizer, 1)
    state = sharding.replicate(state, mesh)
    train_step = sharding.jit_train_step(step_lib.make_train_step(graphdef, cfg, optimizer), mesh)
    for epoch in range(2):
        for batch in pipeline.batches(encoded, layout, epoch=epoch):
            with jax.transfer_guard("disallow"):
                state, _ = train_step(state, sharding.to_global(batch, mesh))
    assert int(state.step) == 2 * layout.batches_per_epoch
    assert train_step._cache_size() == len(layout.buckets)
