"""The process that measures: cells come in as lines of JSON, and so do figures go out.

Decides nothing. A cell that fails is answered by its error; one that takes too long is ended from outside,
with this process. Run by `benchmarks.gpu.__main__`, with the XLA flags in the environment.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any, TextIO


def main() -> None:
    """Answers standard input line by line; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import jax

    from benchmarks.gpu.measure import MEASURES

    device = jax.devices()[0]
    _answer(
        answers,
        {
            "device": device.device_kind,
            "platform": device.platform,
            "runtime": device.client.platform_version,
            "jax": jax.__version__,
            "jaxlib": jax.lib.__version__,
            "python": sys.version.split()[0],
        },
    )
    for line in sys.stdin:
        cell = json.loads(line)
        try:
            found = {"figures": MEASURES[cell["kind"]](**cell["options"])}
        except Exception as error:  # Whatever it is, the other cells are still worth measuring.
            found = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
        # What this cell held on the device would stand in the next one's way.
        gc.collect()
        _answer(answers, found)


def _answer(answers: TextIO, found: dict[str, Any]) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
