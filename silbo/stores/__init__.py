"""Stores of an outbox: in memory, in an SQLite file, in the host's own database."""
