"""HTML that can't forget to escape: every text is escaped on its way into an element."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Final

from silbo._control_characters import escape_controls

__all__ = ["Markup", "element", "join"]

EMPTY: Final = frozenset({"br", "meta"})
"""Elements that have no end tag."""


class Markup(str):
    """HTML that is to be kept as it is. Only :func:`element` and :func:`join` make it of texts that come from outside."""

    __slots__ = ()


def join(*children: object) -> Markup:
    """Return children as HTML, one after another.

    Args:
        children: Markup stays as it is, and None is left out. The items of lists, tuples and generators are children, too. The
            text of every other object is escaped, and its control characters are written as escapes, those that turn the
            direction of a text included.
    """
    return Markup("".join(map(_to_markup, children)))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        tag: Its name.
        children: As for :func:`join`.
        attributes: Their values are escaped; None and False leave the attribute out, True leaves its value out. An underscore in a
            name is a hyphen, and one at the end is left out: ``class_="number"``, ``aria_label="Sections"``.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{_escape(value)}"')
    begin = f"<{' '.join(words)}>"
    return Markup(begin) if tag in EMPTY else Markup(f"{begin}{join(*children)}</{tag}>")


def _to_markup(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if not isinstance(child, str) and isinstance(child, Iterable):
        return join(*child)
    return _escape(child)


def _escape(value: object) -> str:
    return escape(escape_controls(str(value)))
