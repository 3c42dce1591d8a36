"""Commands and queries, each with its one handler."""
