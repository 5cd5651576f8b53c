"""One update, against finite differences, against itself in pieces, and against itself in replicas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s import config
from s2s.batch import EOS, Batch
from s2s.config import Config, ModelConfig, OptimConfig
from s2s.infra import sharding
from s2s.learn import optim, step
from s2s.learn.loss import Sums, cross_entropy
from s2s.nn.dropout import Dropout

SOURCE_VOCAB, TARGET_VOCAB = 11, 9
MODEL = ModelConfig(embedding=6, hidden=8, cell="gru", attention="general", dropout=0.0)
ROWS = 8


def configured(model=None, **fields):
    return Config(
        model=dataclasses.replace(MODEL, **(model or {})),
        optim=dataclasses.replace(OptimConfig(name="sgd", learning_rate=0.5, clip_norm=0.0), **fields),
    )


def example(rows=ROWS, source=5, target=6, seed=0, filler=()):
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(2, source + 1, rows), rng.integers(2, target + 1, rows)]).astype(
        np.int32
    )
    lengths[:, list(filler)] = 0

    def ids(length_B, size, vocab):
        ids = rng.integers(4, vocab, (rows, size)).astype(np.int32)
        place = np.arange(size)[None, :]
        return np.where(place == length_B[:, None] - 1, EOS, np.where(place < length_B[:, None], ids, 0))

    return Batch(
        ids(lengths[0], source, SOURCE_VOCAB),
        lengths[0],
        ids(lengths[1], target, TARGET_VOCAB),
        lengths[1],
        np.where(lengths[0] > 0, np.arange(rows, dtype=np.int32), np.int32(-1)),
    )


def built(cfg, seed=0):
    schedule = optim.make_schedule(cfg.optim, steps_per_epoch=10, total_steps=100)
    optimizer = optim.make_optimizer(cfg.optim, schedule)
    graphdef, state = step.init_state(cfg, SOURCE_VOCAB, TARGET_VOCAB, optimizer, seed)
    return graphdef, state, step.make_train_step(graphdef, cfg, optimizer)


@functools.cache
def compiled(cfg):
    """Graphdef, state at step 0 and jitted step, made once for all tests."""
    graphdef, state, train_step = built(cfg)
    return graphdef, state, jax.jit(train_step)


def trained(cfg, batches):
    _, state, train_step = compiled(cfg)
    for batch in batches:
        state, metrics = train_step(state, batch)
    return state, metrics


def assert_close(one, other, **tolerance):
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_allclose(left, right, err_msg=jax.tree_util.keystr(path), **tolerance)


def assert_equal(one, other):
    assert_close(one, other, rtol=0, atol=0)


def logits(model, batch):
    return model.softmax().logits(model(batch)[0])


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def differs(one, other):
    return not np.array_equal(flat(one), flat(other))


def test_state_is_a_plain_pytree_with_string_keys():
    _, state, _ = built(configured(ema=0.9))

    def check(tree):
        for name, value in tree.items():
            assert type(tree) is dict and isinstance(name, str)
            check(value) if isinstance(value, dict) else None
            assert isinstance(value, dict | jax.Array)

    check(state.params)
    assert state.key.dtype == jnp.uint32 and state.step.dtype == jnp.int32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert_equal(state.ema, state.params)
    assert built(configured())[1].ema is None


def test_split_and_merge_are_inverse():
    graphdef, state, _ = built(configured())
    again, params = step.split(step.merge(graphdef, state.params))
    assert again == graphdef
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    assert_equal(params, state.params)


def test_state_is_made_abstractly_compiled_and_from_a_seed():
    cfg = configured(name="adam", ema=0.9)
    graphdef, state, _ = built(cfg)
    optimizer = optim.make_optimizer(cfg.optim, lambda step: jnp.float32(0.5))
    make = functools.partial(step.init_state, cfg, SOURCE_VOCAB, TARGET_VOCAB, optimizer)
    abstract_graphdef, abstract = jax.eval_shape(make, 0)
    assert abstract_graphdef == graphdef
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert kinds(abstract) == kinds(state)
    graphdef_alone, params = step.abstract_params(cfg.model, SOURCE_VOCAB, TARGET_VOCAB)
    assert graphdef_alone == graphdef and kinds(params) == kinds(state.params)
    assert step.parameter_count(params) == flat(state.params).size
    assert_close(jax.jit(make)(0)[1], state, rtol=1e-5, atol=1e-6)
    assert_equal(make(0)[1], state)
    assert differs(make(1)[1].params, state.params)
    assert not np.array_equal(make(1)[1].key, state.key)


def test_sgd_step_is_the_slope_of_the_mean_loss(x64):
    """params - rate * d(mean smoothed nats)/d(params), the slope by central differences in float64."""
    cfg = configured(label_smoothing=0.1, learning_rate=0.5)
    graphdef, state, train_step = built(cfg)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), state.params)
    batch = example()

    forward = jax.jit(lambda params: logits(step.merge(graphdef, params), batch))

    def mean_loss(params):
        logits_BTV = np.asarray(forward(params), np.float64)
        log_p = logits_BTV - np.log(np.sum(np.exp(logits_BTV), -1, keepdims=True))
        q = 0.9 * np.eye(TARGET_VOCAB)[batch.target_BT] + 0.1 / TARGET_VOCAB
        return -np.sum(q * log_p * batch.target_mask_BT[:, :, None]) / batch.target_mask_BT.sum()

    after, metrics = jax.jit(train_step)(state, batch)
    np.testing.assert_allclose(metrics.sums.loss / metrics.sums.tokens, mean_loss(wide), rtol=1e-5)
    assert metrics.learning_rate == 0.5 and after.step == 1
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(wide)
    moved = [
        np.asarray(b, np.float64) - np.asarray(a, np.float64)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True)
    ]
    for n, leaf in enumerate(leaves):
        place = tuple(rng.integers(0, size) for size in leaf.shape)
        up, down = (
            mean_loss(treedef.unflatten([*leaves[:n], leaf.at[place].add(h), *leaves[n + 1 :]]))
            for h in (1e-2, -1e-2)
        )
        np.testing.assert_allclose(moved[n][place], -0.5 * (up - down) / 2e-2, rtol=3e-3, atol=1e-6)
    norm = np.sqrt(sum(np.sum((move / 0.5) ** 2) for move in moved))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)


def test_pieces_are_one_batch():
    """With dropout. Rows are of different lengths: a mean of means would differ."""
    batches = [example(seed=seed, filler=(3,)) for seed in range(2)]
    fields = {"label_smoothing": 0.1, "clip_norm": 0.3}
    whole, whole_metrics = trained(configured(DROPPING, **fields), batches)
    for pieces in (2, 8):
        cut, metrics = trained(configured(DROPPING, accumulate=pieces, **fields), batches)
        assert_close(cut.params, whole.params, rtol=1e-5, atol=1e-6)
        assert_close(metrics, whole_metrics, rtol=2e-5)


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="8 rows cannot be cut into config.optim.accumulate=3"):
        trained(configured(accumulate=3), [example()])


@pytest.mark.parametrize("pieces", [1, 2])
def test_filler_rows_change_nothing(pieces):
    batch = example(rows=ROWS // 2)
    more = Batch(*(np.concatenate([x, np.zeros_like(x)]) for x in batch))
    one, metrics = trained(configured(accumulate=pieces), [batch])
    other, other_metrics = trained(configured(accumulate=pieces), [more])
    assert_close(other.params, one.params, rtol=1e-5, atol=1e-7)
    assert_close(other_metrics, metrics, rtol=1e-5)


def test_metrics_are_from_before_clipping_and_before_the_update():
    cfg = configured(clip_norm=0.01)
    graphdef, state, _ = compiled(cfg)
    after, metrics = trained(cfg, [example()])
    assert metrics.grad_norm > 0.1
    moved = jax.tree.map(jnp.subtract, after.params, state.params)
    norm = np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(moved)))
    np.testing.assert_allclose(norm, 0.5 * 0.01, rtol=1e-4)
    before = step.make_eval_step(graphdef)(state.params, example())
    np.testing.assert_allclose(metrics.sums.nll, before.nll, rtol=1e-5)


@pytest.mark.parametrize("name", config.OPTIMIZERS)
def test_loss_falls_and_a_batch_without_tokens_has_gradient_zero(name):
    rate = {"sgd": 1.0, "adadelta": 20.0}.get(name, 0.03)
    cfg, batch = configured(name=name, learning_rate=rate), example(filler=range(ROWS // 2, ROWS))
    _, first = trained(cfg, [batch])
    _, last = trained(cfg, [batch] * 60)
    assert last.sums.nll < 0.5 * first.sums.nll
    assert last.sums.correct > first.sums.correct
    state, none = trained(cfg, [example(filler=range(ROWS))])
    assert_equal(none.sums, Sums.zero())
    assert none.grad_norm == 0
    assert_equal(state.params, compiled(cfg)[1].params)


DROPPING = {"dropout": 0.3, "layers": 2}


def test_dropout_depends_on_seed_step_and_pair_alone():
    cfg = configured(DROPPING)
    batch = example()
    _, state, train_step = compiled(cfg)
    losses = {float(train_step(state._replace(step=jnp.int32(n)), batch)[1].sums.loss) for n in range(4)}
    losses.add(float(train_step(built(cfg, 1)[1]._replace(params=state.params), batch)[1].sums.loss))
    losses.add(float(trained(configured({"layers": 2}), [batch])[1].sums.loss))
    assert len(losses) == 6
    assert_equal(train_step(state, batch), train_step(state, batch))
    # Equal sentences in other pairs have other masks.
    renumbered = batch._replace(index_B=batch.index_B + ROWS)
    assert not np.isclose(*(train_step(state, b)[1].sums.loss for b in (batch, renumbered)), rtol=1e-4)


@pytest.mark.parametrize("feeding", [False, True])
def test_the_layout_of_a_batch_changes_nothing(feeding):
    """With dropout: the order of rows, filler rows, further padding."""
    cfg = configured({**DROPPING, "input_feeding": feeding})
    batch = example()
    state, metrics = trained(cfg, [batch, batch])
    wider = jax.tree.map(lambda x: np.pad(x, [(0, 3)] * x.ndim), batch)
    wider.index_B[ROWS:] = -1
    order_B = np.random.default_rng(0).permutation(ROWS + 3)
    other = jax.tree.map(lambda x: x[order_B], wider)
    other_state, other_metrics = trained(cfg, [other, other])
    assert_close(other_metrics, metrics, rtol=2e-5)
    assert_close(other_state.params, state.params, rtol=1e-5, atol=1e-6)


SITES = ("embedding_dropout", "layer_dropout", "attentional_dropout")


@pytest.mark.parametrize("site", SITES)
def test_a_site_has_its_own_rate_or_the_common_one(site):
    batch = example()
    graphdef, state, _ = compiled(configured({site: 0.3, "layers": 2}))
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    rates = {name.removesuffix("_dropout"): 0.3 if name == site else 0.0 for name in SITES}
    model = step.merge(graphdef, state.params)
    output_BTH, _ = jax.jit(model)(batch, Dropout(key, batch.index_B, **rates))
    expected = cross_entropy(output_BTH, model.softmax(), batch.target_BT, batch.target_mask_BT).loss

    own = trained(configured({site: 0.3, "layers": 2}), [batch])[1].sums.loss
    np.testing.assert_allclose(own, expected, rtol=1e-5)
    others_off = {name: 0.0 for name in SITES if name != site}
    assert trained(configured(DROPPING | others_off), [batch])[1].sums.loss == own
    none = trained(configured({"layers": 2}), [batch])[1].sums.loss
    assert not np.isclose(none, own, rtol=1e-5)


def test_evaluation_has_no_dropout_and_no_smoothing():
    batch = example()
    graphdef, state, _ = compiled(configured(DROPPING, label_smoothing=0.2))
    sums = step.make_eval_step(graphdef)(state.params, batch)
    assert sums.loss == sums.nll
    np.testing.assert_allclose(sums.nll, trained(configured({"layers": 2}), [batch])[1].sums.loss, rtol=1e-5)


def test_training_smooths():
    sums = trained(configured(label_smoothing=0.2), [example()])[1].sums
    assert not np.isclose(sums.loss, sums.nll, rtol=1e-5)
    np.testing.assert_allclose(sums.nll, trained(configured(), [example()])[1].sums.nll, rtol=1e-5)


def test_ema_is_its_equation_and_is_what_evaluation_uses():
    cfg = configured(ema=0.3, learning_rate=0.5)
    _, state, train_step = compiled(cfg)
    average = jax.tree.map(np.asarray, state.params)
    for n in range(6):
        state, _ = train_step(state, example(seed=n))
        decay = min(0.3, (1 + n) / (10 + n))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
    assert_close(state.ema, average, rtol=1e-5, atol=1e-6)
    assert step.evaluation_params(state) is state.ema
    assert differs(state.ema, state.params)
    without, _ = trained(configured(learning_rate=0.5), [example(seed=n) for n in range(6)])
    assert_close(without.params, state.params, rtol=1e-6, atol=1e-7)
    assert step.evaluation_params(without) is without.params


def test_types_of_the_state_are_stable():
    for name in config.OPTIMIZERS:
        _, state, train_step = built(
            configured(DROPPING, name=name, ema=0.9, accumulate=2, schedule="cosine")
        )
        after, _ = jax.eval_shape(train_step, state, example())
        assert jax.tree.structure(after) == jax.tree.structure(state)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)


def test_compiles_once_and_the_state_can_be_donated():
    _, state, train_step = built(configured(DROPPING, name="adam", ema=0.9))
    train_step = jax.jit(train_step, donate_argnums=0)
    for seed in range(3):
        state, _ = train_step(state, example(seed=seed))
    assert train_step._cache_size() == 1


@pytest.mark.parametrize("pieces", [1, 2])
def test_eight_devices_are_one(pieces):
    """With dropout, and fewer real rows on some devices than on others, or none."""
    fields = {"accumulate": pieces, "label_smoothing": 0.1, "clip_norm": 0.3}
    rows = 8 * pieces
    batches = [example(rows, seed=seed, filler=range(rows - 3, rows)) for seed in range(2)]
    alone, alone_metrics = trained(configured(DROPPING, **fields), batches)
    mesh = sharding.make_mesh()
    graphdef, state, train_step = built(configured(DROPPING, **fields))
    state = sharding.replicate(state, mesh)
    train_step = sharding.jit_train_step(train_step, mesh)
    for batch in batches:
        state, metrics = train_step(state, sharding.to_global(batch, mesh))
    assert_close(state.params, alone.params, rtol=1e-5, atol=1e-6)
    assert_close(metrics, alone_metrics, rtol=2e-5)
    for leaf in jax.tree.leaves(state):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8 and all(np.array_equal(copy, copies[0]) for copy in copies)
    evaluate = step.make_eval_step(graphdef)
    spread = sharding.jit_eval_step(evaluate, mesh)(state.params, sharding.to_global(batch, mesh))
    assert_close(spread, jax.jit(evaluate)(alone.params, batch), rtol=1e-5)
