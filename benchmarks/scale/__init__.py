"""Beyond one process: measured points of a stream, an outbox and its table; a model that adds them up, and a simulation."""
