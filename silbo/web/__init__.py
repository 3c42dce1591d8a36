"""The page of a running host: its names and listeners, last dispatches, streams, groups, outbox and dead letters."""

from silbo.web.page_app import PageApp

__all__ = ["PageApp"]
