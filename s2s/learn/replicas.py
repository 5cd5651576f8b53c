"""Many models in one step: the single model's step over a leading axis of replicas.

Decides what replicas share (structure, shapes, trip counts) and what each has of its own (state,
batch, numbers, sizes of vocabularies). Must not know what a step computes, nor devices, files or loops.

Nothing passes from one replica to another, so that each does what it would do by itself: a run can be
taken out, or stop, and the others never know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from s2s import variation
from s2s.batch import Batch
from s2s.config import Config
from s2s.learn import optim
from s2s.learn.loss import Sums
from s2s.learn.step import Metrics, Params, TrainState, make_eval_step, make_train_step
from s2s.nn.seq2seq import VOCABULARY_AXES

Tree = TypeVar("Tree")


class Varied(NamedTuple):
    """The numbers of each replica; a pytree whose leaves are [R].

    Attributes:
      values: dotted name of a field of the config -> its value, float32; only fields that differ.
      milestones: steps where the learning rate turns, int32.
      target_size: entries of the own target vocabulary, int32; None: no vocabulary is padded.
    """

    values: dict[str, Any]
    milestones: optim.Milestones
    target_size: Any | None


def varied(
    cfgs: Sequence[Config],
    steps_per_epoch: Sequence[int],
    total_steps: Sequence[int],
    target_sizes: Sequence[int] | None = None,
) -> Varied:
    """The numbers of some runs that fit together, NumPy arrays.

    Args:
      cfgs: of the runs.
      steps_per_epoch: updates an epoch of each run.
      total_steps: updates of each run.
      target_sizes: entries of each run's target vocabulary; None: parameters are not padded.

    Raises:
      ValueError: the runs do not fit together (`s2s.variation.apart`).
    """
    lengths = zip(cfgs, steps_per_epoch, total_steps, strict=True)
    turns = [
        optim.milestones(cfg.optim, steps_per_epoch=each, total_steps=all_) for cfg, each, all_ in lengths
    ]
    values = variation.varied(cfgs)
    return Varied(
        {name: np.array(column, np.float32) for name, column in values.items()},
        jax.tree.map(lambda *column: np.array(column, np.int32), *turns),
        None if target_sizes is None else np.array(target_sizes, np.int32),
    )


def make_replicas_step(
    graphdef: nnx.GraphDef, cfg: Config, *, together: bool = True
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes one update of all replicas.

    Args:
      graphdef: structure of the model, the same for all.
      cfg: any of the runs'; fields in which they differ are not read.
      together: every operation is done for all replicas at once, which fills an accelerator; else one
        replica after the other is updated, in a loop inside the program, which fills a processor's core
        whose cache holds the arrays of one replica and not of all.

    Returns:
      A pure function (state_R, varied_R, active_R, batch_R, total) -> (state_R, metrics_R), every leaf
      with R first. A replica whose ``active_R`` is False keeps its whole state, and its metrics mean
      nothing; its batch may be anything of the common shape. ``total`` as in `make_train_step`: it sees
      one replica's tree.
    """

    def update(
        total: Callable[[Any], Any], state: TrainState, numbers: Varied, active: jax.Array, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        own = variation.put(cfg, numbers.values)
        optimizer = optim.make_optimizer(own.optim, optim.schedule_between(own.optim, numbers.milestones))
        new, metrics = make_train_step(graphdef, own, optimizer, numbers.target_size)(state, batch, total)
        return jax.tree.map(functools.partial(jnp.where, active), new, state), metrics

    def step(
        state_R: TrainState,
        varied_R: Varied,
        active_R: jax.Array,
        batch_R: Batch,
        total: Callable[[Any], Any] = lambda tree: tree,
    ) -> tuple[TrainState, Metrics]:
        one_update = functools.partial(update, total)
        if together:
            return jax.vmap(one_update)(state_R, varied_R, active_R, batch_R)
        return jax.lax.map(lambda own: one_update(*own), (state_R, varied_R, active_R, batch_R))

    return step


def make_replicas_eval_step(graphdef: nnx.GraphDef) -> Callable[[Params, Any, Batch], Sums]:
    """Makes the evaluation of all replicas, each on a batch of its own.

    Args:
      graphdef: structure of the model, the same for all.

    Returns:
      A pure function (params_R, target_size_R, batch_R) -> sums_R, where target_size_R is that of `Varied`.
    """

    def evaluate(params: Params, target_size: jax.Array | None, batch: Batch) -> Sums:
        return make_eval_step(graphdef, target_size)(params, batch)

    return jax.vmap(evaluate)


def stack(trees: Sequence[Tree]) -> Tree:
    """Puts trees of equal shapes on top of each other: leaves [...] -> [R, ...]; NumPy stays NumPy."""

    def stacked(*leaves: Any) -> Any:
        on_host = all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
        return np.stack(leaves) if on_host else jnp.stack(leaves)

    return jax.tree.map(stacked, *trees)


def one(tree_R: Tree, number: int | jax.Array) -> Tree:
    """What replica ``number`` has, from 0: leaves [R, ...] -> [...]."""
    return jax.tree.map(lambda leaf: leaf[number], tree_R)


def pad(tree: Tree, source: int, target: int) -> Tree:
    """Widens one run's vocabularies: rows (of a kernel, columns) of zeros join at the end.

    They stay zeros: nothing reads them, and no rule of `s2s.learn.optim` moves a zero whose gradient is 0.

    Args:
      tree: parameters, or a whole training state with all that the optimizer keeps; not stacked.
      source: entries of the source vocabulary from here on.
      target: the same of the target vocabulary.
    """

    def widen(leaf: Any, axis: int, size: int) -> Any:
        widths = [(0, size - leaf.shape[number] if number == axis else 0) for number in range(leaf.ndim)]
        return (np if isinstance(leaf, np.ndarray) else jnp).pad(leaf, widths)

    return _with_vocabularies(tree, widen, {"source": source, "target": target})


def cut(tree: Tree, source: int, target: int) -> Tree:
    """Takes away what `pad` put there.

    Args:
      tree: as for `pad`.
      source: entries of the run's own source vocabulary.
      target: the same of its target vocabulary.
    """

    def narrow(leaf: Any, axis: int, size: int) -> Any:
        return leaf[:size] if axis == 0 else leaf[:, :size]

    return _with_vocabularies(tree, narrow, {"source": source, "target": target})


def _with_vocabularies(tree: Tree, change: Callable[[Any, int, int], Any], sizes: dict[str, int]) -> Tree:
    """Changes the leaves that have an axis of a vocabulary, wherever in a tree parameters are."""

    def changed(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
        if name not in VOCABULARY_AXES:
            return leaf
        axis, side = VOCABULARY_AXES[name]
        return change(leaf, axis, sizes[side])

    return jax.tree_util.tree_map_with_path(changed, tree)
