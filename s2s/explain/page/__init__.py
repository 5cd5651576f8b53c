"""The page: a model's work on one sentence as a single HTML file that needs nothing else.

Decides how the file is put together: the data as text that cannot end its element, style and
programs by their hashes, and a policy under which nothing is fetched. How the page looks and
moves stands in the files beside this one. Must not know how the data came about; the
JavaScript reads it by the names that `s2s.explain` writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

# The order in which they are read: each uses what stands before it.
SCRIPTS = (
    "words.js",
    "chinese.js",
    "decode.js",
    "draw.js",
    "stages.js",
    "equation.js",
    "scene.js",
    "flow.js",
    "panel.js",
    "walk.js",
    "matrix.js",
    "tree.js",
    "whatif.js",
    "compare.js",
    "main.js",
)
LANGUAGES = ("en", "zh")

# What could end or open an element inside <script>, or a line inside a JavaScript string.
_UNSAFE = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(data: dict[str, Any] | None, language: str = "en", *, connect: str = "'none'") -> str:
    """One HTML file that shows ``data``, with everything it needs inside.

    Args:
      data: an explanation, of numbers, strings, lists and dicts; None: a page that waits for
        ``window.s2s.show(data)``.
      language: "en" or "zh", in which the page begins; the reader may switch.
      connect: what the page's programs may fetch from, as the policy's connect-src says it:
        "'none'", or "'self'" for a page with a place to type into, which asks its server's ``v1/translate``
        and ``v1/explain``.

    Returns:
      The file's text.

    Raises:
      ValueError: an unknown language, data with numbers that JSON has no word for, or a policy with
        characters that none has.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is none of {', '.join(LANGUAGES)}")
    if not re.fullmatch(r"[A-Za-z0-9':/.* _-]+", connect):
        raise ValueError(f"connect={connect!r} is no list of sources: say \"'none'\" or \"'self'\"")
    style = _read("page.css")
    # Whoever may fetch has a server to ask.
    scripts = SCRIPTS if connect == "'none'" else (*SCRIPTS, "live.js")
    script = '"use strict";\n(() => {\n' + "\n".join(_read(name) for name in scripts) + "\n})();\n"
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "language": {"en": "en", "zh": "zh-Hans"}[language],
        "policy": policy,
        "style": style,
        "data": as_text(data),
        "script": script,
    }
    # One pass: what a part says is never read as a place for another.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("template.html"))


def as_text(data: Any) -> str:
    """JSON that may stand inside any HTML element and in any script."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Lone surrogates have no UTF-8; as escapes they do.
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return re.sub("[<>&\u2028\u2029]", lambda found: _UNSAFE[found[0]], text)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
