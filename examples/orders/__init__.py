"""Orders in a database, and the events about them: committed together, or not at all."""
