"""One update: batch -> gradients -> new state; and one evaluation of a batch.

Decides what the training state is and how it moves. Must not know devices, files
or loops: every function is pure, written for one model, and left to the caller to
jit, shard, or vmap over a leading axis of replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from s2s.batch import Batch
from s2s.config import Config, ModelConfig
from s2s.learn import optim
from s2s.learn.loss import Sums, cross_entropy
from s2s.nn.dropout import Dropout
from s2s.nn.seq2seq import Seq2Seq

Params = dict[str, Any]


class TrainState(NamedTuple):
    """All that training needs to go on: a pytree of arrays.

    Attributes:
      step: updates made; int32.
      params: nested dicts of float32 arrays by attribute name.
      opt_state: the optimizer's.
      ema: moving average of ``params``; None when ``cfg.optim.ema`` is 0.
      key: raw random key (uint32) that every dropout mask derives from, with ``step``; never changes.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    key: jax.Array


class Metrics(NamedTuple):
    """What an update reports, on device.

    Attributes:
      sums: over the batch, before the update.
      grad_norm: global norm of the gradient of nats a token, before clipping.
      learning_rate: of this update.
    """

    sums: Sums
    grad_norm: jax.Array
    learning_rate: jax.Array


def init_state(
    cfg: Config,
    source_vocab: int,
    target_vocab: int,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array,
) -> tuple[nnx.GraphDef, TrainState]:
    """Makes the model's structure and its state at step 0.

    The structure is static: under ``jax.eval_shape`` this gives it with an abstract state and makes
    no array, under ``jax.jit`` with ``out_shardings`` the state is born where it belongs, and under
    ``jax.vmap`` over ``seed`` there is one state a replica.

    Args:
      cfg: the model and ``cfg.optim.ema``.
      source_vocab: entries of the source vocabulary.
      target_vocab: entries of the target vocabulary.
      optimizer: its state is made for the parameters.
      seed: of parameters and dropout; may be traced.
    """
    params_key, dropout_key = jax.random.split(jax.random.key(seed))
    rngs = nnx.Rngs(params=params_key)
    graphdef, params = split(Seq2Seq(cfg.model, source_vocab, target_vocab, rngs=rngs))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # Its own buffers: the state can be donated.
        ema=jax.tree.map(jnp.copy, params) if cfg.optim.ema else None,
        key=jax.random.key_data(dropout_key),
    )
    return graphdef, state


def abstract_params(cfg: ModelConfig, source_vocab: int, target_vocab: int) -> tuple[nnx.GraphDef, Params]:
    """The structure and the shapes of a model's parameters; makes no array."""
    model = nnx.eval_shape(lambda: Seq2Seq(cfg, source_vocab, target_vocab, rngs=nnx.Rngs(0)))
    return split(model)


def parameter_count(params: Params) -> int:
    """Numbers in the parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def split(model: Seq2Seq) -> tuple[nnx.GraphDef, Params]:
    """Takes a model apart into its static structure and its parameters, nested dicts with string keys."""
    graphdef, params = nnx.split(model)
    return graphdef, _renamed(nnx.to_pure_dict(params), str)


def merge(graphdef: nnx.GraphDef, params: Params) -> Seq2Seq:
    """Puts together what `split` took apart; cheap, meant for the inside of a traced function."""
    return nnx.merge(graphdef, _renamed(params, lambda name: int(name) if name.isdigit() else name))


def evaluation_params(state: TrainState) -> Params:
    """The parameters to evaluate and keep: the moving average where there is one."""
    return state.params if state.ema is None else state.ema


def make_train_step(
    graphdef: nnx.GraphDef,
    cfg: Config,
    optimizer: optax.GradientTransformation,
    target_size: jax.Array | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes one update on the mean smoothed cross-entropy of all target tokens of a batch.

    The batch is cut into ``cfg.optim.accumulate`` pieces; gradients of sums add up over them and are
    divided once by the token count of the whole, so the pieces weigh what their tokens weigh and the
    update is that of the whole batch. Luong et al. divide by sentences; we divide by tokens. A batch
    without a target token has gradient 0. Dropout's masks belong to pairs: the order of the rows, the
    pieces and the padding change nothing.

    The moving average follows ema <- d ema + (1 - d) params, d = min(cfg.optim.ema, (1 + n) / (10 + n))
    after n earlier updates: its start at the initial parameters is forgotten fast, as in
    TensorFlow's ExponentialMovingAverage.

    Args:
      graphdef: structure of the model.
      cfg: dropout rates and ``cfg.optim``; rates and label smoothing may be traced scalars.
      optimizer: from `s2s.learn.optim.make_optimizer`.
      target_size: entries of the target vocabulary where parameters are padded to more, or None; may be
        traced.

    Returns:
      A pure function (state, batch, total) -> (state, metrics). Where the batch is only a share of the
      rows of an update, ``total`` turns a tree of sums over the share into that over all rows; it is
      called once, and without it the batch is the whole. The function raises ValueError while tracing
      when the rows of the batch cannot be cut into ``cfg.optim.accumulate`` equal pieces.
    """
    pieces = cfg.optim.accumulate

    def objective(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        model = merge(graphdef, params)
        output_BTH, _ = model(batch, _dropout(cfg.model, key, batch.index_B))
        target = batch.target_BT, batch.target_mask_BT
        sums = cross_entropy(output_BTH, model.softmax(target_size), *target, cfg.optim.label_smoothing)
        return sums.loss, sums

    gradient = jax.grad(objective, has_aux=True)

    def accumulated(params: Params, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        if pieces == 1:
            return gradient(params, batch, key)

        def add(carry: tuple[Params, Sums], piece: Batch) -> tuple[tuple[Params, Sums], None]:
            grads, sums = gradient(params, piece, key)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1].add(sums)), None

        precise = jnp.promote_types(jax.tree.leaves(params)[0].dtype, jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, params), Sums.zero(precise))
        return jax.lax.scan(add, start, _cut(batch, pieces))[0]

    def train_step(
        state: TrainState, batch: Batch, total: Callable[[Any], Any] = lambda tree: tree
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, sums = total(accumulated(state.params, batch, key))
        # The norm is that of sums over tokens, so that all gradients are read once and then once more.
        tokens = jnp.maximum(sums.tokens, 1.0)
        norm = optax.tree.norm(grads) / tokens
        factor = optim.clip(cfg.optim, norm) / tokens
        grads = jax.tree.map(lambda grad: grad * factor, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else _averaged(state.ema, params, cfg.optim.ema, state.step)
        metrics = Metrics(sums, norm, optim.learning_rate(opt_state))
        return TrainState(state.step + 1, params, opt_state, ema, state.key), metrics

    return train_step


def make_eval_step(
    graphdef: nnx.GraphDef, target_size: jax.Array | None = None
) -> Callable[[Params, Batch], Sums]:
    """Makes the evaluation of a batch, without dropout or label smoothing: ``loss`` equals ``nll``.

    Args:
      graphdef: structure of the model.
      target_size: as for `make_train_step`.

    Returns:
      A pure function (params, batch) -> sums.
    """

    def eval_step(params: Params, batch: Batch) -> Sums:
        model = merge(graphdef, params)
        output_BTH, _ = model(batch)
        softmax = model.softmax(target_size)
        return cross_entropy(output_BTH, softmax, batch.target_BT, batch.target_mask_BT)

    return eval_step


def _dropout(cfg: ModelConfig, key: jax.Array, rows_B: jax.Array) -> Dropout:
    own = (cfg.embedding_dropout, cfg.layer_dropout, cfg.attentional_dropout)
    embedding, layer, attentional = (cfg.dropout if rate is None else rate for rate in own)
    return Dropout(key, rows_B, embedding=embedding, layer=layer, attentional=attentional)


def _cut(batch: Batch, pieces: int) -> Batch:
    """[B, ...] -> [pieces, B / pieces, ...]; piece i has rows i, i + pieces, ...

    Rows are dealt out rather than cut in blocks so that filler rows, which come last, do not all
    fall to one piece.
    """
    rows = batch.target_BT.shape[0]
    if rows % pieces:
        raise ValueError(
            f"a batch of {rows} rows cannot be cut into config.optim.accumulate={pieces} equal pieces: "
            "make the rows of every batch shape a multiple of it"
        )
    return jax.tree.map(lambda x: x.reshape(rows // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), batch)


def _averaged(ema: Params, params: Params, decay: float | jax.Array, step: jax.Array) -> Params:
    now = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + now) / (10.0 + now))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)


def _renamed(tree: Any, rename: Callable[[Any], Any]) -> Any:
    """The same nested dicts under other keys: checkpoints know strings, nnx.List knows numbers."""
    if not isinstance(tree, dict):
        return tree
    return {rename(name): _renamed(value, rename) for name, value in tree.items()}
