"""The evaluating command: how well a trained model does on pairs with references.

    python -m s2s.evaluate --workdir runs/mine --part test --beam 5

Decides how figures are shown. Must not know how they come about (judge).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from s2s.config import TEXT_METRICS
from s2s.flags import (
    add_model_flags,
    add_pairs_flags,
    add_search_flags,
    asked_models,
    asked_pairs,
    search_config,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.evaluate", description="Scores a trained model on pairs with references."
    )
    add_model_flags(parser)
    add_pairs_flags(parser)
    parser.add_argument("--metrics", help=f"text metrics by commas: {', '.join(TEXT_METRICS)}")
    parser.add_argument("--by-length", action="store_true", help="also by source length")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", metavar="F", help="keep the outputs, a line a pair")
    parser.add_argument(
        "--record",
        metavar="F",
        help="score on dev and test, and keep it in F for s2s.report",
    )
    add_search_flags(parser)
    args = parser.parse_args(argv)

    if args.record:
        return _record(args)
    from s2s.data import corpora, encode
    from s2s.ensemble import members
    from s2s.infra import compilation, report, sharding
    from s2s.judge import default_metrics, evaluate, label
    from s2s.learn import metrics as metrics_lib
    from s2s.likelihood import Likelihood
    from s2s.translator import Translator, describe

    try:
        cfg, vocabs, structure, params = asked_models(args)
        names = args.metrics.split(",") if args.metrics else list(default_metrics(cfg.data.vocab.kind))
        for name in names:
            if name not in metrics_lib.TEXT_METRICS:
                raise ValueError(f"--metrics {name!r} is none of {', '.join(metrics_lib.TEXT_METRICS)}")
        corpus = asked_pairs(args, cfg)
        translator = Translator(structure, vocabs, search_config(args, cfg.search))
        # Before the work: a place where nothing can be written is told at once.
        output = open(args.output, "w", encoding="utf-8") if args.output else None
    except (ValueError, OSError) as error:
        print(f"s2s: {error}", file=sys.stderr)
        return 2
    compilation.keep_programs(corpora.cache_folder(cfg.data.cache))
    params = sharding.replicate(params, translator.mesh)
    encoded = encode.encode_corpus(corpus, vocabs, max_source=None, max_target=None, cache=cfg.data.cache)
    scores = Likelihood(structure, encoded, cfg, translator.mesh)(params)
    found = evaluate(translator, params, corpus, names, progress="evaluating")
    scores |= found.scores
    if output is not None:
        with output:
            output.writelines(
                translation.text.replace("\n", " ") + "\n" for translation in found.translations
            )
    signature = metrics_lib.signatures([pair["targets"] for pair in corpus], names)
    models = members(structure, params)
    result: dict[str, Any] = {
        "corpus": corpus.name,
        "pairs": len(corpus),
        "search": describe(translator.cfg),
        "models": models,
        "scores": scores,
        "signatures": signature,
        "rejected_lines": corpus.rejected,
    }
    if args.by_length:
        result["by_length"] = found.lengths
    if args.json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
        return 0
    together = f", ensemble of {models} models ({args.combine})" if models > 1 else ""
    print(f"{corpus.name}: {len(corpus)} pairs, {describe(translator.cfg)}{together}")
    for told in corpora.left_out(corpus):
        print(told)
    print(report.table([[label(name), value] for name, value in scores.items()], ["metric", "value"]))
    if args.by_length:
        rows = [list(row.values()) for row in found.lengths]
        print("\n" + report.table(rows, ["source length", "pairs", *map(label, names)]))
    for name, text in signature.items():
        print(f"{name}: {text}")
    return 0


def _record(args: argparse.Namespace) -> int:
    from s2s.infra import report
    from s2s.judge import label, record_ensemble
    from s2s.workdir import Workdir

    try:
        scores = record_ensemble(args.workdir, Workdir(args.record), args.combine)["scores"]
    except (ValueError, OSError) as error:
        print(f"s2s: {error}", file=sys.stderr)
        return 2
    names = [name for name in scores[0] if name not in ("part", "pairs", "search")] if scores else []
    rows = [[row["part"], row["pairs"], row["search"], *(row[name] for name in names)] for row in scores]
    print(report.table(rows, ["part", "pairs", "search", *map(label, names)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
