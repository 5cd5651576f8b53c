"""The judge: how well a model does on a corpus with references, while it trains and when it is done.

Decides which figures are reported, of which pairs, when, by which search, and which sentence is
drawn. Must not know how a model learns, how an output is found (translator) nor how a metric is
computed (`s2s.learn.metrics`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from s2s.config import METRICS, Config
from s2s.data import corpora, encode
from s2s.data import vocab as vocab_lib
from s2s.data.vocab import Vocabularies
from s2s.ensemble import members, open_models
from s2s.infra import distributed, picture, sharding
from s2s.learn import metrics as metrics_lib
from s2s.likelihood import Likelihood
from s2s.translator import Translation, Translator, describe
from s2s.workdir import Workdir


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


class Judge:
    """Measures a model on dev while it trains, and on dev and test when it is done.

    Args:
      cfg: the run's configuration.
      graphdef: the model's structure.
      vocabs: its vocabularies.
      parts: the corpora there are, of "dev" and "test".
      mesh: devices that losses are measured on; every process decodes on its own.
    """

    def __init__(
        self,
        cfg: Config,
        graphdef: Any,
        vocabs: Vocabularies,
        parts: Mapping[str, corpora.Corpus],
        mesh: jax.sharding.Mesh,
    ):
        self._cfg, self._vocabs = cfg, vocabs
        self._names = default_metrics(cfg.data.vocab.kind)
        if cfg.run.metric in metrics_lib.TEXT_METRICS and cfg.run.metric not in self._names:
            self._names = (cfg.run.metric, *self._names)
        self._searches = [
            Translator(graphdef, vocabs, dataclasses.replace(cfg.search, name="greedy", beam=1))
        ]
        if cfg.search.name != "greedy":
            self._searches.append(Translator(graphdef, vocabs, cfg.search, seed=cfg.run.seed))
        self._parts = parts
        self._losses = {part: Likelihood(graphdef, self._encode(parts[part]), cfg, mesh) for part in parts}

    def dev_scores(self, params: Any) -> dict[str, float]:
        """Dev loss, and text metrics by greedy search where one of them chooses the model; {} without dev."""
        if "dev" not in self._parts:
            return {}
        scores, metric = self._losses["dev"](params), self._cfg.run.metric
        if metric in metrics_lib.TEXT_METRICS:
            dev, greedy = self._parts["dev"], self._searches[0]
            count = min(self._cfg.run.eval_sentences or len(dev), len(dev))
            # Evenly spread, as corpora are often sorted.
            chosen = [dev[int(n)] for n in np.linspace(0, len(dev) - 1, count).astype(int)]
            outputs = greedy(self._local(params), [pair["source"] for pair in chosen], progress="dev")
            scores |= text_scores(
                [output.text for output in outputs],
                [pair["targets"] for pair in chosen],
                self._vocabs,
                dict.fromkeys([metric, *self._names[:2]]),
            )
        return scores

    def final_scores(
        self, params: Any, attention_file: Path | None, outputs: Path | None = None
    ) -> dict[str, Any]:
        """Scores every part by greedy search and by the configured one.

        Args:
          params: the finished model.
          attention_file: where to draw the attention of one sentence; None: nowhere.
          outputs: a folder for what the model wrote, PART.SEARCH.jsonl each; None: not kept.

        Returns:
          "scores", a row a part and search, and sacreBLEU's "signatures".
        """
        rows: list[dict[str, Any]] = []
        signatures: dict[str, str] = {}
        local = self._local(params)
        for part, corpus in self._parts.items():
            loss = self._losses[part](params)
            for translator in self._searches:
                search = describe(translator.cfg)
                found = evaluate(translator, local, corpus, self._names, progress=f"{part}, {search}")
                rows.append({"part": part, "pairs": len(corpus), "search": search, **loss, **found.scores})
                if outputs is not None:
                    _keep(outputs / f"{part}.{translator.cfg.name}.jsonl", corpus, found.translations)
            signatures = metrics_lib.signatures([pair["targets"] for pair in corpus], self._names)
            if attention_file is not None:
                _draw(attention_file, found.translations)
        return {"scores": rows, "signatures": signatures}

    def _encode(self, corpus: corpora.Corpus) -> encode.Encoded:
        # No limit of length: what the run is judged by is judged whole.
        return encode.encode_corpus(
            corpus,
            self._vocabs,
            max_source=None,
            max_target=None,
            cache=self._cfg.data.cache,
            progress=distributed.is_main_process(),
        )

    def _local(self, params: Any) -> Any:
        return sharding.replicate(sharding.to_host(params), self._searches[0].mesh)


def record_ensemble(
    folders: Sequence[str | Path], into: Workdir, combination: str = "mean"
) -> dict[str, Any]:
    """Scores several models that answer as one, and keeps it where reports find it.

    Args:
      folders: their work directories; one that holds replicas stands for all of them.
      into: gets config.json (the first model's), vocab/, outputs/ and results.json, whose searches are
        called "ensemble of R, ...".
      combination: a name in `s2s.ensemble.COMBINATIONS`.

    Returns:
      The results.

    Raises:
      WorkdirError: there is no model in one of the folders, or their vocabularies differ.
      CorpusError: dev or test cannot be read.
    """
    cfg, vocabs, structure, params = open_models(folders, combination)
    parts = {
        part: corpora.open_corpus(cfg.data, part, seed=cfg.run.seed)
        for part in ("dev", "test")
        if corpora.has_part(cfg.data, part)
    }
    judge = Judge(cfg, structure, vocabs, parts, sharding.local_mesh())
    found = judge.final_scores(params, None, into.outputs)
    asked = describe(cfg.search)
    rows = [
        {**row, "search": f"ensemble of {members(structure, params)}, {asked}"}
        for row in found["scores"]
        if row["search"] == asked
    ]
    for part in parts:
        (into.outputs / f"{part}.{cfg.search.name}.jsonl").replace(into.outputs / f"{part}.ensemble.jsonl")
    if not into.vocab.exists():
        vocab_lib.save_vocabularies(vocabs, into.vocab)
    into.write_config(cfg)
    results = {"name": cfg.name, "members": [str(folder) for folder in folders], **found, "scores": rows}
    into.write_results(results)
    return results


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


def _keep(path: Path, corpus: corpora.Corpus, translations: Sequence[Translation]) -> None:
    """Writes a line a pair: source, references, output, and source pieces without EOS as "length"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    # Pairs of JSON lines may hold half a surrogate pair.
    with draft.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for pair, translation in zip(corpus, translations, strict=True):
            line = {
                "source": pair["source"],
                "references": list(pair["targets"]),
                "output": translation.text,
                "length": max(len(translation.source_ids) - 1, 0),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    draft.replace(path)


def _draw(path: Path, translations: Sequence[Translation]) -> None:
    """Draws the sentence of middling length whose output the model is surest of."""
    drawable = [t for t in translations if t.hypotheses and t.hypotheses[0].align_TS.any()]
    if not drawable:
        return
    lengths = sorted(len(t.source_ids) for t in drawable)
    middle = lengths[len(lengths) // 2]
    typical = [t for t in drawable if abs(len(t.source_ids) - middle) <= 3]
    chosen = max(typical, key=lambda t: t.hypotheses[0].log_prob / len(t.hypotheses[0].ids))
    picture.attention_picture(
        path, chosen.source_tokens, chosen.hypotheses[0].tokens, chosen.hypotheses[0].align_TS
    )
