"""An outbox's store in an SQLite file."""

from silbo.stores.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]
