"""A publisher that stores messages, and the relay that sends them on."""
