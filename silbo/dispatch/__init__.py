"""Names to listeners, inside one process."""
