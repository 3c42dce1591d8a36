"""Control characters of a foreign text, written as escapes before the text goes to a terminal or into a log."""

from __future__ import annotations

__all__ = ["escape_controls"]


def escape_controls(text: str) -> str:
    """Return a text as one line that can't steer a terminal: line ends, escape sequences, and marks of direction as escapes."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == " " else repr(character)[1:-1] for character in text
    )
