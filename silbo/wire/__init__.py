"""Events to messages to bytes, and back."""
