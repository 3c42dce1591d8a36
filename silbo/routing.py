"""Which events leave, and to which address."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal

from silbo.errors import AddressInvalid, MessageRefused, RouteConflict
from silbo.names import EventName, Key, compile_pattern

__all__ = ["Route", "Routes", "check_address", "routing_key"]

CACHED_NAMES: Final = 1024
"""Names whose route is kept ready. Names can be dynamic, so the cache is emptied when it is full."""

_ADDRESS = re.compile(r"[A-Za-z0-9._-]+")


def check_address(address: object, what: str = "an address") -> str:
    """The same address, once it is known to be one: ASCII letters, digits and ``. _ -``.

    Raises:
        AddressInvalid: it is not; the text calls it ``what``.
    """
    if isinstance(address, str) and _ADDRESS.fullmatch(address):
        return address
    raise AddressInvalid(address, what)


@dataclass(frozen=True, slots=True)
class Route:
    """What the bridge does with the events of a name, or of every name that a pattern matches.

    Attributes:
        pattern: A name, or a pattern: ``*`` is one segment, ``**`` any number.
        kind: Lets plain events, and those of a host's own classes, leave as this kind. Events that have a kind keep
            theirs, and a domain event never leaves.
        to: The address in place of the broker's default, as ``orders``.
        key: The routing key in place of the event name's own: an attribute's name, or a function of the event.

    Raises:
        AddressInvalid: ``to`` is no address.
        NameInvalid: the pattern has a ``*`` that is not a whole segment.
        ValueError: there is no such kind.
    """

    pattern: str | EventName[Any]
    _: KW_ONLY
    kind: Literal["notification", "ecst"] | None = None
    to: str | None = None
    key: Key | None = None

    def __post_init__(self) -> None:
        compile_pattern(str(self.pattern))
        if self.kind not in ("notification", "ecst", None):
            raise ValueError(f'kind is "notification", "ecst" or None, not {self.kind!r}')
        if self.to is not None:
            check_address(self.to)


class Routes:
    """Routes in order: the first that matches a name wins.

    Raises:
        RouteConflict: two have the same pattern, so that the second would never be used.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        known: dict[str, Route] = {}
        if isinstance(routes, Route | str):
            raise TypeError(f"routes is a list of Route objects: [{routes!r}]")
        for route in routes:
            if not isinstance(route, Route):
                raise TypeError(f"routes takes Route objects, as Route({route!r}), not {route!r}")
            pattern = str(route.pattern)
            if pattern in known:
                raise RouteConflict(pattern, repr(known[pattern]), repr(route))
            known[pattern] = route
        self._routes = [(compile_pattern(pattern), route) for pattern, route in known.items()]
        self._cache: dict[str, Route | None] = {}

    def match(self, name: str) -> Route | None:
        """The route of an event name; None where none matches."""
        if not self._routes:
            return None
        try:
            return self._cache[name]
        except KeyError:
            found = next((route for pattern, route in self._routes if pattern.fullmatch(f"{name}.")), None)
            if len(self._cache) >= CACHED_NAMES:
                self._cache.clear()
            self._cache[str(name)] = found
            return found


def routing_key(event: object, name: str, key: Key | None) -> str | None:
    """The key of an event as text; None where there is no key, or its value is None.

    Raises:
        MessageRefused: the attribute is missing or the function raised.
    """
    if key is None:
        return None
    try:
        value = key(event) if callable(key) else getattr(event, key)
        return None if value is None else str(value)
    except Exception as error:  # the key may be any function of the host's
        what = f"its key function {key!r} raised {error!r}" if callable(key) else f"no attribute for its key: {error}"
        raise MessageRefused(name, what, field=None if callable(key) else key) from error
