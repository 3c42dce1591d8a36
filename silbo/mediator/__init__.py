"""Commands and queries, each with one handler."""
