"""Scoring: what the model thinks of given pairs (forced decoding).

    python -m s2s.score --workdir runs/mine --input pairs.tsv --source 0 --target 1

Writes one JSON line a pair: log-probability in nats, of the whole and of every token,
and on request the attention; and alignments in Pharaoh format. Must not search.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from s2s.batch import Batch
from s2s.config import Config
from s2s.data import corpora, encode, pipeline, plan
from s2s.evaluate import add_pairs_flags, asked_pairs
from s2s.infra import compilation, sharding
from s2s.learn import step as step_lib
from s2s.learn.loss import token_log_probs
from s2s.translate import links, open_text


class Score(NamedTuple):
    """One pair under the model.

    Attributes:
      record: the pair's number in its corpus.
      source_ids, target_ids: EOS last.
      token_log_probs: nats, one a target token.
      align_TS: attention from each target token to each source piece.
    """

    record: int
    source_ids: list[int]
    target_ids: list[int]
    token_log_probs: np.ndarray
    align_TS: np.ndarray


def forced(graphdef: Any, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every target token and the attention behind it.

    Returns:
      token_log_prob_BT in nats, 0 on pads; align_BTS.
    """
    model = step_lib.merge(graphdef, params)
    output_BTH, align_BTS = model(batch)
    return token_log_probs(output_BTH, model.softmax(), batch.target_BT, batch.target_mask_BT), align_BTS


def score_corpus(
    graphdef: Any, params: Any, encoded: encode.Encoded, cfg: Config, mesh: jax.sharding.Mesh
) -> Iterator[Score]:
    """Scores every pair, batch by batch of similar lengths: not in corpus order."""
    layout = plan.make_plan(
        encoded.source_lengths,
        encoded.target_lengths,
        batch_tokens=cfg.data.batch_tokens,
        max_shapes=cfg.data.max_shapes,
        rows_multiple=sharding.rows_multiple(mesh),
        seed=0,
        shuffle=False,
    )
    compiled = sharding.jit_rows_step(functools.partial(forced, graphdef), mesh)
    for batch in pipeline.batches(encoded, layout, epoch=0):
        token_BT, align_BTS = sharding.to_host(compiled(params, sharding.to_global(batch, mesh)))
        for row, index in enumerate(batch.index_B.tolist()):
            if index < 0:
                continue
            source, target = int(batch.source_length_B[row]), int(batch.target_length_B[row])
            yield Score(
                index,
                batch.source_BS[row, :source].tolist(),
                batch.target_BT[row, :target].tolist(),
                token_BT[row, :target],
                align_BTS[row, :target, :source],
            )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.score", description="Log-probabilities and attention of given pairs."
    )
    parser.add_argument("--workdir", required=True, help="the model's work directory")
    add_pairs_flags(parser)
    parser.add_argument("--output", default="-", help="JSON lines, one a pair; - is standard output")
    parser.add_argument("--attention", action="store_true", help="with the attention matrix [target][source]")
    parser.add_argument("--alignments", metavar="F", help="Pharaoh-format alignments, one line a pair")
    args = parser.parse_args(argv)

    from s2s.workdir import Workdir

    try:
        cfg, vocabs, graphdef, params = Workdir(args.workdir).load()
        corpus = asked_pairs(args, cfg)
    except (ValueError, OSError) as error:
        print(f"s2s: {error}", file=sys.stderr)
        return 2
    compilation.keep_programs(corpora.cache_folder(cfg.data.cache))
    mesh = sharding.local_mesh()
    encoded = encode.encode_corpus(corpus, vocabs, max_source=None, max_target=None, cache=cfg.data.cache)
    scores: list[Score | None] = [None] * len(corpus)
    for found in score_corpus(graphdef, sharding.replicate(params, mesh), encoded, cfg, mesh):
        scores[found.record] = found
    with contextlib.ExitStack() as files:
        output, alignments = sys.stdout.buffer, None
        if args.output != "-":
            output = files.enter_context(open_text(args.output, "wb"))
        if args.alignments:
            alignments = files.enter_context(open(args.alignments, "w", encoding="utf-8"))
        for number, score in enumerate(scores):
            if score is None:
                continue
            line: dict[str, Any] = {
                "line": corpus[number]["line"],
                "log_prob": round(float(score.token_log_probs.sum(dtype=np.float64)), 5),
                "source": vocabs.source.tokens(score.source_ids),
                "target": vocabs.target.tokens(score.target_ids),
                "token_log_probs": [round(float(value), 5) for value in score.token_log_probs],
            }
            if args.attention:
                line["attention"] = [[round(float(weight), 4) for weight in row] for row in score.align_TS]
            output.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
            if alignments is not None:
                alignments.write(links(score.source_ids, score.target_ids, score.align_TS, vocabs) + "\n")
        output.flush()
    for told in corpora.left_out(corpus):
        print(told, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
