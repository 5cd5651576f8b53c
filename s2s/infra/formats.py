"""One document, told as plain text, Markdown, LaTeX or a page of HTML.

Decides how headings, remarks, tables and drawings look in each. Must not know what they are about. All
text that comes in is text when it comes out: no name or value can become markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from s2s.infra import report


class Table(NamedTuple):
    """A table of texts; ``notes`` stand below it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


class Drawing(NamedTuple):
    """A picture as SVG text (`s2s.infra.charts`) with what it shows in words."""

    caption: str
    svg: str


class Document(NamedTuple):
    """A title, tables, drawings (shown in HTML alone) and remarks at the end."""

    title: str
    tables: Sequence[Table]
    drawings: Sequence[Drawing] = ()
    remarks: Sequence[str] = ()


def printable(text: str) -> str:
    """Text on one line, in which nothing acts on a terminal or breaks a file."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def text(document: Document) -> str:
    """For a terminal."""
    blocks = [printable(document.title)]
    for table in document.tables:
        laid = report.table([list(map(printable, row)) for row in table.rows], table.headers)
        blocks.append("\n".join([printable(table.title), "", laid, *map(printable, table.notes)]))
    blocks.append("\n".join(map(printable, document.remarks)))
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown(document: Document) -> str:
    """GitHub's Markdown."""
    blocks = [f"# {_markdown(document.title)}"]
    for table in document.tables:
        # A bar is escaped by the table's layout.
        rows = [[_markdown(cell) for cell in row] for row in table.rows]
        blocks += [
            f"## {_markdown(table.title)}",
            report.table(rows, [_markdown(header) for header in table.headers], markdown=True),
            *(_markdown(note).replace("|", "\\|") for note in table.notes),
        ]
    blocks += [_markdown(remark).replace("|", "\\|") for remark in document.remarks]
    return "\n\n".join(blocks) + "\n"


def latex(document: Document) -> str:
    """Tables for a document that loads booktabs."""
    blocks = [f"% {printable(document.title)}\n% \\usepackage{{booktabs}}"]
    for table in document.tables:
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in table.rows]
        notes = " ".join(map(_latex, table.notes))
        blocks.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"  \centering",
                    rf"  \begin{{tabular}}{{{'l' * len(table.headers)}}}",
                    r"    \toprule",
                    "    " + " & ".join(map(_latex, table.headers)) + r" \\",
                    r"    \midrule",
                    *("    " + line for line in lines),
                    r"    \bottomrule",
                    r"  \end{tabular}",
                    rf"  \caption{{{_latex(table.title)}. {notes}}}".replace(". }", ".}"),
                    r"\end{table}",
                ]
            )
        )
    blocks.append("\n".join(f"% {printable(remark)}" for remark in document.remarks))
    return "\n\n".join(block for block in blocks if block) + "\n"


def page(document: Document) -> str:
    """One page that needs nothing else: no script, no font, no network."""
    title = _html(document.title)
    body = [f"<h1>{title}</h1>"]
    for table in document.tables:
        head = "".join(f"<th scope=col>{_html(header)}</th>" for header in table.headers)
        rows = "\n".join(
            "<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
        )
        body += [
            f"<section><h2>{_html(table.title)}</h2>",
            f"<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>",
            *(f"<p>{_html(note)}</p>" for note in table.notes),
            "</section>",
        ]
    for drawing in document.drawings:
        body.append(f"<figure>{drawing.svg}<figcaption>{_html(drawing.caption)}</figcaption></figure>")
    if document.remarks:
        body.append("<ul>" + "".join(f"<li>{_html(remark)}</li>" for remark in document.remarks) + "</ul>")
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(body))


def _html(text: str) -> str:
    return html.escape(printable(text))


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#&~$])", r"\\\1", printable(text))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "−": r"$-$",
    # At the beginning of a row a bracket would be read as the space that \\ may take.
    "[": "{[}",
    "]": "{]}",
} | {letter: "\\" + letter for letter in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --line: #c9d0d8; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e8ec; --line: #414a54; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; border-block: 2px solid var(--ink); font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; white-space: nowrap; }
thead { border-bottom: 1px solid var(--ink); }
tbody tr + tr { border-top: 1px solid var(--line); }
figure { margin: 2rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, li, p { max-width: 46rem; overflow-wrap: anywhere; }
"""
