"""HTML that cannot be broken by what is put into it: whatever is not `Html` is escaped."""

import html
from collections.abc import Iterable
from typing import Any


class Html(str):
    """Markup."""


def join(*parts: Any) -> Html:
    """Parts one after another: Html as it is, iterables of parts, anything else as escaped text."""
    return Html(''.join(map(_one, parts)))


def _one(part: Any) -> str:
    if part is None or isinstance(part, Html):
        return part or ''
    if isinstance(part, Iterable) and not isinstance(part, str):
        return join(*part)
    return html.escape(str(part))


def tag(element: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Of attributes' names 'class_' is 'class', and '_' is '-'; None leaves one out."""
    written = ''.join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    void = element in ('img', 'meta', 'br')
    return Html(f'<{element}{written}>' + ('' if void else f'{join(*children)}</{element}>'))
