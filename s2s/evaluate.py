"""Evaluation: how well a trained model does on a corpus with references.

    python -m s2s.evaluate --workdir runs/mine --part test --beam 5

Decides which figures are reported and of which pairs. Must not know how an output is
found (translate) nor how a metric is computed (`s2s.learn.metrics`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from s2s.config import METRICS, Config
from s2s.data import corpora, encode, pipeline, plan
from s2s.data.vocab import Vocabularies
from s2s.infra import compilation, report, sharding
from s2s.learn import metrics as metrics_lib
from s2s.learn import step as step_lib
from s2s.translate import Translation, Translator, add_search_flags, describe, search_config

# Each shape is a compilation, and a development part is seen too seldom to earn many.
_MAX_SHAPES = 3


class Likelihood:
    """Teacher-forced loss on one corpus, ready to be measured again and again.

    Args:
      graphdef: the model's structure.
      encoded: the corpus as ids; empty ones are not allowed.
      cfg: the run's configuration, for batch sizes.
      mesh: devices to spread rows over.
    """

    def __init__(self, graphdef: Any, encoded: encode.Encoded, cfg: Config, mesh: jax.sharding.Mesh):
        self.encoded, self.mesh = encoded, mesh
        self.plan = plan.make_plan(
            encoded.source_lengths,
            encoded.target_lengths,
            batch_tokens=cfg.data.batch_tokens,
            max_shapes=min(_MAX_SHAPES, cfg.data.max_shapes),
            rows_multiple=sharding.rows_multiple(mesh),
            seed=0,
            shuffle=False,
        )
        self._step = sharding.jit_eval_step(step_lib.make_eval_step(graphdef), mesh)

    def __call__(self, params: Any) -> dict[str, float]:
        """Measures ``loss`` (nats a target token), ``perplexity`` and ``token_accuracy`` (%)."""
        shared = sharding.spans_processes(self.mesh)
        sums = [
            self._step(params, sharding.to_global(batch, self.mesh))
            for batch in pipeline.batches(
                self.encoded,
                self.plan,
                epoch=0,
                process_index=sharding.process_index() if shared else 0,
                process_count=sharding.process_count() if shared else 1,
            )
        ]
        host = sharding.to_host(sums)
        tokens = max(1.0, float(sum(part.tokens for part in host)))
        nats = float(sum(np.float64(part.nll) for part in host)) / tokens
        correct = float(sum(part.correct for part in host)) / tokens
        # Beyond this a double overflows; an untrained or broken model gets there.
        perplexity = math.exp(nats) if nats < 700 else math.inf
        return {"loss": nats, "perplexity": perplexity, "token_accuracy": 100 * correct}


def default_metrics(kind: str) -> tuple[str, ...]:
    """Text metrics worth showing for a vocabulary kind, most telling first."""
    if kind == "symbols":
        return ("word_error_rate", "symbol_error_rate", "exact_match")
    return ("bleu", "chrf", "ter", "exact_match")


def text_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], vocabs: Vocabularies, names: Iterable[str]
) -> dict[str, float]:
    """Scores outputs against references; one list of references a hypothesis."""
    units = metrics_lib.Units(symbols=vocabs.target.symbols, words=vocabs.target.words)
    return {name: metrics_lib.TEXT_METRICS[name](hypotheses, references, units) for name in names}


def by_length(
    lengths: Sequence[int], score: Callable[[list[int]], dict[str, float]], *, width: int | None = None
) -> list[dict[str, float | str]]:
    """Scores pairs in classes of source length (Luong et al. 2015, figure 6).

    Args:
      lengths: source pieces of every pair.
      score: metrics of the pairs with these numbers.
      width: lengths in a class; None: 5, or 10 where the longest is above 40.
    """
    width = width or (10 if max(lengths) > 40 else 5)
    classes: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        classes.setdefault((max(length, 1) - 1) // width, []).append(number)
    return [
        {"length": f"{index * width + 1}-{(index + 1) * width}", "pairs": len(members), **score(members)}
        for index, members in sorted(classes.items())
    ]


class Evaluation(NamedTuple):
    """What `evaluate` found: scores by name, the outputs, and scores by source length."""

    scores: dict[str, float]
    translations: list[Translation]
    lengths: list[dict[str, float | str]]


def evaluate(
    translator: Translator,
    params: Any,
    corpus: corpora.Corpus,
    names: Sequence[str],
    *,
    progress: str | None = None,
) -> Evaluation:
    """Translates a corpus and scores the outputs.

    Args:
      translator: the model and how to search.
      params: its parameters.
      corpus: sources with references.
      names: text metrics.
      progress: a label to show progress under.
    """
    pairs = list(corpus)
    translations = translator(params, [pair["source"] for pair in pairs], progress=progress)
    outputs = [translation.text for translation in translations]
    references = [pair["targets"] for pair in pairs]

    def score(numbers: list[int]) -> dict[str, float]:
        return text_scores(
            [outputs[n] for n in numbers], [references[n] for n in numbers], translator.vocabs, names
        )

    lengths = [len(translation.source_ids) - 1 for translation in translations]
    return Evaluation(score(list(range(len(pairs)))), translations, by_length(lengths, score))


def add_pairs_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `asked_pairs` reads."""
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--part", choices=("train", "dev", "test"), default="test", help="of the run's own data"
    )
    group.add_argument("--input", metavar="SPEC", help="other pairs: a prefix, .tsv, .jsonl or tfds:NAME")
    group.add_argument("--source", help="suffix, column or field of the source in --input")
    group.add_argument("--target", help="the same for the target; several references by commas")


def asked_pairs(args: argparse.Namespace, cfg: Config) -> corpora.Corpus:
    """Opens the pairs that the command line names.

    Raises:
      CorpusError: they cannot be read.
    """
    if not args.input:
        return corpora.open_corpus(cfg.data, args.part, seed=cfg.run.seed)
    source, target = args.source or cfg.data.source, args.target or cfg.data.target
    return corpora.open_pairs(args.input, source=source, target=target, cache=cfg.data.cache)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.evaluate", description="Scores a trained model on pairs with references."
    )
    parser.add_argument("--workdir", required=True, help="the model's work directory")
    add_pairs_flags(parser)
    parser.add_argument("--metrics", help=f"text metrics by commas: {', '.join(metrics_lib.TEXT_METRICS)}")
    parser.add_argument("--by-length", action="store_true", help="also by source length")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", metavar="F", help="keep the outputs, a line a pair")
    add_search_flags(parser)
    args = parser.parse_args(argv)

    from s2s.workdir import Workdir

    try:
        cfg, vocabs, graphdef, params = Workdir(args.workdir).load()
        names = args.metrics.split(",") if args.metrics else list(default_metrics(cfg.data.vocab.kind))
        for name in names:
            if name not in metrics_lib.TEXT_METRICS:
                raise ValueError(f"--metrics {name!r} is none of {', '.join(metrics_lib.TEXT_METRICS)}")
        corpus = asked_pairs(args, cfg)
        translator = Translator(graphdef, vocabs, search_config(args, cfg.search))
    except (ValueError, OSError) as error:
        print(f"s2s: {error}", file=sys.stderr)
        return 2
    compilation.keep_programs(corpora.cache_folder(cfg.data.cache))
    params = sharding.replicate(params, translator.mesh)
    encoded = encode.encode_corpus(corpus, vocabs, max_source=None, max_target=None, cache=cfg.data.cache)
    scores = Likelihood(graphdef, encoded, cfg, translator.mesh)(params)
    found = evaluate(translator, params, corpus, names, progress="evaluating")
    scores |= found.scores
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.writelines(translation.text.replace("\n", " ") + "\n" for translation in found.translations)
    signature = metrics_lib.signatures([pair["targets"] for pair in corpus], names)
    result: dict[str, Any] = {
        "corpus": corpus.name,
        "pairs": len(corpus),
        "search": describe(translator.cfg),
        "scores": scores,
        "signatures": signature,
        "rejected_lines": corpus.rejected,
    }
    if args.by_length:
        result["by_length"] = found.lengths
    if args.json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
        return 0
    print(f"{corpus.name}: {len(corpus)} pairs, {describe(translator.cfg)}")
    for told in corpora.left_out(corpus):
        print(told)
    print(report.table([[label(name), value] for name, value in scores.items()], ["metric", "value"]))
    if args.by_length:
        rows = [list(row.values()) for row in found.lengths]
        print("\n" + report.table(rows, ["source length", "pairs", *map(label, names)]))
    for name, text in signature.items():
        print(f"{name}: {text}")
    return 0


def label(name: str) -> str:
    """A metric's name for people, with its unit and an arrow to the better side."""
    labels = {
        "loss": "loss (nats/token)",
        "token_accuracy": "token accuracy (%)",
        "bleu": "BLEU",
        "chrf": "chrF",
        "ter": "TER",
        "exact_match": "exact match (%)",
        "symbol_error_rate": "symbol error rate (%)",
        "word_error_rate": "word error rate (%)",
    }
    arrow = "" if name not in METRICS else " ↑" if METRICS[name] else " ↓"
    return labels.get(name, name) + arrow


if __name__ == "__main__":
    sys.exit(main())
