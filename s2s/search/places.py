"""Places: which sentences of a batch are searched at a time.

Decides when a sentence begins: B sentences wait in order of their rows, N have a place and
are moved together, and whenever an eighth of the places is free, sentences that wait step
in (as requests do in Yu et al. 2022, Orca, section 3.1). So a sentence that is done costs
no more than that, however long others take. Replicas (``jax.vmap``) share their loops, which
go on while any of them has something to do. Must not know how hypotheses are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from s2s.nn.bound import common_max
from s2s.nn.equations import ready
from s2s.search.hypotheses import (
    Ends,
    History,
    Slots,
    State,
    Step,
    first_slots,
    no_ends,
    no_history,
    record,
    settle,
)
from s2s.shapes import check_shapes

Context = Any
Tree = TypeVar("Tree")


class Task(NamedTuple):
    """What a search knows of its sentences: of all B, or of the N that have a place.

    Attributes:
      context: what the model reads of a sentence, any leaves [B, ...].
      state: the model's state of the empty hypothesis, leaves [B, 1, ...].
      limit_B: most target tokens, EOS included.
      source_mask_BS: True on real source positions.
      index_B: a number for each sentence.
    """

    context: Context
    state: State
    limit_B: jax.Array
    source_mask_BS: jax.Array
    index_B: jax.Array


class Work(NamedTuple):
    """N places.

    Attributes:
      task: of the sentence in each.
      row_N: its row in the batch; B: nobody has the place.
      t_N: tokens its hypotheses have.
      slots: its hypotheses.
    """

    task: Task
    row_N: jax.Array
    t_N: jax.Array
    slots: Slots

    @property
    def busy_N(self) -> jax.Array:
        return jnp.any(self.slots.live_NK, axis=1)


def make_task(
    context: Context,
    state: State,
    *,
    max_length: int,
    source_mask_BS: jax.Array,
    limit_B: jax.Array | None,
    index_B: jax.Array | None = None,
) -> Task:
    """Checks what a search is given.

    Raises:
      ValueError: lengths or shapes that cannot work.
    """
    (B, _), T = source_mask_BS.shape, max_length
    if T < 1:
        raise ValueError(f"max_length={T} must be at least 1")
    for name, tree, begin in (("context", context, (B,)), ("state", state, (B, 1))):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if leaf.shape[: len(begin)] != begin:
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} has shape {leaf.shape}: leaves must begin with "
                    f"{'[sentences, 1]' if name == 'state' else '[sentences]'} = {list(begin)}"
                )
    limit_B = jnp.full((B,), T, jnp.int32) if limit_B is None else limit_B
    index_B = jnp.arange(B, dtype=jnp.int32) if index_B is None else index_B
    check_shapes(source_mask_BS=source_mask_BS, limit_B=limit_B, index_B=index_B)
    limit_B = jnp.where(jnp.any(source_mask_BS, axis=1), jnp.clip(limit_B, 0, T), 0)
    return jax.tree.map(jnp.asarray, Task(context, state, limit_B, source_mask_BS, index_B))


def search_all(
    step: Callable[[Work], tuple[Slots, Step]],
    begin: Callable[[Slots], Slots],
    task: Task,
    K: int,
    places: int | None,
    max_length: int,
) -> tuple[Ends, History]:
    """Takes every sentence from its first token to its last.

    Args:
      step: moves the N sentences at work by one token; what it makes of places where nothing lives
        is dropped.
      begin: changes slots that all hold the empty hypothesis into those a search begins with.
      task: the sentences.
      K: slots a sentence.
      places: sentences searched at a time, N; None: all.
      max_length: target tokens T there is room for.
    """
    B, S = task.source_mask_BS.shape
    N = B if places is None else min(places, B)
    if K < 1 or N < 1:
        raise ValueError(f"places={N} and the number of hypotheses a sentence, {K}, must be at least 1")
    spare = max(1, N // 8)
    # Beyond the last sentence with anything to search there is nothing to wait for.
    count = jnp.max(jnp.where(task.limit_B > 0, jnp.arange(1, B + 1), 0))

    def enter(waiting: jax.Array, work: Work) -> tuple[jax.Array, Work]:
        """Gives every free place to a sentence that waits, or to nobody."""
        free_N = ~work.busy_N
        next_N = jnp.minimum(waiting + jnp.cumsum(free_N, dtype=jnp.int32) - 1, B)
        row_N = jnp.where(free_N, next_N, work.row_N)
        own = jax.tree.map(lambda leaf: leaf.at[row_N].get(mode="clip"), task)
        new_N = free_N & (row_N < B)
        fresh = begin(first_slots(own.state, K, own.limit_B, S))
        slots = _where(new_N, fresh, work.slots)
        work = Work(own, row_N, jnp.where(new_N, 0, work.t_N), slots)
        return jnp.minimum(waiting + jnp.sum(free_N, dtype=jnp.int32), B), work

    def move(carry: tuple[Work, History]) -> tuple[Work, History]:
        work, history = carry
        busy_N = work.busy_N
        slots, made = step(work)
        history = record(history, work.t_N, jnp.where(busy_N, work.row_N, B), made)
        # The state of what is done is read no more, and too large to be kept for nothing.
        slots = _where(busy_N, slots, work.slots._replace(state=slots.state))
        return work._replace(t_N=work.t_N + busy_N, slots=slots), history

    def serve(carry: tuple[jax.Array, Work, Ends, History]) -> tuple[jax.Array, Work, Ends, History]:
        waiting, work, ends, history = carry
        waiting, work = enter(waiting, work)
        enough = jnp.where(waiting < count, N - spare, 0)
        work, history = lax.while_loop(
            lambda carry: _in_any_replica(jnp.sum(carry[0].busy_N) > enough), move, (work, history)
        )
        return waiting, work, settle(ends, work.row_N, work.t_N, work.slots), history

    own = jax.tree.map(lambda leaf: leaf[:N], task)
    nobody = first_slots(own.state, K, jnp.zeros((N,), jnp.int32), S)
    work = Work(own, jnp.full((N,), B, jnp.int32), jnp.zeros((N,), jnp.int32), nobody)
    step = ready(step, work)
    _, _, ends, history = lax.while_loop(
        lambda carry: _in_any_replica((carry[0] < count) | jnp.any(carry[1].busy_N)),
        serve,
        (jnp.int32(0), work, no_ends(K, task.limit_B), no_history(max_length, B, K, S)),
    )
    return ends, history


def _in_any_replica(goes_on: jax.Array) -> jax.Array:
    # A step where nothing lives changes nothing, so replicas that are done can make it too.
    return common_max(goes_on.astype(jnp.int32)) > 0


def _where(choice_N: jax.Array, left: Tree, right: Tree) -> Tree:
    def one(left: jax.Array, right: jax.Array) -> jax.Array:
        if left is right:
            return left
        return jnp.where(jnp.expand_dims(choice_N, tuple(range(1, left.ndim))), left, right)

    return jax.tree.map(one, left, right)
