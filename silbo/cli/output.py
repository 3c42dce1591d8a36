"""Lines on stdout and stderr: text for people, JSON for programs. A text can't steer the terminal, whatever data is in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from silbo._control_characters import escape_controls

__all__ = ["StdoutClosed", "print_as_it_is", "print_json", "print_line", "print_note", "print_outcome"]


class StdoutClosed(Exception):
    """The program that reads stdout has closed it."""


def print_line(text: str) -> None:
    """Print a text as one line on stdout, its control characters escaped, and flush it.

    Raises:
        StdoutClosed: nobody reads stdout any more.
    """
    print_as_it_is(escape_controls(text))


def print_as_it_is(text: str) -> None:
    """Print lines on stdout, and flush them: a text with line ends or colours of our own, its data escaped before.

    Raises:
        StdoutClosed: nobody reads stdout any more.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise StdoutClosed from error


def print_note(text: str) -> None:
    """Print a text as one line on stderr, its control characters escaped, and flush it."""
    sys.stderr.write(f"{escape_controls(text)}\n")
    sys.stderr.flush()


def print_json(fields: Mapping[str, Any]) -> None:
    """Print a JSON object as one line on stdout; times in ISO 8601, UTC.

    Raises:
        StdoutClosed: nobody reads stdout any more.
    """
    print_line(json.dumps(fields, default=_to_json))


def print_outcome(fields: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the outcome of a command: the fields for a program, or the text for people.

    Raises:
        StdoutClosed: nobody reads stdout any more.
    """
    if as_json:
        print_json(fields)
    else:
        print_line(text)


def _to_json(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} can't be written as JSON")
