"""One self-contained page: tables, pictures inside, a style sheet for phones, dark rooms, paper."""

import html as escaping
from collections.abc import Sequence

from kfac_laplace.report.panels import Panel
from kfac_laplace.summary import HEADINGS, Line, rows_of_html

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f8fa; --ink: #1f2328;
  --faint: #8c959f; --soft: #57606a; --rule: #d0d7de; --good: #1a7f37; --bad: #b42318;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #0d1117; --card: #161b22;
  --ink: #e6edf3; --faint: #6e7681; --soft: #9da7b3; --rule: #30363d; --good: #56d364;
  --bad: #ff7b72; --c0: #58a6ff; --c1: #ff9a5c; --c2: #3fc79a; --c3: #e3a0c6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .scroll p { font-size: .85rem; }
small, .soft { color: var(--soft); } small { font-size: .8rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; font-weight: normal; overflow-wrap: normal; }
thead th { vertical-align: bottom; font-weight: 600; } .note { font-weight: normal; }
.short[hidden] { display: none; }
th:first-child { text-align: left; } tbody td small { white-space: nowrap; }
small.better { color: var(--good); font-weight: 600; }
small.worse { color: var(--bad); font-weight: 600; }
.pictures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem;
  break-inside: avoid; }
figure h3 { margin: 0 0 .5rem; font-size: 1rem; } figure svg { width: 100%; height: auto;
  display: block; }
figcaption { margin-top: .5rem; font-size: .85rem; color: var(--soft); }
.layers td, .layers th { white-space: nowrap; }
@media (max-width: 40rem) { body { padding: .75rem; } th, td { padding: .3rem .25rem; }
  table { font-size: .8rem; } small { font-size: .7rem; } .note { display: none; }
  .long { display: none; } .short[hidden] { display: inline; }
  tbody td small { white-space: normal; } figure { padding: .5rem; } }
@media print { body { max-width: none; padding: 0; } figure { background: none; padding: 0; }
  .pictures { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; } tr {
  break-inside: avoid; } }
"""


def html(
    head: str,
    said: Sequence[str],
    tables: Sequence[tuple[str, str]],
    pictures: Sequence[tuple[Panel, str]],
    layers: Sequence[Line],
) -> str:
    """The page as text.

    Args:
        head: the posterior in a line.
        said: lines under it; empty ones are left out.
        tables: titles, and tables as HTML.
        pictures: panels, and their drawings as SVG.
        layers: groups of the posterior.
    """
    title = "How the posterior predicts"
    under = "".join(f'<p class="soft">{escaping.escape(one)}</p>' for one in (head, *said) if one)
    parts = [f"<h1>{title}</h1>{under}"]
    for name, table in tables:
        parts.append(f"<h2>{escaping.escape(name)}</h2>{_scrolling(name, table)}")
    parts.append("<h2>Pictures</h2>" + _pictures([one for one in pictures if not one[0].labels]))
    if layers:
        rows = rows_of_html([layer.cells for layer in layers], HEADINGS)
        by_layer = _pictures([one for one in pictures if one[0].labels])
        table = f'<div class="layers">{_scrolling("Layers", rows)}</div>'
        parts.append(f"<h2>Layers</h2>{by_layer}{table}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _scrolling(name: str, table: str) -> str:
    """A table that scrolls on its own where it is too wide, by keyboard as well."""
    label = escaping.escape(name, quote=True)
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _pictures(pictures: Sequence[tuple[Panel, str]]) -> str:
    """Drawings side by side where there is room."""
    drawn = "".join(_figure(panel, drawing) for panel, drawing in pictures)
    return f'<div class="pictures">{drawn}</div>'


def _figure(panel: Panel, drawing: str) -> str:
    """A drawing with its title and its words, which are those of the picture as well."""
    title, says = escaping.escape(panel.title), escaping.escape(panel.says, quote=True)
    return (
        f'<figure><h3>{title}</h3><div role="img" aria-label="{title}. {says}">{drawing}</div>'
        f"<figcaption>{says}</figcaption></figure>"
    )
