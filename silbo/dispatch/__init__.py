"""The dispatcher and its listeners, inside one process."""
