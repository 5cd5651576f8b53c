"""What is measured, in which order: the most telling cells first, as time may end before the list does.

Decides sizes, number formats, XLA flags and limits. Must not know how anything is measured, and
imports no JAX: the process that reads this starts the ones that do.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from typing import Any

# Flags that a process takes when it starts, so each set is a process of its own. By default XLA puts
# products and kernels between loops into CUDA graphs, but no loop.
FLAGS = {
    "default": "",
    "no graphs": "--xla_gpu_enable_command_buffer=",
    "loops in graphs": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
    "unrolled graphs": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL "
    "--xla_gpu_command_buffer_unroll_loops=true",
}
GRAPHS = tuple(name for name in FLAGS if name != "default")

# Products: "float32" with all its bits, "tf32" as JAX does float32 on such a GPU by default, "bfloat16".
NUMBERS = ("tf32", "bfloat16", "float32")

# Seconds that one cell may take, compilation included.
LIMITS = {"check": 60, "peak": 40, "bandwidth": 30, "loop": 40, "layer": 45, "train": 70, "beam": 70}


@dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
      hidden: units, and features of word vectors.
      layers: of encoder (bidirectional, half the units a direction) and decoder each.
      rows: sentences in a batch.
      steps: source and target positions.
      vocab: entries of both vocabularies.
    """

    hidden: int
    layers: int
    rows: int
    steps: int
    vocab: int


SIZES = {
    "main": Size(512, 2, 64, 32, 8000),
    "large": Size(1024, 2, 256, 32, 8000),
    "small": Size(128, 1, 32, 32, 100),
}
TINY = Size(16, 1, 16, 4, 20)


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
      kind: which one; a key of `LIMITS`.
      flags: a key of `FLAGS`.
      options: what the measurement is asked, by name.
      limit: seconds until it is stopped.
    """

    kind: str
    flags: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    limit: float = 60.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def programme(tiny: bool = False) -> list[Cell]:
    """All cells in order.

    Args:
      tiny: small sizes and one cell of every sort, for a test on a CPU.
    """
    sizes = dict.fromkeys(SIZES, TINY) if tiny else SIZES

    def cell(kind: str, flags: str = "default", **options: Any) -> Cell:
        if "size" in options:
            options["shape"] = asdict(sizes[options["size"]])
        return Cell(kind, flags, options, LIMITS[kind])

    def train(size: str, numbers: str, recurrence: str = "scan", flags: str = "default", **more: Any) -> Cell:
        return cell("train", flags, size=size, numbers=numbers, recurrence=recurrence, **more)

    def layer(size: str, numbers: str, way: str, flags: str = "default", **more: Any) -> Cell:
        return cell("layer", flags, size=size, numbers=numbers, way=way, **more)

    checks = [
        cell("check", name=name, size="main")
        for name in (
            "package_is_float64", "cudnn_is_package", "static_is_package", "fused_is_static",
            "tf32_near_float32", "bfloat16_near_float32", "cudnn_learns_as_scan",
            "bfloat16_learns_as_float32",
        )
    ]  # fmt: skip
    floors = [cell("peak", numbers=numbers, side=64 if tiny else 8192) for numbers in NUMBERS]
    floors += [cell("bandwidth", megabytes=1 if tiny else 2048), cell("loop", turns=64 if tiny else 2000)]
    if tiny:
        return [
            *checks,
            *floors,
            train("main", "tf32", "cudnn"),
            train("main", "bfloat16", feeding=True, filled=0.5, walk="counted"),
            layer("main", "tf32", "cudnn"),
            layer("main", "tf32", "package"),
            layer("main", "tf32", "static", unroll=4, filled=0.5),
            layer("main", "bfloat16", "naive", "unrolled graphs"),
            cell("beam", size="main", numbers="tf32"),
        ]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("package", {}),
        ("counted", {}),
        ("cudnn", {}),
        ("static", {"unroll": 8}),
        ("naive", {}),
        ("fused", {}),
    ]
    cells = [*checks, *floors]
    cells += [
        train("main", "tf32"),
        train("main", "tf32", "cudnn"),
        train("main", "bfloat16"),
        train("main", "tf32", feeding=True),
        train("main", "bfloat16", feeding=True),
        train("main", "tf32", walk="counted"),
        train("main", "tf32", walk="autodiff"),
    ]
    cells += [layer("main", "tf32", way, **more) for way, more in ways]
    # A dynamic trip count asks the host at every turn, unless the loop is inside a graph.
    cells += [cell("loop", flags, turns=2000) for flags in GRAPHS]
    cells += [train("main", "tf32", flags=flags) for flags in GRAPHS]
    cells += [train("main", "tf32", flags=flags, walk="counted") for flags in GRAPHS]
    cells += [train("main", "tf32", flags=flags, feeding=True) for flags in GRAPHS]
    cells += [train("small", "tf32", flags=flags) for flags in FLAGS]
    cells += [cell("beam", size="main", numbers=numbers) for numbers in ("tf32", "bfloat16")]
    cells += [train("small", "tf32", "cudnn"), train("large", "tf32"), train("large", "tf32", "cudnn")]
    cells += [train("large", "bfloat16"), train("small", "bfloat16")]
    # Six in ten positions are real, and so is the longest sentence: what stopping there is worth.
    cells += [layer("main", "tf32", way, filled=0.6) for way in ("package", "counted", "cudnn")]
    cells += [train("main", "tf32", recurrence, filled=0.6) for recurrence in ("scan", "cudnn")]
    cells += [layer("main", "tf32", way, flags) for flags in GRAPHS for way in ("package", "counted")]
    cells += [layer("main", "bfloat16", way, **more) for way, more in ways if way != "cudnn"]
    cells += [
        layer("main", "tf32", way, unroll=unroll)
        for way, unroll in (("static", 1), ("static", 4), ("naive", 4), ("naive", 8))
    ]
    cells += [train("main", "tf32", walk="autodiff", unroll=unroll) for unroll in (4, 8)]
    cells += [train("main", "tf32", walk=walk, feeding=True) for walk in ("counted", "autodiff")]
    cells += [train("main", "float32"), train("main", "float32", "cudnn")]
    cells += [layer(size, "tf32", way, **more) for size in ("small", "large") for way, more in ways]
    cells += [
        layer(size, "bfloat16", way)
        for size, way in itertools.product(("small", "large"), ("package", "counted", "fused"))
    ]
    cells += [train(size, "tf32", feeding=True) for size in ("small", "large")]
    cells += [train("main", "bfloat16", flags=flags) for flags in GRAPHS]
    cells += [cell("beam", flags, size="main", numbers="tf32") for flags in GRAPHS]
    cells += [cell("beam", size=size, numbers="tf32") for size in ("small", "large")]
    cells += [train(size, "float32", how) for size in ("small", "large") for how in ("scan", "cudnn")]
    cells += [layer("main", "float32", way, **more) for way, more in ways]
    return cells
