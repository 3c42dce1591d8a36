"""The address of a database as errors show it."""

from __future__ import annotations

from typing import Final

from sqlalchemy import URL

__all__ = ["describe_url"]

SECRETS: Final = ("pass", "pwd", "secret", "token")
"""Parts of the names of options that hold a secret."""


def describe_url(url: URL) -> str:
    """Return a database's URL without its password, also if that is an option behind the ``?``, as drivers take it."""
    shown = {
        name: "***" if any(part in name.lower() for part in SECRETS) else value for name, value in url.query.items()
    }
    return url.set(query=shown).render_as_string(hide_password=True)
