"""What a run costs: memory and time estimated from shapes, and how many runs fill a machine.

Decides what planning believes of a platform: three numbers a platform, explained beside them, good
to a factor of two. Nothing that is measured replaces or follows them: they only decide how many
runs share a program, and what a plan says beforehand. Must not know how a step is computed, nor
which runs there are.

An update of one run takes turns * turn + flops / rate seconds: positions that a recurrence walks one
after another, and products. Runs of one program share the turns, not the products, so R of them take
turns * turn + R * flops / rate.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import NamedTuple

from s2s.config import Config, OptimConfig
from s2s.sweep.flops import GATES, STATES, Tokens, parameters, train_flops

GIB = 2**30


class Platform(NamedTuple):
    """What planning believes of a kind of device.

    Attributes:
      turn: seconds for a position of a recurrence, walked forward and back, however little is computed
        there: launching its operations, and waiting for each. The share of a step's own start is in it.
      rate: FLOP/s of float32 products of a model of no matter how many units: what they come near to.
      half: units at which products of one run reach half of it; those of fewer units are less efficient.
      worth: runs share a program only if the ideal gain, were products free of any cost in being
        shared, is at least this factor.
      memory: bytes of the device, or of the machine, where nobody says.
    """

    turn: float
    rate: float
    half: int
    worth: float
    memory: float


# cpu: a core. From measurements on two cores of a Xeon with AVX-512 (benchmarks/results/cpu.json): 512 units,
# 64 x 32 x 32: 98 GFLOP/s a core; large products: 157; 128 units and words: half of that. turn is such that
# eight replicas of 128 units are 1.5 times as fast as eight runs, as was measured. At 256 units the ideal
# gain would then be 1.28, and none was measured: perhaps as the kernels of several models no longer fit the
# caches. Hence worth.
# gpu, tpu: not measured here. A turn is some ten kernels, forward and back, of about 4 microseconds each, or
# a third of that within a TPU's program; rates are a half of what data sheets of an A100 (TF32) and of a
# v4 chip say; a product of one small model keeps a few per cent of the device busy.
PLATFORMS = {
    "cpu": Platform(turn=8e-5, rate=1.5e11, half=256, worth=1.3, memory=8 * GIB),
    "gpu": Platform(turn=4e-5, rate=7e13, half=8192, worth=1.1, memory=16 * GIB),
    "tpu": Platform(turn=1.5e-5, rate=1.4e14, half=8192, worth=1.1, memory=16 * GIB),
}
# A program takes no more than this share of the memory: what is estimated may be wrong by a third, and
# batches, search and compilation need some too.
_MEMORY_SHARE = 0.6
# The machine is full when what runs share is no more than this share of what they do not.
_LEFT = 0.05
# Numbers kept a parameter, beside itself and its gradient.
_OPTIMIZER = {"sgd": 0, "adam": 2, "adamw": 2, "adadelta": 2}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where programs are going to run.

    Attributes:
      platform: a name in `PLATFORMS`.
      units: cores of a cpu, or devices, that one program has.
      memory: bytes of all of them together.
    """

    platform: str
    units: int = 1
    memory: float = 0.0

    def __str__(self) -> str:
        units = f"{self.units} {'cores' if self.platform == 'cpu' else 'devices'}"
        return f"{self.platform}, {units if self.units > 1 else units[:-1]}, {self.memory / GIB:.0f} GiB"


class Sizes(NamedTuple):
    """What a run's corpus makes of its steps.

    Attributes:
      source_vocab, target_vocab: entries.
      pairs: in the training part.
      batches: updates an epoch.
      tokens: real tokens of a step, on average.
      source, target: positions of a batch, on average over steps.
      padding: share of the positions that hold no token.
      largest: rows, source and target positions of the largest batch.
    """

    source_vocab: int
    target_vocab: int
    pairs: int
    batches: int
    tokens: Tokens
    source: float
    target: float
    padding: float
    largest: tuple[int, int, int]


class Cost(NamedTuple):
    """What a run costs.

    Attributes:
      parameters: numbers in its model.
      steps: updates, if none stops it early.
      flops: of the products of a step, real tokens only.
      shared: seconds of a step that the runs of a program share.
      own: seconds of a step for each run.
      fixed: bytes as long as it is trained: parameters, optimizer, averages.
      passing: bytes during a step: gradients and activations.
    """

    parameters: int
    steps: int
    flops: float
    shared: float
    own: float
    fixed: float
    passing: float

    @property
    def memory(self) -> float:
        """Bytes, at most at a time."""
        return self.fixed + self.passing


def estimate(cfg: Config, sizes: Sizes, machine: Machine) -> Cost:
    """Estimates what a run costs on a machine, with a program of its own."""
    platform = PLATFORMS[machine.platform]
    model = cfg.model
    numbers = parameters(model, sizes.source_vocab, sizes.target_vocab)
    flops = train_flops(model, sizes.target_vocab, sizes.tokens)
    steps = cfg.run.steps or max(1, math.ceil(cfg.run.epochs * sizes.batches))
    # The two directions of an encoder layer are walked one after the other.
    walks = model.encoder_depth * (2 if model.bidirectional else 1) * sizes.source
    turns = walks + model.layers * sizes.target
    rate = platform.rate * machine.units * model.hidden / (model.hidden + platform.half)
    copies = 1 + _OPTIMIZER[cfg.optim.name] + (1 if cfg.optim.ema else 0)
    return Cost(
        parameters=numbers,
        steps=steps,
        flops=flops,
        shared=turns * platform.turn * cfg.optim.accumulate,
        own=flops / (1 - sizes.padding) / rate,
        fixed=4.0 * numbers * copies,
        passing=4.0 * numbers * _gradients(cfg.optim) + _activations(cfg, sizes),
    )


def step_seconds(cost: Cost, replicas: int) -> float:
    """Seconds of an update of so many runs in one program."""
    return cost.shared + replicas * cost.own


def replicas(cost: Cost, machine: Machine) -> int:
    """How many runs like this one program is given: enough to fill the machine, if they fit its memory.

    One, where sharing gains too little: (shared + own) / own is the most that ever could be gained.
    """
    platform = PLATFORMS[machine.platform]
    held = max(1, int(_MEMORY_SHARE * machine.memory / cost.memory))
    if cost.shared + cost.own < platform.worth * cost.own:
        return 1
    return min(held, max(1, math.ceil(cost.shared / (_LEFT * cost.own))))


def read_machine(text: str) -> Machine:
    """Reads PLATFORM[:GIB[:UNITS]], such as gpu:80.

    Raises:
      ValueError: it is something else.
    """
    name, *numbers = text.split(":")
    try:
        memory, units = ([float(number) for number in numbers] + [0.0, 0.0][len(numbers) :])[:2]
        if name not in PLATFORMS or len(numbers) > 2 or memory < 0 or units != int(units) or units < 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--machine={text} is no PLATFORM[:GIB[:UNITS]]: a platform is one of {', '.join(PLATFORMS)}, as "
            "in gpu:80 for a GPU of 80 GiB, or cpu:16:4 for four cores with 16 GiB"
        ) from None
    found = this_cpu() if name == "cpu" else Machine(name, 1, PLATFORMS[name].memory)
    return Machine(name, int(units) or found.units, memory * GIB or found.memory)


def this_cpu() -> Machine:
    """The cores that this process may use, and the memory of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        memory = PLATFORMS["cpu"].memory
    return Machine("cpu", cores, memory)


def _gradients(cfg: OptimConfig) -> int:
    """Copies of the parameters that come and go in a step: gradients, their sum and the updates."""
    return 3 if cfg.accumulate > 1 else 2


def _activations(cfg: Config, sizes: Sizes) -> float:
    """Bytes that a step of the largest batch writes on its way forward and reads on its way back.

    A position of a layer keeps what it read, its gates before and after the state joined, and its
    states; going back, gradients of gates are written beside them. Attention keeps scores and weights
    of all pairs of positions, and "concat" a vector for each.
    """
    rows, source, target = sizes.largest
    model = cfg.model
    gates, states = GATES[model.cell], STATES[model.cell]

    def layers(depth: int, first: int, units: int, directions: int) -> float:
        reads = first + (depth - 1) * units * directions
        return 2.0 * reads * directions + depth * directions * units * (3 * gates + 2 * states)

    encoder = layers(
        model.encoder_depth, model.embedding, model.encoder_units, 2 if model.bidirectional else 1
    )
    decoder = layers(model.layers, model.embedding, model.hidden, 1)
    attentional = 2.0 * (model.memory + 3 * model.hidden)
    looks = {"none": 0, "fixed": 0, "concat": 4 + 2 * model.hidden}.get(model.attention, 4)
    numbers = (
        source * (encoder + 2 * model.memory) + target * (decoder + attentional) + source * target * looks
    )
    # The softmax takes tokens in pieces, some square root of them at a time.
    tokens = rows * target
    pieces = max(1.0, math.sqrt(tokens / 40))
    softmax = 2.0 * tokens / pieces * sizes.target_vocab
    width = 2.0 if model.dtype == "bfloat16" else 4.0
    return (width * rows * numbers) / cfg.optim.accumulate + 4.0 * softmax
