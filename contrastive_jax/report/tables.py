"""Labels of runs, and tables: shared by all sections of the page."""

from collections.abc import Iterable, Sequence
from typing import Any

from contrastive_jax.figures.style import COLOURS
from contrastive_jax.report import Run
from contrastive_jax.report.markup import Html, join, tag


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def label(runs: Sequence[Run], i: int, more: str = '') -> Html:
    """A run's name and colour where there are several, and something more."""
    if len(runs) == 1:
        return join(more)
    swatch = tag('i', class_='swatch', style=f'background:{colour(i)}')
    return join(swatch, ' ', ', '.join(filter(None, [runs[i].name, more])))


def heads(runs: Sequence[Run]) -> list[Html]:
    """The head of a table with a column for every run; one run needs none."""
    return [Html(), *(label(runs, i) for i in range(len(runs)))] if len(runs) > 1 else []


def table(head: Sequence[Any], rows: Iterable[Iterable[Any]], class_: str = '') -> Html:
    """A table whose first column names the rows; cells that are <td> or <th> already stay."""

    def cell(content: Any, name: str) -> Html:
        ready = isinstance(content, Html) and content.startswith(('<td', '<th'))
        return Html(content) if ready else tag(name, content)

    body = [tag('tr', (cell(c, 'td' if i else 'th') for i, c in enumerate(row))) for row in rows]
    top = tag('thead', tag('tr', (cell(c, 'th') for c in head))) if head else None
    return tag('div', tag('table', top, tag('tbody', body), class_=class_ or None), class_='wide')
