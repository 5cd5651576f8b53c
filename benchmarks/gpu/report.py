"""The results as a reader wants them: tables, and which way is the best when.

Decides what is compared with what. Must not know how a figure came about: it reads the JSON file's
contents and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What a barrier of all of a GPU's multiprocessors is taken to cost, in seconds: an assumption, not a figure.
BARRIER = 2e-6


def write(results: dict[str, Any], output: Path) -> None:
    """Writes the JSON file and the tables beside it; a reader never sees half of either."""
    for path, text in (
        (output, json.dumps(results, indent=1) + "\n"),
        (output.with_suffix(".md"), markdown(results)),
    ):
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def name_of(row: Row) -> str:
    """A cell in words: "train, size main, numbers tf32, recurrence cudnn [no graphs]"."""
    options = ", ".join(f"{name} {value}" for name, value in row["options"].items() if name != "shape")
    flags = "" if row["flags"] == "default" else f" [{row['flags']}]"
    return f"{row['kind']}{', ' if options else ''}{options}{flags}"


def markdown(results: dict[str, Any]) -> str:
    """All tables; those of which nothing has been measured are left out."""
    rows = results["cells"]
    done = [row for row in rows if row["status"] == "done"]
    machine = results["machine"] or {}
    parts = [
        "# The GPU programme",
        f"{results['gpu'] or machine.get('device', 'no device')}; jax {machine.get('jax')}, "
        f"{str(machine.get('runtime')).splitlines()[0]}; commit {results['commit']}; "
        f"{results['began']} UTC, {results.get('seconds', 0):.0f} s of {results['budget']:.0f} s.",
        "Seconds are medians of at least five rounds; tokens are real target tokens. FLOPs are those of the "
        "model's products, a backward pass counted as two forward ones.",
    ]
    sections = (
        ("Is it right?", _checks(done)),
        ("Floors", _floors(done)),
        ("Which is best when", _best(done)),
        ("Training steps", _training(done)),
        ("One LSTM layer, one direction", _layers(done)),
        ("CUDA graphs", _graphs(done)),
        ("Stopping at the longest sentence", _filled(done)),
        ("Beam search, 5 beams", _beams(done)),
        ("What a kernel of our own could save", _kernel(done)),
        ("Not measured", _missing(rows)),
    )
    for title, table in sections:
        if table:
            parts += [f"## {title}", table]
    return "\n\n".join(parts) + "\n"


def best(done: Iterable[Row]) -> list[dict[str, Any]]:
    """For every model, input feeding and number format, the fastest training step of all that do the same.

    Returns:
      One dict a case: "size", "feeding", "numbers", "recurrence", "flags", "seconds"; "against", the
      seconds of recurrence "scan" without flags, None where that is not known; and "of", how many
      were compared.
    """
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in _of(done, "train", filled=1.0):
        options = row["options"]
        case = options["size"], options.get("feeding", False), options["numbers"]
        cases.setdefault(case, []).append(row)
    found = []
    for (size, feeding, numbers), rows in cases.items():
        winner = min(rows, key=_seconds)
        plain = [row for row in rows if _recurrence(row) == "scan" and row["flags"] == "default"]
        found.append(
            {
                "size": size,
                "feeding": feeding,
                "numbers": numbers,
                "recurrence": _recurrence(winner),
                "flags": winner["flags"],
                "seconds": _seconds(winner),
                "against": _seconds(plain[0]) if plain else None,
                "of": len(rows),
            }
        )
    return found


def kernel_bound(row: Row, peak: float, bytes_per_second: float) -> float:
    """Seconds of a layer's forward pass and gradients if kernels were perfect.

    All products at the machine's peak, or all gates and states through its memory, whichever takes
    longer (weights never leave the chip); and, as a step needs all of the one before, one barrier a
    step and direction.
    """
    shape, options = row["options"]["shape"], row["options"]
    H, tokens = shape["hidden"], shape["rows"] * shape["steps"]
    width = 2 if options["numbers"] == "bfloat16" else 4
    products = 3 * 2 * tokens * 2 * H * 4 * H / peak
    # Gates read and written, states and activations written and read again.
    moved = tokens * H * width * (2 * 4 + 2 * 6) / bytes_per_second
    return max(products, moved) + 2 * shape["steps"] * BARRIER


# ---- tables ----


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    lines = list(lines)
    if not lines:
        return ""
    rule = ["---" if number == 0 else "---:" for number in range(len(heads))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def _of(done: Iterable[Row], kind: str, **options: Any) -> list[Row]:
    """Done cells of a kind whose options are these; an option left out is its measurement's default."""
    defaults = {"filled": 1.0, "feeding": False, "unroll": 1, "recurrence": "scan"}
    return [
        row
        for row in done
        if row["kind"] == kind
        and all(row["options"].get(name, defaults.get(name)) == value for name, value in options.items())
    ]


def _seconds(row: Row) -> float:
    return row["figures"]["gradient_seconds" if row["kind"] == "layer" else "seconds"]


def _ms(value: float) -> str:
    return f"{1e3 * value:.3g}"


def _times(value: float) -> str:
    return f"{value:.2f} x"


def _way(row: Row) -> str:
    unroll = row["options"].get("unroll", 1)
    return row["options"]["way"] + (f", unrolled {unroll}" if unroll > 1 else "")


def _recurrence(row: Row) -> str:
    options = row["options"]
    walk, unroll = options.get("walk", "package"), options.get("unroll", 1)
    how = options["recurrence"] if walk == "package" else f"{options['recurrence']}, {walk}"
    return how + (f", unrolled {unroll}" if unroll > 1 else "")


def _model(row: Row) -> str:
    return row["options"]["size"] + (", feeding" if row["options"].get("feeding") else "")


def _peaks(done: Iterable[Row]) -> dict[str, float]:
    return {row["options"]["numbers"]: row["figures"]["flops"] for row in _of(done, "peak")}


def _checks(done: list[Row]) -> str:
    return _table(
        ("check", "distance", "bound", ""),
        (
            (
                row["options"]["name"].replace("_", " "),
                f"{row['figures']['distance']:.1e}",
                f"{row['figures']['bound']:.0e}",
                "pass" if row["figures"]["passed"] else "**FAIL**",
            )
            for row in _of(done, "check")
        ),
    )


def _floors(done: list[Row]) -> str:
    lines = [
        (f"product, {numbers}", f"{flops / 1e12:.3g} TFLOP/s") for numbers, flops in _peaks(done).items()
    ]
    lines += [
        ("memory", f"{row['figures']['bytes_per_second'] / 1e9:.4g} GB/s") for row in _of(done, "bandwidth")
    ]
    for row in _of(done, "loop"):
        for count in ("static", "dynamic"):
            per_turn = row["figures"][f"{count}_seconds_a_turn"]
            lines.append(
                (f"turn of an empty loop, {count} count, {row['flags']}", f"{1e6 * per_turn:.3g} µs")
            )
    return _table(("what", "measured"), lines)


def _best(done: list[Row]) -> str:
    return _table(
        ("model", "numbers", "best", "XLA flags", "ms a step", "faster than scan by default", "of"),
        (
            (
                case["size"] + (", feeding" if case["feeding"] else ""),
                case["numbers"],
                case["recurrence"],
                case["flags"],
                _ms(case["seconds"]),
                _times(case["against"] / case["seconds"]) if case["against"] else "?",
                str(case["of"]),
            )
            for case in best(done)
        ),
    )


def _training(done: list[Row]) -> str:
    peaks = _peaks(done)
    return _table(
        ("model", "numbers", "recurrence", "XLA flags", "filled", "ms a step", "tokens/s", "TFLOP/s",
         "share of peak", "temporary MB", "compilation (s)"),
        (
            (
                _model(row),
                row["options"]["numbers"],
                _recurrence(row),
                row["flags"],
                f"{row['options'].get('filled', 1.0):.0%}",
                _ms(_seconds(row)),
                f"{row['figures']['tokens_per_second']:,.0f}",
                f"{row['figures']['flops'] / 1e12:.3g}",
                _share(row["figures"]["flops"], peaks.get(row["options"]["numbers"])),
                f"{row['figures']['temporary_bytes'] / 1e6:,.0f}",
                f"{row['figures']['compile_seconds']:.1f}",
            )
            for row in _of(done, "train")
        ),
    )  # fmt: skip


def _share(value: float, whole: float | None) -> str:
    return f"{value / whole:.1%}" if whole else "?"


def _layers(done: list[Row]) -> str:
    return _table(
        (
            "size",
            "numbers",
            "way",
            "XLA flags",
            "filled",
            "forward (ms)",
            "with gradients (ms)",
            "temporary MB",
        ),
        (
            (
                row["options"]["size"],
                row["options"]["numbers"],
                _way(row),
                row["flags"],
                f"{row['options'].get('filled', 1.0):.0%}",
                _ms(row["figures"]["forward_seconds"]),
                _ms(row["figures"]["gradient_seconds"]),
                f"{row['figures']['gradient_temporary_bytes'] / 1e6:,.1f}",
            )
            for row in sorted(
                _of(done, "layer"),
                key=lambda row: (row["options"]["size"], row["options"]["numbers"], _seconds(row)),
            )
        ),
    )


def _graphs(done: list[Row]) -> str:
    """Every cell that was measured under several sets of flags."""
    groups: dict[str, dict[str, Row]] = {}
    for row in (*_of(done, "train"), *_of(done, "layer"), *_of(done, "beam")):
        groups.setdefault(name_of(row | {"flags": "default"}), {})[row["flags"]] = row
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    columns = list(dict.fromkeys(flags for group in groups.values() for flags in group))
    return _table(
        ("cell", *(f"{flags} (ms)" for flags in columns)),
        (
            (name, *(_ms(_seconds(group[flags])) if flags in group else "" for flags in columns))
            for name, group in groups.items()
        ),
    )


def _filled(done: list[Row]) -> str:
    lines = []
    for row in (*_of(done, "train"), *_of(done, "layer")):
        filled = row["options"].get("filled", 1.0)
        if filled == 1.0:
            continue
        full = [
            other
            for other in done
            if other["flags"] == row["flags"]
            and name_of(other) == name_of(row | {"options": _without(row["options"], "filled")})
        ]
        if full:
            seconds = _seconds(full[0]), _seconds(row)
            what = name_of(full[0])
            lines.append((what, f"{filled:.0%}", *map(_ms, seconds), f"{seconds[1] / seconds[0]:.0%}"))
    return _table(("cell", "filled", "full (ms)", "filled so (ms)", "of full"), lines)


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def _beams(done: list[Row]) -> str:
    return _table(
        ("size", "numbers", "XLA flags", "ms a batch", "sentences/s"),
        (
            (
                row["options"]["size"],
                row["options"]["numbers"],
                row["flags"],
                _ms(_seconds(row)),
                f"{row['figures']['sentences_per_second']:,.0f}",
            )
            for row in _of(done, "beam")
        ),
    )


def _kernel(done: list[Row]) -> str:
    """The fused step against the best other way, and both against what no kernel can beat."""
    peaks, memories = _peaks(done), _of(done, "bandwidth")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _of(done, "layer", filled=1.0):
        groups.setdefault((row["options"]["size"], row["options"]["numbers"]), []).append(row)
    lines = []
    for (size, numbers), rows in groups.items():
        fused = [row for row in rows if row["options"]["way"] == "fused"]
        others = [row for row in rows if row["options"]["way"] != "fused"]
        if not others or numbers not in peaks or not memories:
            continue
        other = min(others, key=_seconds)
        bound = kernel_bound(other, peaks[numbers], memories[0]["figures"]["bytes_per_second"])
        ratio = _seconds(other) / _seconds(fused[0]) if fused else None
        lines.append(
            (
                f"{size}, {numbers}",
                f"{_way(other)} [{other['flags']}]",
                _ms(_seconds(other)),
                _ms(_seconds(fused[0])) if fused else "",
                "" if ratio is None else ("wins" if ratio > 1.05 else "does not win"),
                _ms(bound),
                f"{max(0.0, 1 - bound / _seconds(other)):.0%}",
            )
        )
    heads = (
        "layer",
        "best other way",
        "it (ms)",
        "fused step (ms)",
        "the fused step",
        "bound (ms)",
        "saved at most",
    )
    note = (
        f"\n\nThe bound: products at the measured peak or memory at the measured speed, and "
        f"{1e6 * BARRIER:.0f} µs (assumed) for the barrier of each step."
    )
    return _table(heads, lines) + note if lines else ""


def _missing(rows: list[Row]) -> str:
    lines: Callable[[Row], str] = lambda row: (  # noqa: E731
        f"- {name_of(row)}: {row['status']}"
        + (f" ({row['error'].splitlines()[0]})" if row.get("error") else "")
    )
    return "\n".join(lines(row) for row in rows if row["status"] != "done")
