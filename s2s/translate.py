"""The translating command: text in, text out, with scores and alignments.

    python -m s2s.translate --workdir runs/mine < source.txt > output.txt

Decides how lines are read and written. Must not know how a line is translated (translator).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from s2s.flags import add_model_flags, add_search_flags, asked_models, open_text, search_config

if TYPE_CHECKING:
    from s2s.data.vocab import Vocabularies
    from s2s.translator import Translation

_CHUNK_LINES = 4096


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines as text: only newlines end one, and what is not UTF-8 is replaced, not dropped."""
    for line in stream:
        yield line.rstrip(b"\n").removesuffix(b"\r").decode("utf-8", errors="replace").replace("\0", " ")


def _chunks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.translate",
        description="Translates lines of text with a trained model, or several.",
    )
    add_model_flags(parser)
    parser.add_argument("--input", default="-", help="source lines (.gz too); - is standard input")
    parser.add_argument("--output", default="-", help="where outputs go; - is standard output")
    parser.add_argument(
        "--nbest",
        type=int,
        default=1,
        metavar="N",
        help="N lines a source line: number, rank, text, tab-separated",
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="score and log-probability (nats) before each text, tab-separated",
    )
    parser.add_argument(
        "--alignments", metavar="F", help="write alignments: soft ones to F.jsonl, else Pharaoh format"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    add_search_flags(parser)
    args = parser.parse_args(argv)

    from s2s.data.corpora import cache_folder
    from s2s.infra import compilation, sharding
    from s2s.translator import Translator

    with contextlib.ExitStack() as files:
        source, output, alignments = sys.stdin.buffer, sys.stdout.buffer, None
        try:
            cfg, vocabs, structure, params = asked_models(args)
            search = search_config(args, cfg.search, nbest=args.nbest)
            translator = Translator(structure, vocabs, search, n_best=args.nbest, seed=args.seed)
            if args.input != "-":
                source = files.enter_context(open_text(args.input, "rb"))
            if args.output != "-":
                output = files.enter_context(open_text(args.output, "wb"))
            if args.alignments:
                alignments = files.enter_context(open(args.alignments, "w", encoding="utf-8"))
        except (ValueError, OSError) as error:
            print(f"s2s: {error}", file=sys.stderr)
            return 2
        compilation.keep_programs(cache_folder(cfg.data.cache))
        params = sharding.replicate(params, translator.mesh)
        interactive = args.input == "-" and sys.stdin.isatty()
        soft = bool(args.alignments) and Path(args.alignments).suffix == ".jsonl"
        number = 0
        try:
            for chunk in _chunks(_lines(source), 1 if interactive else _CHUNK_LINES):
                for translation in translator(params, chunk, progress="translating"):
                    for line in _output_lines(translation, number, args.nbest, args.scores):
                        output.write(line.encode("utf-8") + b"\n")
                    if alignments is not None:
                        alignments.write(_alignment_line(translation, vocabs, soft) + "\n")
                    number += 1
                output.flush()
        except BrokenPipeError:
            # The reader (head, say) has seen enough; Python must not complain at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            # How one leaves a prompt.
            return 128 + signal.SIGINT
    return 0


def _output_lines(translation: Translation, number: int, nbest: int, scores: bool) -> list[str]:
    # A blank line has no hypothesis, but its place.
    found = [(one.score, one.log_prob, one.text) for one in translation.hypotheses[:nbest]] or [
        (0.0, 0.0, "")
    ]
    lines = []
    for rank, (score, log_prob, text) in enumerate(found, start=1):
        columns = [str(number + 1), str(rank)] if nbest > 1 else []
        if scores:
            columns += [f"{score:.4f}", f"{log_prob:.4f}"]
        # A generated newline would shift every line after it.
        lines.append("\t".join([*columns, text.replace("\n", " ").replace("\r", " ")]))
    return lines


def _alignment_line(translation: Translation, vocabs: Vocabularies, soft: bool) -> str:
    if not translation.hypotheses:
        return json.dumps({"source": [], "target": [], "alignment": []}) if soft else ""
    best = translation.hypotheses[0]
    if not soft:
        from s2s.translator import links

        return links(translation.source_ids, best.ids, best.align_TS, vocabs)
    rounded = [[round(float(weight), 4) for weight in row] for row in best.align_TS]
    return json.dumps(
        {"source": translation.source_tokens, "target": best.tokens, "alignment": rounded}, ensure_ascii=False
    )


if __name__ == "__main__":
    sys.exit(main())
