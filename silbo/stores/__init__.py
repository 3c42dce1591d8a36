"""Where an outbox keeps its messages."""
