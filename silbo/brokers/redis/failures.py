"""The failures of a connection: it is lost, or Redis refuses a command."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["Lost", "OneOfMany", "Refused", "Unreached"]

# Errors of a server that refuses every write.
_OF_SERVER: Final = frozenset(
    {
        "ASK",
        "BUSY",
        "CLUSTERDOWN",
        "LOADING",
        "MASTERDOWN",
        "MISCONF",
        "MOVED",
        "NOAUTH",
        "NOREPLICAS",
        "READONLY",
        "TRYAGAIN",
        "UNKILLABLE",
    }
)
# Errors of a cluster whose slots move, or one of whose masters is away. A read that waits gets UNBLOCKED when its node is demoted.
_ELSEWHERE: Final = frozenset({"ASK", "CLUSTERDOWN", "MOVED", "TRYAGAIN", "UNBLOCKED"})
_find_hidden_code = re.compile(r"^ERR Error running script .*@user_script: ?\d+: -?([A-Z]+) ").match


class Lost(Exception):
    """The connection broke, or could not be made. A command sent over it may have been carried out."""


class Refused(Exception):
    """Redis answered with an error: the command was not carried out. The text is Redis's own."""

    @property
    def code(self) -> str:
        """The code, as ``READONLY``: the first word of the text, or the one that Redis 6.2 hides in a script's error."""
        text = str(self)
        hidden = _find_hidden_code(text)
        return hidden[1] if hidden else text.partition(" ")[0]

    @property
    def is_demotion(self) -> bool:
        """True if the server takes no writes any more: a new connection may lead to the new master."""
        return self.code in ("READONLY", "MASTERDOWN")

    @property
    def is_elsewhere(self) -> bool:
        """True if another node of the cluster serves the keys, or will in a moment."""
        return self.code in _ELSEWHERE

    @property
    def is_of_server(self) -> bool:
        """True if the server refuses every write for now, not only this one."""
        return self.code in _OF_SERVER


class OneOfMany(Refused):
    """The server is one of several nodes of a cluster, and the connection is for a single server: most keys are not there."""


class Unreached(Refused):
    """There was no connection to the node of a cluster that serves the keys: the command was not carried out."""

    @property
    def is_of_server(self) -> bool:
        """True: nothing that would go to that node is carried out."""
        return True
