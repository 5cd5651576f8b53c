"""The explaining command: one sentence through one or more models, as a page, pictures or a film.

    python -m s2s.explain --workdir runs/mine --text "Anna kauft ein Buch." --output page.html

Decides what is asked for. Must not know what is told of a model (explanation) nor how it looks (page,
picture, film).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2s.flags import search_config


def parse_links(text: str) -> list[tuple[int, int]]:
    """An alignment in Pharaoh format, source-target word numbers from 0.

    Raises:
      ValueError: something in it is no pair of numbers.

    >>> parse_links("0-0 1-2")
    [(0, 0), (1, 2)]
    """
    links = []
    for pair in text.split():
        found = re.fullmatch(r"(\d+)-(\d+)", pair)
        if not found:
            raise ValueError(
                f"--gold-alignment: {pair!r} is no link; write source-target words, as in 0-0 1-2"
            )
        links.append((int(found[1]), int(found[2])))
    return links


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.explain",
        description="Shows what trained models do with a sentence, step by step, by their own numbers.",
    )
    parser.add_argument(
        "--workdir", required=True, nargs="+", metavar="W", help="work directories; several are compared"
    )
    parser.add_argument("--text", help="the source sentence")
    parser.add_argument("--reference", help="its true translation, to be read word by word as well")
    parser.add_argument(
        "--gold-alignment", metavar="LINKS", help='true word alignment, "0-0 1-2": source-target, from 0'
    )
    parser.add_argument("--beam", type=int, default=5, metavar="K", help="hypotheses kept (5); 1 is greedy")
    parser.add_argument("--length-penalty", type=float, metavar="A", help="GNMT's alpha")
    parser.add_argument("--coverage-penalty", type=float, metavar="B", help="GNMT's beta")
    parser.add_argument("--output", metavar="F.html", help="the page: one file that needs nothing else")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the page")
    parser.add_argument("--data", metavar="F.json", help="the same as data")
    parser.add_argument("--heatmap", metavar="F", help="where the (first) model looks: .png, .svg or .pdf")
    parser.add_argument("--walk", metavar="F", help="the (first) model at work: .gif or .mp4")
    parser.add_argument("--curve", metavar="F", help="learning curves: .png, .svg or .pdf; needs no text")
    parser.add_argument("--metric", default="loss", help="that --curve shows (loss)")
    args = parser.parse_args(argv)
    try:
        _check(args)
        gold = parse_links(args.gold_alignment) if args.gold_alignment is not None else None
        if args.text is not None:
            _write(args, _explained(args, gold))
        if args.curve:
            _curve(args)
    except (ValueError, OSError) as error:
        print(f"s2s: {error}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before a model is loaded."""
    endings = {
        "output": (".html", ".htm"),
        "data": (".json",),
        "heatmap": (".png", ".svg", ".pdf"),
        "walk": (".gif", ".mp4"),
        "curve": (".png", ".svg", ".pdf"),
    }
    asked = {name: getattr(args, name) for name in endings if getattr(args, name)}
    if not asked:
        flags = ", ".join(f"--{name}" for name in endings)
        raise ValueError(f"nothing asked for: give --output page.html, or any of {flags}")
    for name, path in asked.items():
        if Path(path).suffix.lower() not in endings[name]:
            raise ValueError(f"--{name} {path} must end in {' or '.join(endings[name])}")
        if args.text is None and name != "curve":
            raise ValueError(f'--{name} needs a sentence: give --text "..."')
    for name in ("text", "reference"):
        given = getattr(args, name)
        if given is not None:
            # What the terminal could not decode is replaced, as lines are that translate reads.
            text = given.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\0", " ")
            setattr(args, name, text)


def _explained(args: argparse.Namespace, gold: list[tuple[int, int]] | None) -> dict[str, Any]:
    from s2s.data.corpora import cache_folder
    from s2s.explain.explanation import Explainer, explain
    from s2s.infra import compilation
    from s2s.workdir import Workdir

    explainers = []
    args.sample = False
    for path in args.workdir:
        cfg, vocabs, graphdef, params = Workdir(path).load()
        search = search_config(args, cfg.search)
        compilation.keep_programs(cache_folder(cfg.data.cache))
        name = Path(path).resolve().name
        explainers.append(Explainer(cfg, vocabs, graphdef, params, search, workdir=name))
    return explain(explainers, args.text, reference=args.reference, gold=gold)


def _write(args: argparse.Namespace, data: dict[str, Any]) -> None:
    from s2s.explain.packing import as_json

    model = data["models"][0]
    if args.data:
        _into(args.data).write_text(as_json(data), encoding="utf-8", errors="surrogatepass")
    if args.output:
        from s2s.explain.page import render

        _into(args.output).write_text(render(data, args.language), encoding="utf-8")
    if args.heatmap or args.walk:
        from s2s.infra.picture import without_font

        boxes = without_font([*model["source"]["tokens"], *model["walks"][0]["tokens"]])
        if boxes:
            print(f"s2s: no installed font has {boxes}: drawn as boxes", file=sys.stderr)
    if args.heatmap:
        _heatmap(args.heatmap, model)
    if args.walk:
        from s2s.infra.film import film

        film(args.walk, _scene(model))


def _heatmap(path: str, model: dict[str, Any]) -> None:
    """Where the model looks: over the true words where an alignment of them is given."""
    from s2s.explain.packing import unpack
    from s2s.infra.picture import attention_picture

    gold = model["gold"] or {"walk": 0, "links": []}
    walk = model["walks"][gold["walk"]]
    if "weights" not in walk["steps"][0]:
        raise ValueError(
            f"--heatmap: {model['workdir']} has attention {model['attention']!r}, which looks nowhere"
        )
    weights = [unpack(step["weights"]) for step in walk["steps"]]
    tokens = model["source"]["tokens"], walk["tokens"]
    attention_picture(path, *tokens, weights, hard=walk["hard"], gold=gold["links"])


def _curve(args: argparse.Namespace) -> None:
    from s2s.infra.picture import curve_picture
    from s2s.workdir import Workdir

    runs = {Path(path).resolve().name: Workdir(path).metrics for path in args.workdir}
    curve_picture(
        args.curve, runs if len(args.workdir) > 1 else Workdir(args.workdir[0]).metrics, args.metric
    )


def _scene(model: dict[str, Any]) -> Any:
    import numpy as np

    from s2s.explain.packing import unpack
    from s2s.infra.film import Scene

    walk = model["walks"][0]
    steps = walk["steps"]
    return Scene(
        source=model["source"]["tokens"],
        target=walk["tokens"],
        memory=unpack(model["encoder"]["memory"]),
        states=np.stack([unpack(step["layers"][-1]["state"]) for step in steps]),
        weights=np.stack([unpack(step["weights"]) for step in steps]) if "weights" in steps[0] else None,
        likeliest=[[(choice["token"], choice["prob"]) for choice in step["top"]] for step in steps],
        both_ways=model["bidirectional"],
        bridge=model["bridge"],
        context="context" in steps[0],
    )


def _into(path: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


if __name__ == "__main__":
    sys.exit(main())
