"""The compiled update of the members of a program: of one as it is, of several with an axis of replicas.

Decides how the states of runs become one state on the devices and how each gets its own back. Must not
know when anything is updated, evaluated or saved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from s2s.batch import Batch
from s2s.data import pipeline
from s2s.data.plan import Bucket, Tick
from s2s.infra import compilation, distributed, sharding
from s2s.learn import optim, replicas
from s2s.learn import step as step_lib
from s2s.train.member import Member


class Program(Protocol):
    """The state of all members, and how it moves.

    Attributes:
      compiled: its updates, one a batch shape; a context manager.
    """

    compiled: compilation.ByShape

    def begin(self, states: Sequence[step_lib.TrainState]) -> None:
        """Takes the members' states, each of its own shapes, in order."""

    def batches(self, ticks: Sequence[Tick], epoch: int) -> Iterator[Batch]:
        """This process's rows of the members' batches, a tick each."""

    def update(self, batch: Batch, active: Sequence[bool]) -> step_lib.Metrics:
        """Makes one update of the members that are active; the others' states stay as they are."""

    def own_metrics(self, metrics: step_lib.Metrics, number: int) -> step_lib.Metrics:
        """What an update reported of one member; all on the host."""

    def own_state(self, number: int) -> step_lib.TrainState:
        """The state of one member, of its own shapes."""

    def own_params(self, number: int) -> step_lib.Params:
        """Its parameters to evaluate, on all devices."""


class Alone:
    """The program of a single run: its state and its batches as they are.

    Args:
      member: the run.
      graphdef: its model's structure.
      order: batch shapes, those needed first before the others.
      mesh: devices to train on.
    """

    def __init__(self, member: Member, graphdef: Any, order: Sequence[Bucket], mesh: jax.sharding.Mesh):
        cfg, self._member, self._mesh = member.cfg, member, mesh
        schedule = optim.make_schedule(
            cfg.optim, steps_per_epoch=member.layout.batches_per_epoch, total_steps=member.total_steps
        )
        step = step_lib.make_train_step(graphdef, cfg, optim.make_optimizer(cfg.optim, schedule))
        self.compiled = compilation.ByShape(
            sharding.jit_train_step(step, mesh),
            [
                (member.abstract, sharding.abstract_by_rows(_nothing(member, bucket), mesh))
                for bucket in order
            ],
        )

    def begin(self, states: Sequence[step_lib.TrainState]) -> None:
        (self._state,) = states

    def batches(self, ticks: Sequence[Tick], epoch: int) -> Iterator[Batch]:
        first = ticks[0].numbers[0]
        assert first is not None
        return pipeline.batches(
            self._member.encoded,
            self._member.layout,
            epoch=epoch,
            start=first,
            process_index=distributed.process_index(),
            process_count=distributed.process_count(),
            prefetch=self._member.cfg.data.prefetch,
        )

    def update(self, batch: Batch, active: Sequence[bool]) -> step_lib.Metrics:
        self._state, metrics = self.compiled(self._state, sharding.to_global(batch, self._mesh))
        return metrics

    def own_metrics(self, metrics: step_lib.Metrics, number: int) -> step_lib.Metrics:
        return metrics

    def own_state(self, number: int) -> step_lib.TrainState:
        return self._state

    def own_params(self, number: int) -> step_lib.Params:
        return step_lib.evaluation_params(self._state)


class Together:
    """The program of several runs: states padded to common vocabularies and stacked.

    Args:
      members: the runs.
      graphdef: the structure of their models.
      order: batch shapes, those needed first before the others.
      mesh: devices to evaluate one member on; training has a mesh of its own.
    """

    def __init__(
        self, members: Sequence[Member], graphdef: Any, order: Sequence[Bucket], mesh: jax.sharding.Mesh
    ):
        self._members, self._single = members, mesh
        self._mesh = sharding.make_replicas_mesh(len(members))
        self._sizes = largest([member.sizes for member in members])
        targets = [member.sizes[1] for member in members]
        numbers = replicas.varied(
            [member.cfg for member in members],
            [member.layout.batches_per_epoch for member in members],
            [member.total_steps for member in members],
            targets if len(set(targets)) > 1 else None,
        )
        self._varied = sharding.place_replicas(numbers, self._mesh)
        self._active: dict[tuple[bool, ...], Any] = {}
        self._on_host: Any = None
        self.compiled = compilation.ByShape(
            sharding.jit_replicas_step(
                replicas.make_replicas_step(graphdef, members[0].cfg, together=sharding.is_wide(self._mesh)),
                self._mesh,
            ),
            [
                (
                    sharding.abstract_replicas(self._abstract(), self._mesh),
                    sharding.abstract_replicas(numbers, self._mesh),
                    sharding.abstract_replicas(np.ones(len(members), bool), self._mesh),
                    sharding.abstract_replicas_by_rows(
                        replicas.stack([_nothing(member, bucket) for member in members]), self._mesh
                    ),
                )
                for bucket in order
            ],
        )

    def begin(self, states: Sequence[step_lib.TrainState]) -> None:
        padded = [replicas.pad(sharding.to_host(state), *self._sizes) for state in states]
        self._state = sharding.place_replicas(replicas.stack(padded), self._mesh)

    def batches(self, ticks: Sequence[Tick], epoch: int) -> Iterator[Batch]:
        return pipeline.stacked(
            [member.encoded for member in self._members],
            [member.layout for member in self._members],
            ticks,
            epoch=epoch,
            process_index=distributed.process_index(),
            process_count=distributed.process_count(),
            prefetch=self._members[0].cfg.data.prefetch,
        )

    def update(self, batch: Batch, active: Sequence[bool]) -> step_lib.Metrics:
        asked = tuple(active)
        if asked not in self._active:
            self._active[asked] = sharding.place_replicas(np.array(asked), self._mesh)
        self._on_host = None
        self._state, metrics = self.compiled(
            self._state, self._varied, self._active[asked], sharding.replicas_to_global(batch, self._mesh)
        )
        return metrics

    def own_metrics(self, metrics: step_lib.Metrics, number: int) -> step_lib.Metrics:
        return replicas.one(metrics, number)

    def own_state(self, number: int) -> step_lib.TrainState:
        # Members that are saved after the same update share one copy.
        if self._on_host is None:
            self._on_host = sharding.to_host(self._state)
        return replicas.cut(replicas.one(self._on_host, number), *self._members[number].sizes)

    def own_params(self, number: int) -> step_lib.Params:
        return sharding.replicate(step_lib.evaluation_params(self.own_state(number)), self._single)

    def _abstract(self) -> Any:
        """Shapes of the stacked state."""
        padded = jax.eval_shape(
            functools.partial(replicas.pad, source=self._sizes[0], target=self._sizes[1]),
            self._members[0].abstract,
        )
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(self._members), *leaf.shape), leaf.dtype), padded
        )


def largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The vocabulary sizes that all fit in."""
    return max(source for source, _ in sizes), max(target for _, target in sizes)


def _nothing(member: Member, bucket: Bucket) -> Batch:
    """An empty batch of a shape."""
    return pipeline.pad_batch(member.encoded, np.zeros(0, np.int64), bucket)
