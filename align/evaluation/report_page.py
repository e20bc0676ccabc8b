"""Parts that reports are made of, as HTML; what is called text is escaped here."""

from collections.abc import Sequence
from html import escape
from typing import Any

from align.evaluation.report_style import STYLE

_FEW = 5


def html_page(title: str, body: str) -> str:
    """A page without scripts that fetches nothing.

    Args:
        title: Text.
        body: HTML.
    """
    # The policy forbids scripts and requests, should any text ever get past the escaping.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def figure(image: str, lines: Sequence[str], *, best: bool = False) -> str:
    """A picture (HTML) with lines of HTML below it; framed if it is the best."""
    kind = "picture best" if best else "picture"
    return f'<figure class="{kind}">{image}<figcaption>{"".join(lines)}</figcaption></figure>'


def picture_row(figures: Sequence[str]) -> str:
    """Figures beside each other; larger ones if they are few."""
    few = " few" if len(figures) <= _FEW else ""
    return f'<div class="pictures{few}">{"".join(figures)}</div>'


def grouped_table(head: str, rows: Sequence[tuple[str, str, str]], caption: str) -> str:
    """A table of (group, method, HTML of the cells), with a line above each group.

    Args:
        head: HTML of the headings after the first one.
        rows: In order.
        caption: Text.
    """
    lines, last = [], None
    for group, method, cells in rows:
        if group != last:
            lines.append(f'<tr><th scope="rowgroup" colspan="20" class="soft">{escape(group)}</th></tr>')
            last = group
        lines.append(f'<tr><th scope="row">{escape(method)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr><th scope="col">method</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, the first one among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
