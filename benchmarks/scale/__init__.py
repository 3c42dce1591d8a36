"""Measured points beyond one process: one stream, an outbox's relays, its table."""
