"""Credentials that are renewed while a connection lives, as tokens of Entra ID or IAM."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, TypeAlias

from redis.credentials import CredentialProvider

from silbo._reports import RateLimitedLog

__all__ = ["Credentials", "ShownCredentials"]

logger = logging.getLogger(__name__)

LOOK_EVERY: Final = 60.0
"""The provider is asked for its credentials every 60 seconds, for each connection that is used. Tokens live longer than that:
15 minutes those of IAM, an hour those of Entra ID, which redis-entraid renews when 70 % of it are over."""
ANSWER_WITHIN: Final = 1.0
"""The provider has 1 second to answer while the connection goes on with the former credentials: commands wait for it."""

Credentials: TypeAlias = "tuple[str] | tuple[str, str]"
"""A password, or a user and a password."""


class ShownCredentials(CredentialProvider):
    """The program's provider, and the credentials that one connection was opened with.

    The provider is asked again and again, not told to call back: ``on_next`` of a ``StreamingCredentialProvider`` keeps the
    last callback alone, which is that of the program's own client.

    Args:
        provider: The program's provider.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._is_synchronous = (
            getattr(type(provider), "get_credentials_async", None) is CredentialProvider.get_credentials_async
        )
        self._shown: Credentials | None = None
        self._asked_at = float("inf")
        self._log = RateLimitedLog(logger, every=LOOK_EVERY)

    async def get_credentials_async(self) -> Credentials:
        """Return the credentials for a new connection: redis-py calls this."""
        self._shown = await self._ask()
        return self._shown

    @property
    def is_due(self) -> bool:
        """True if it is time to ask the provider again."""
        return asyncio.get_running_loop().time() - self._asked_at >= LOOK_EVERY

    async def find_renewed(self) -> Credentials | None:
        """Return the provider's credentials if the connection has not shown them yet, else None. None if it can't tell them now."""
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                found = await self._ask()
        except Exception as error:  # noqa: BLE001  # the provider is the program's
            self._log.write("the credential provider failed; a connection goes on with its former credentials", error)
            return None
        return None if found == self._shown else found

    def note_shown(self, credentials: Credentials) -> None:
        """Note that the connection has shown these."""
        self._shown = credentials

    def note_not_renewed(self, error: Exception) -> None:
        """Note that the server does not take the renewed credentials yet: they are shown again a minute later."""
        text = "renewed credentials were refused, and a connection goes on with its former ones: %s"
        self._log.write(text, None, str(error) or "no answer")

    async def _ask(self) -> Credentials:
        self._asked_at = asyncio.get_running_loop().time()
        if self._is_synchronous:  # redis-py's own way to call it logs a warning each time
            found: Credentials = self._provider.get_credentials()
        else:
            found = await self._provider.get_credentials_async()
        return found
