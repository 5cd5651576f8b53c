"""The serving command: a page to type into, and a JSON API.

    python -m s2s.serve --workdir runs/mine --port 8000

Decides what the command line means, and when the process stops. Must not know a route (server).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from s2s.flags import add_model_flags


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.serve", description="Translates for a browser and for programs, over HTTP."
    )
    add_model_flags(parser)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="TCP port (8000); 0: a free one")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets everybody in, by themselves unasked",
    )
    limits = parser.add_argument_group("limits: what asks for more is refused")
    limits.add_argument("--max-pieces", type=int, default=200, metavar="N", help="pieces in a sentence (200)")
    limits.add_argument("--max-sentences", type=int, default=256, metavar="N", help="in a request (256)")
    limits.add_argument("--max-bytes", type=int, default=1 << 20, metavar="N", help="in a request (1 MiB)")
    limits.add_argument("--max-beam", type=int, default=10, metavar="K", help="widest beam (10)")
    limits.add_argument(
        "--max-waiting", type=int, default=1024, metavar="N", help="sentences that wait (1024)"
    )
    limits.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for an answer (60)")
    parser.add_argument(
        "--batch-sentences", type=int, default=32, metavar="N", help="most sentences in a batch (32)"
    )
    args = parser.parse_args(argv)
    for name in ("max_pieces", "max_sentences", "max_bytes", "max_beam", "max_waiting", "batch_sentences"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port {args.port} must be from 0 to 65535")
    if args.timeout <= 0:
        parser.error(f"--timeout {args.timeout:g} must be above 0")
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        print(f"s2s: {error.name} is not installed: pip install 's2s[serve]'", file=sys.stderr)
        return 2

    import signal
    import threading

    from s2s.serve.application import create_app
    from s2s.serve.model import Model
    from s2s.serve.openapi import Limits

    asked = Limits(
        args.max_bytes, args.max_sentences, args.max_pieces, args.max_waiting, args.timeout, args.max_beam
    )
    try:
        model = Model(args.workdir, args.combine, asked, args.batch_sentences)
    except (ValueError, OSError) as error:
        print(f"s2s: {error}", file=sys.stderr)
        return 2
    stop = threading.Event()
    warm = threading.Thread(target=model.warm_up, args=(stop,), name="warm-up")
    warm.start()
    config = uvicorn.Config(
        create_app(model, asked, most=args.batch_sentences),
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=False,
        server_header=False,
        # As long as an answer may take: what was accepted is finished.
        timeout_graceful_shutdown=int(args.timeout) + 1,
    )
    server = uvicorn.Server(config)
    # uvicorn sends itself the signal that stopped it once more when all is done: that is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    finally:
        stop.set()
        warm.join()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
