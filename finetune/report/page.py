"""The frame of all pages: style, head, tables. Content of runs and data is always escaped, never markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune.formatting import in_html

STYLE = """
:root { color-scheme: light dark; --text: #1c1f23; --back: #fff; --dim: #59636e; --line: #d0d7de; --soft: #f6f8fa;
  --good: #0b6b33; --good-back: #d3f5de; --bad: #a3271a; --bad-back: #fde3df; --odd: #7a5200; --odd-back: #fbedc8;
  --one: #1f6fb8; --two: #c8570c; --three: #1b8a5a; --four: #8d46b0; --five: #b3235f; --six: #5f6b76; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --back: #14171a; --dim: #9aa4ae; --line: #363d44;
  --soft: #1c2125; --good: #8ee6ab; --good-back: #123d22; --bad: #ffab9e; --bad-back: #4a1812; --odd: #f2cd7c;
  --odd-back: #43330f; --one: #6bb1f2; --two: #f39a53; --three: #5fce9b; --four: #cf97ea; --five: #f283ae;
  --six: #a8b2bb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .25rem; } h3 small, .dim { color: var(--dim); } p { margin: .25rem 0; }
a { color: var(--one); } .dim { font-size: .9rem; }
pre { font: .8125rem/1.55 ui-monospace, monospace; padding: .75rem; margin: 0; border: 1px solid var(--line);
  border-radius: 6px; background: var(--soft); overflow-x: auto; }
.row { white-space: pre-wrap; }
.scroll { overflow-x: auto; } .numbers { overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { color: var(--dim); font-weight: 400; } tbody th { font-weight: 400;
  min-width: 7.5rem; }
table.numbers td, table.numbers thead th + th { text-align: right; }
table.numbers :is(td, th):last-child { padding-right: 0; }
@media print { * { print-color-adjust: exact; } body { max-width: none; padding: 0; font-size: 10pt; } }
"""


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A complete HTML document.

    Args:
        title: Plain text.
        style: CSS in addition to `STYLE`.
        body: HTML.
    """
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # A second line of defence behind escaping: the browser refuses scripts and requests.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{in_html(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def section(title: str, *body: str) -> str:
    """A heading with content; "" without content."""
    content = "\n".join(filter(None, body))
    return f"<section><h2>{in_html(title)}</h2>\n{content}</section>" if content else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table of plain text whose first column names its rows; "" without rows.

    Args:
        head: Titles of the columns.
        rows: Cells.
        numbers: Whether the other columns are numbers, which are aligned right.
    """
    if not rows:
        return ""
    titles = "".join(f'<th scope="col">{in_html(title)}</th>' for title in head)
    lines = [
        f'<tr><th scope="row">{in_html(name)}</th>{"".join(f"<td>{in_html(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    ]
    kind = ' class="numbers"' if numbers else ""
    top = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table{kind}>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def collapsible(summary: str, content: str, printed: bool = False) -> str:
    """A collapsed section; with `printed` it is expanded in print."""
    kind = ' class="printed"' if printed else ""
    return f"<details{kind}><summary>{in_html(summary)}</summary>\n{content}</details>"
