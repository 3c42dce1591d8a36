"""Nodes of a cluster that can't be reached, told at the end of an answer about the others."""

from __future__ import annotations

from collections.abc import Sequence

from silbo.cli.output import print_json, print_note
from silbo.operations.redis import AwayNode

__all__ = ["AwayNodes", "away_to_fields", "show_away"]


class AwayNodes:
    """The nodes that could not be reached; each once. Is called with them: see :data:`~silbo.operations.redis.AwayHook`."""

    def __init__(self) -> None:
        self._nodes: dict[str, AwayNode] = {}

    def __call__(self, node: AwayNode) -> None:
        """Note a node."""
        self._nodes.setdefault(node.node, node)

    def show(self, *, as_json: bool) -> int:
        """Print a line for each node, as JSON on stdout too; return the exit code: 1 if there is one."""
        if as_json:
            for fields in away_to_fields(list(self._nodes.values())):
                print_json(fields)
        return show_away(list(self._nodes.values()))


def away_to_fields(nodes: Sequence[AwayNode]) -> list[dict[str, str]]:
    """Return the fields of each node, for JSON."""
    return [{"away": node.node, "error": node.error} for node in nodes]


def show_away(nodes: Sequence[AwayNode]) -> int:
    """Print a line for each node on stderr; return the exit code: 1 if there is one, for its groups stand still."""
    for node in nodes:
        print_note(f"silbo: {node}")
    return 1 if nodes else 0
