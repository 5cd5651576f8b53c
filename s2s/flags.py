"""Flags that commands share: which models, which pairs, and how to search.

Decides what these flags mean. Must not import a library that takes long to load before the
flags are read: help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
from typing import IO, TYPE_CHECKING, Any

from s2s.config import Config, SearchConfig

if TYPE_CHECKING:
    from s2s.data.corpora import Corpus
    from s2s.data.vocab import Vocabularies


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `asked_models` reads."""
    parser.add_argument(
        "--workdir",
        required=True,
        nargs="+",
        metavar="W",
        help="the model's work directory; several, or one that holds replicas, decode as an ensemble",
    )
    parser.add_argument(
        "--combine",
        choices=("mean", "geometric"),
        default="mean",
        help="an ensemble's probabilities: the members' arithmetic or geometric mean",
    )


def asked_models(args: argparse.Namespace) -> tuple[Config, Vocabularies, Any, Any]:
    """Opens the models that the command line names, as `s2s.ensemble.open_models`.

    Raises:
      WorkdirError: one of them cannot be opened, or they do not fit together.
    """
    from s2s.ensemble import open_models

    return open_models(args.workdir, args.combine)


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `search_config` reads."""
    group = parser.add_argument_group("search (the run's own configuration where not given)")
    group.add_argument("--beam", type=int, metavar="K", help="hypotheses kept; 1 is greedy")
    group.add_argument("--sample", action="store_true", help="draw instead of searching; --beam draws a line")
    group.add_argument("--length-penalty", type=float, metavar="A", help="GNMT's alpha")
    group.add_argument("--coverage-penalty", type=float, metavar="B", help="GNMT's beta")
    group.add_argument("--min-length", type=int, metavar="N", help="fewest target tokens")
    group.add_argument(
        "--max-length-factor", type=float, metavar="F", help="longest output: F * source ids + extra"
    )
    group.add_argument("--max-length-extra", type=int, metavar="N", help="tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="sampling temperature")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest P of probability")
    group.add_argument("--batch-sentences", type=int, metavar="N", help="sentences searched at a time")


def search_config(args: argparse.Namespace, cfg: SearchConfig, *, nbest: int = 1) -> SearchConfig:
    """The run's search settings with the command line's changes.

    Raises:
      ValueError: a value cannot work.
    """
    if nbest < 1:
        raise ValueError(f"--nbest {nbest} must be at least 1")
    names = [item.name for item in dataclasses.fields(SearchConfig) if item.name != "name"]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if args.sample:
        given["name"] = "sample"
        given.setdefault("beam", 1)
    elif "beam" in given or nbest > 1:
        given.setdefault("beam", max(nbest, cfg.beam))
        given["name"] = "greedy" if given["beam"] == 1 else "beam"
    chosen = dataclasses.replace(cfg, **given)
    if chosen.name == "greedy":
        chosen = dataclasses.replace(chosen, beam=1)
    for name in ("beam", "batch_sentences", "max_length_extra"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(chosen, name)} must be at least 1")
    for name in ("length_penalty", "coverage_penalty", "min_length", "max_length_factor", "top_k"):
        if getattr(chosen, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(chosen, name)} must not be negative")
    if chosen.temperature <= 0 or not 0 < chosen.top_p <= 1:
        raise ValueError("--temperature must be above 0, and --top-p in (0, 1]")
    if nbest > chosen.beam:
        raise ValueError(f"--nbest {nbest} needs --beam {nbest} or more, not {chosen.beam}")
    return chosen


def add_pairs_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `asked_pairs` reads."""
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--part", choices=("train", "dev", "test"), default="test", help="of the run's own data"
    )
    group.add_argument("--input", metavar="SPEC", help="other pairs: a prefix, .tsv, .jsonl or tfds:NAME")
    group.add_argument("--source", help="suffix, column or field of the source in --input")
    group.add_argument("--target", help="the same for the target; several references by commas")


def asked_pairs(args: argparse.Namespace, cfg: Config) -> Corpus:
    """Opens the pairs that the command line names.

    Raises:
      CorpusError: they cannot be read.
    """
    from s2s.data import corpora

    if not args.input:
        return corpora.open_corpus(cfg.data, args.part, seed=cfg.run.seed)
    source, target = args.source or cfg.data.source, args.target or cfg.data.target
    return corpora.open_pairs(args.input, source=source, target=target, cache=cfg.data.cache)


def open_text(path: str, mode: str) -> IO[bytes]:
    """Opens a file as bytes, through gzip where its name ends in .gz."""
    return gzip.open(path, mode) if path.endswith(".gz") else open(path, mode)  # type: ignore[return-value]
