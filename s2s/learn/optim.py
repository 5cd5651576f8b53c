"""How parameters move: the learning rate at a step, and the chain that turns gradients into updates.

Decides every rule named in `s2s.config.OPTIMIZERS` and `s2s.config.SCHEDULES`.
Must not know the model or the loss: a pytree of gradients comes in, a pytree of
updates goes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2s.config import OptimConfig


class Milestones(NamedTuple):
    """Where schedules turn, in whole steps: a quotient of floats would drop a step early or late.

    Integers, or integer arrays that may be traced: one program serves runs of many lengths.

    Attributes:
      decay_start: updates before "luong" first decays, counted from step 0.
      decay_every: updates between decays, at least 1.
      decay_steps: updates from the end of warm-up to the end of the run, at least 1.
    """

    decay_start: Any
    decay_every: Any
    decay_steps: Any


def milestones(cfg: OptimConfig, *, steps_per_epoch: int, total_steps: int) -> Milestones:
    """The milestones of a run of so many updates, and so many an epoch."""
    return Milestones(
        decay_start=round(cfg.decay_start * steps_per_epoch),
        decay_every=max(1, round(cfg.decay_every * steps_per_epoch)),
        decay_steps=max(1, total_steps - cfg.warmup_steps),
    )


def make_schedule(cfg: OptimConfig, *, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """Makes the learning rate of each step of a run.

    Args:
      cfg: as `schedule_between`.
      steps_per_epoch: updates an epoch.
      total_steps: updates of the whole run; "cosine" and "linear" are 0 from there on.

    Returns:
      As `schedule_between`.
    """
    return schedule_between(cfg, milestones(cfg, steps_per_epoch=steps_per_epoch, total_steps=total_steps))


def schedule_between(cfg: OptimConfig, turns: Milestones) -> optax.Schedule:
    """Makes the learning rate of each step.

    Over the first w = ``warmup_steps`` steps the rate is ``learning_rate`` * step / w,
    whatever the schedule; then, with n = step - w,

      constant      learning_rate
      luong         learning_rate * decay_factor**k, k = 0 before epoch ``decay_start``, 1 from
                    there on, one more every ``decay_every`` epochs (Luong et al. 2015, section
                    4.1: rate 1, halved every epoch after 5 epochs); epochs count from step 0
      cosine        learning_rate * (1 + cos(pi n / (total_steps - w))) / 2
      linear        learning_rate * (1 - n / (total_steps - w))
      inverse_sqrt  learning_rate * sqrt(w / step), w at least 1 (Vaswani et al. 2017, eq. 3)
      exponential   learning_rate * decay_factor**(n / (decay_every * steps_per_epoch))

    Args:
      cfg: learning rate, schedule and its numbers; of these, ``learning_rate`` and ``decay_factor``
        may be traced float32 scalars.
      turns: of `milestones`.

    Returns:
      A function from the number of updates made before (traced or not) to a float32 rate.
    """
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    after = SCHEDULES[cfg.schedule](cfg, turns)
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    return lambda step: jnp.asarray(after(step), jnp.float32)


def _constant(cfg: OptimConfig, turns: Milestones) -> optax.Schedule:
    return optax.constant_schedule(cfg.learning_rate)


def _luong(cfg: OptimConfig, turns: Milestones) -> optax.Schedule:
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count) + cfg.warmup_steps
        drops = jnp.maximum((step - turns.decay_start) // turns.decay_every + 1, 0)
        return cfg.learning_rate * jnp.power(cfg.decay_factor, drops.astype(jnp.float32))

    return schedule


def _cosine(cfg: OptimConfig, turns: Milestones) -> optax.Schedule:
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.minimum(count, turns.decay_steps)
        return cfg.learning_rate * (0.5 * (1 + jnp.cos(jnp.pi * count / turns.decay_steps)))

    return schedule


def _linear(cfg: OptimConfig, turns: Milestones) -> optax.Schedule:
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # Not 1 - n / steps: a compiler may multiply by the reciprocal, and what should be 0 is below it.
        left = turns.decay_steps - jnp.clip(count, 0, turns.decay_steps)
        return cfg.learning_rate * (left / turns.decay_steps)

    return schedule


def _inverse_sqrt(cfg: OptimConfig, turns: Milestones) -> optax.Schedule:
    width = max(1, cfg.warmup_steps)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.maximum(jnp.asarray(count) + cfg.warmup_steps, width)
        return cfg.learning_rate * jnp.sqrt(width / step)

    return schedule


def _exponential(cfg: OptimConfig, turns: Milestones) -> optax.Schedule:
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # The warm-up's program also asks for steps before its end.
        count = jnp.maximum(count, 0)
        return cfg.learning_rate * jnp.power(cfg.decay_factor, count / turns.decay_every)

    return schedule


# name -> (cfg, milestones) -> schedule of the steps since the end of warm-up.
SCHEDULES: dict[str, Callable[[OptimConfig, Milestones], optax.Schedule]] = {
    "constant": _constant,
    "luong": _luong,
    "cosine": _cosine,
    "linear": _linear,
    "inverse_sqrt": _inverse_sqrt,
    "exponential": _exponential,
}


# name -> cfg -> the direction to move against, at rate 1.
OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "sgd": lambda cfg: optax.identity(),
    "adam": lambda cfg: optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon),
    "adamw": lambda cfg: optax.chain(
        optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon),
        optax.add_decayed_weights(cfg.weight_decay),
    ),
    # The paper's own constants (Zeiler 2012, section 4.1), which Bahdanau et al. 2015 keep.
    "adadelta": lambda cfg: optax.scale_by_adadelta(rho=0.95, eps=1e-6),
}


class RateState(NamedTuple):
    """State of the last link of the chain.

    Attributes:
      step: updates made; int32.
      learning_rate: of the last update, 0 before the first; float32.
    """

    step: jax.Array
    learning_rate: jax.Array


def make_optimizer(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Makes the chain: the rule's direction, times minus the learning rate. Clipping comes before (`clip`).

    "adamw" decays every parameter, at the learning rate (Loshchilov and Hutter 2019, algorithm 2).
    Everything but the structure may be traced: built inside a traced function with a schedule
    and numbers that are traced scalars, one program serves many learning rates. The first state
    does not depend on the schedule.

    Args:
      cfg: the rule and its numbers.
      schedule: learning rate of a step; see `make_schedule`.
    """
    return optax.chain(OPTIMIZERS[cfg.name](cfg), _descend(schedule))


def clip(cfg: OptimConfig, norm: jax.Array) -> jax.Array:
    """The factor that cuts a gradient of this global norm to ``cfg.clip_norm`` (Pascanu et al. 2013).

    One number: as a step of the chain (optax.clip_by_global_norm) clipping reads and writes all gradients
    once more.
    """
    # A traced norm is never 0: to clip or not is structure.
    clips = isinstance(cfg.clip_norm, jax.Array) or cfg.clip_norm > 0
    return jnp.minimum(1.0, cfg.clip_norm / norm) if clips else jnp.ones_like(norm)


def learning_rate(opt_state: optax.OptState) -> jax.Array:
    """The learning rate of the last update, from the state of a `make_optimizer` chain."""
    return opt_state[-1].learning_rate


def _descend(schedule: optax.Schedule) -> optax.GradientTransformation:
    """optax.scale_by_learning_rate, but the rate it used can be read."""

    def init(params: Any) -> RateState:
        return RateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Any, state: RateState, params: Any = None) -> tuple[Any, RateState]:
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
        return updates, RateState(optax.safe_increment(state.step), rate)

    return optax.GradientTransformation(init, update)
