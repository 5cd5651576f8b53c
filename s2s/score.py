"""The scoring command: what the model thinks of given pairs.

    python -m s2s.score --workdir runs/mine --input pairs.tsv --source 0 --target 1

Writes one JSON line a pair: log-probability in nats, of the whole and of every token,
and on request the attention; and alignments in Pharaoh format. Must not search.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s2s.flags import add_model_flags, add_pairs_flags, asked_models, asked_pairs, open_text

if TYPE_CHECKING:
    from s2s.likelihood import Score


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.score", description="Log-probabilities and attention of given pairs."
    )
    add_model_flags(parser)
    add_pairs_flags(parser)
    parser.add_argument("--output", default="-", help="JSON lines, one a pair; - is standard output")
    parser.add_argument("--attention", action="store_true", help="with the attention matrix [target][source]")
    parser.add_argument("--alignments", metavar="F", help="Pharaoh-format alignments, one line a pair")
    args = parser.parse_args(argv)

    import numpy as np

    from s2s.data import corpora, encode
    from s2s.infra import compilation, sharding
    from s2s.likelihood import score_corpus
    from s2s.translator import links

    with contextlib.ExitStack() as files:
        output, alignments = sys.stdout.buffer, None
        try:
            cfg, vocabs, structure, params = asked_models(args)
            corpus = asked_pairs(args, cfg)
            if args.output != "-":
                output = files.enter_context(open_text(args.output, "wb"))
            if args.alignments:
                alignments = files.enter_context(open(args.alignments, "w", encoding="utf-8"))
        except (ValueError, OSError) as error:
            print(f"s2s: {error}", file=sys.stderr)
            return 2
        compilation.keep_programs(corpora.cache_folder(cfg.data.cache))
        mesh = sharding.local_mesh()
        encoded = encode.encode_corpus(corpus, vocabs, max_source=None, max_target=None, cache=cfg.data.cache)
        scores: list[Score | None] = [None] * len(corpus)
        for found in score_corpus(structure, sharding.replicate(params, mesh), encoded, cfg, mesh):
            scores[found.record] = found
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
