"""The registry of listeners: names and patterns, each with its listeners in running order."""

from __future__ import annotations

import inspect
import re
import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import chain, count, islice
from numbers import Real
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from weakref import ref

from silbo.dispatch.class_listeners import ClassListener, HandlerClass
from silbo.dispatch.in_thread import InThread
from silbo.dispatch.options import ErrorPolicy, Listener, Options, is_async
from silbo.dispatch.policy_listener import PolicyListener
from silbo.dispatch.running import ConfiguredListener
from silbo.dispatch.source import find_source
from silbo.errors import NameInvalid
from silbo.names import check_name_or_pattern, compile_pattern, is_pattern, is_too_long, may_have_policy, watch_names
from silbo.policy import combine_policies

if TYPE_CHECKING:
    from silbo.dispatch.owner import Owner
    from silbo.names import EventName
    from silbo.policy import Policy
    from silbo.protocols import Container

__all__ = [
    "FIRST",
    "LAST",
    "ListenerRegistry",
    "ListenerRow",
    "Registration",
    "container_of",
    "registry_of",
    "undo_registration",
]

_T = TypeVar("_T")

CACHED_NAMES: Final = 16_384
"""Most names whose listeners are kept ready, beside those that have listeners of their own. A program may make new names without
end, so a full cache forgets its oldest sixteenth."""
FORGOTTEN_NAMES: Final = 1024
"""Most names remembered that have no registration any more. After that, no name is said to have never been known."""


class _Edge(float):
    """A priority before or after every number, infinity included; a float, so that Whistle can sort it too."""

    def __lt__(self, other: object) -> bool:
        return self is not other and float.__lt__(self, 0.0)

    def __gt__(self, other: object) -> bool:
        return self is not other and float.__gt__(self, 0.0)

    def __le__(self, other: object) -> bool:
        return not self > other

    def __ge__(self, other: object) -> bool:
        return not self < other

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return "FIRST" if float.__lt__(self, 0.0) else "LAST"


FIRST: Final[float] = _Edge("-inf")
"""The priority that runs before every number."""
LAST: Final[float] = _Edge("inf")
"""The priority that runs after every number. A bridge runs after the other listeners that have it."""


def _rank(priority: object) -> Any:
    """Return a priority as an object that can be compared with every other priority.

    Raises:
        TypeError: The priority is not a number, or NaN.
    """
    if isinstance(priority, Decimal) and priority.is_finite():
        return Fraction(priority)  # Decimal and Fraction don't compare
    if isinstance(priority, Real) and priority == priority:
        return priority
    raise TypeError(f"a priority is a number, or silbo.FIRST or silbo.LAST, not {priority!r}")


class Registration:
    """A registration with a dispatcher, as ``add_listener`` returns it. A ``with`` block removes it at its end."""

    __slots__ = ("_remove",)

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove: Callable[..., None] = remove

    def remove(self) -> None:
        """Remove this registration, and no other of the same listener. May be called twice."""
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@dataclass(slots=True, eq=False, repr=False)
class _Entry(Registration):
    """One listener under one name or pattern. It is its own registration: another object would take a fifth more time.

    Attributes:
        rank: The priority, as it is compared.
        number: The number of the registration.
        run: The callable that a dispatch calls: the listener, or a wrapper of it.
        owner: The plugin that has added the listener; None if the host has.
        variants: The callables for names with a policy of their own, by that policy; None before the first.
    """

    name: Hashable
    listener: Listener | HandlerClass
    priority: float
    options: Options
    rank: Any
    number: int
    run: Listener
    _remove: Callable[[_Entry], None]  # one object for all entries of a registry
    owner: Owner | None
    variants: dict[Policy, Listener] | None = None

    def remove(self) -> None:
        self._remove(self)

    @property
    def place(self) -> tuple[Any, int, float, int]:
        """The order of a listener of a plugin: within its priority, its plugin's place comes first."""
        rank, lateness, number = _order(self)
        return rank, lateness, number if self.owner is None else self.owner.place, number


def undo_registration(dispatcher: Any, name: Any, listener: Listener, registration: object) -> None:
    """Undo a call of ``add_listener`` that returned ``registration``."""
    if isinstance(registration, Registration):
        registration.remove()
    else:  # a host's own add_listener returns None, as Whistle's does
        dispatcher.remove_listener(name, listener)


@dataclass(frozen=True, slots=True)
class ListenerRow:
    """One line of ``describe()``.

    Attributes:
        name: The name or pattern of the registration.
        listener: The listener that was given: a callable or a class.
        priority: Lower runs first.
        plugin: The plugin that has added the listener; else the module that defines it.
        defined_at: ``file:line`` of its code; empty if it has none.
        options: The options that have an effect and differ from the defaults.
    """

    name: Hashable
    listener: Listener | HandlerClass
    priority: float
    plugin: str
    defined_at: str
    options: dict[str, Any]


class ListenerRegistry:
    """The listeners of a dispatcher by name and pattern, in running order: by priority, then by order of registration.

    Lookups are cached by name. A change of a name drops what is known of it, a change of a pattern what is known of all names.

    Attributes:
        container: Makes the objects of listener classes.
        changes: How often listeners were added or removed.
        ready: For the dispatcher: the callables by name where a dispatch only has to call them. Dropped with the lookups.
    """

    def __init__(
        self,
        *,
        policy: ErrorPolicy = "raise",
        binding: bool = False,
        container: Container | None = None,
    ) -> None:
        self._policy: ErrorPolicy = policy
        self._binding = binding
        self.container = container
        self.changes = 0
        self.ready: dict[Any, tuple[Listener, ...]] = {}
        self._entries: dict[Hashable, list[_Entry]] = {}
        # The part of _entries whose names are patterns, each with its entries.
        self._patterns: dict[Hashable, tuple[re.Pattern[str], list[_Entry]]] = {}
        self._forgotten: set[int] | None = (
            set()
        )  # hashes of names that left _entries, so that no name is kept alive; None if too many
        self._numbers = count()
        self._policies: dict[Hashable, Policy] = {}  # of names
        self._from_plugins: set[str] = set()  # names whose policy was met in a constant that a plugin has used
        self._has_plugins = False  # True as soon as a plugin has added a listener
        self._adding = threading.local()  # owner: the plugin whose view adds a listener now
        self._cache: dict[Hashable, tuple[Listener, ...]] = {}
        self._bystanders: dict[Hashable, frozenset[int]] = {}
        self._bridged: dict[Hashable, bool] = {}
        self.has_bridges = False  # True as soon as a bridge was added
        self._remove_entry = self._discard
        watch_names(self)

    def add(self, name: Any, listener: Listener | HandlerClass, /, priority: float, options: Options) -> Registration:
        """Register a listener, for all dispatches that begin later."""
        run = ClassListener(listener, self.container) if isinstance(listener, type) else listener
        if not is_async(run):
            raise TypeError(
                f"a listener is an async function (or an object with an async __call__), not {listener!r}; "
                "write 'async def', or wrap what blocks: silbo.in_thread(function)"
            )
        if isinstance(run, ClassListener):
            listener = run.cls
        elif type(listener) is MethodType and _is_bridge(listener):
            self.has_bridges = True
        if self._binding:
            options = replace(options, on_error=None)
        rank = priority if type(priority) is int else _rank(priority)
        owner = self.adding if self._has_plugins else None
        # By position: with keywords a registration takes a quarter more time.
        entry = _Entry(name, listener, priority, options, rank, next(self._numbers), run, self._remove_entry, owner)
        policy = self._policy if options.on_error is None else options.on_error
        if owner is not None:
            if isinstance(run, InThread):
                entry.run = owner.share_threads(run)
            entry.run = self._under_policy(entry, owner.policy)
        elif policy != "raise" or options.once or options.timeout is not None or options.concurrent:
            entry.run = ConfiguredListener(run, options, policy, rank=rank, unregister=entry.remove)
        entries = self._entries.get(name)
        if not entries:  # else the name was checked before
            check_name_or_pattern(name)
            pattern = compile_pattern(name) if is_pattern(name) else None
            entries = self._entries.setdefault(name, [])
            entries.append(entry)
            if pattern is not None:
                self._patterns[name] = pattern, entries
        elif rank < entries[-1].rank or (rank is LAST and _order(entry) < _order(entries[-1])):
            insort(entries, entry, key=_order)
        else:
            entries.append(entry)
        self._changed(None if self._patterns and name in self._patterns else name)
        return entry

    @property
    def adding(self) -> Owner | None:
        """The plugin whose view adds a listener now, in this thread; None if the host adds it."""
        return getattr(self._adding, "owner", None)

    @contextmanager
    def adding_for(self, owner: Owner) -> Generator[None]:
        """Let the listeners that this thread adds within the block belong to a plugin; it removes only the plugin's own there."""
        around = self.adding
        self._has_plugins = True
        self._adding.owner = owner
        try:
            yield
        finally:
            self._adding.owner = around

    def next_place(self) -> float:
        """Return the place of a plugin that is loaded now, among the listeners of one priority."""
        return next(self._numbers)

    def set_policy(self, name: EventName[Any]) -> None:
        """Let the policy of a name hold for its dispatches, whoever dispatches it. The host's comes before a plugin's.

        Raises:
            NameInvalid: The name has another policy already.
        """
        policy = name.policy
        if policy is None:
            return
        known = self._policies.get(text := str(name))
        from_plugin = self.adding is not None
        if known is None or (known != policy and text in self._from_plugins and not from_plugin):
            self._policies[text] = policy
            self._changed()
        elif known != policy:
            raise NameInvalid(text, f"its policy is {known} already, and can't be {policy} too")
        if not from_plugin:
            self._from_plugins.discard(text)
        elif known is None:
            self._from_plugins.add(text)

    def awaits_policy(self, name: Hashable) -> bool:
        """Return True if there is a constant with a policy for a name, and this dispatcher has not met it yet."""
        return may_have_policy(name) and name not in self._policies

    def refresh(self) -> None:
        """Look up all listeners anew: a plugin has another place, or runs or ends."""
        self._changed()

    def remove(self, name: Hashable, listener: Listener | HandlerClass, /) -> None:
        """Remove every registration of a listener under a name, compared by ``==``. There may be none.

        If the view of a plugin removes, see :meth:`adding_for`, only those of the plugin are removed.

        Raises:
            ValueError: No listener was ever registered under this name.
        """
        if name not in self._entries:
            forgotten = self._forgotten
            if forgotten is None or hash(name) in forgotten:
                return
            raise ValueError(f"no listener was ever registered for {name!r}, so {listener!r} can't be removed")
        owner = self.adding
        self._entries[name][:] = [
            entry
            for entry in self._entries[name]
            if entry.run != listener or (owner is not None and entry.owner is not owner)
        ]
        if not self._entries[name]:
            self._patterns.pop(
                name, None
            )  # its name stays known, as in Whistle, and nothing is matched with it any more
        self._changed(None if is_pattern(name) else name)

    def get(self, name: Hashable, /) -> tuple[Listener, ...]:
        """Return the callables that a dispatch of a name runs, in order; for a pattern, those registered under the pattern."""
        try:
            return self._cache[name]
        except KeyError:
            if is_too_long(name):
                return ()  # nothing is registered for it, and it can't be dispatched
            changes = self.changes
            found = self.look_up(name)
            self.keep(self._cache, name, found, changes)
            return found

    def look_up(self, name: Hashable, /) -> tuple[Listener, ...]:
        """Return what :meth:`get` returns, past the cache."""
        entries = self._matching(name)
        if not entries:
            return ()
        if self._policies and (policy := self._policies.get(name)) is not None:
            return tuple([self._variant(entry, policy) for entry in entries])
        return tuple([entry.run for entry in entries])

    def keep(self, cache: dict[Any, _T], name: Hashable, found: _T, changes: int) -> None:
        """Keep in a cache what was found for a name.

        Args:
            cache: What was found, by name.
            name: The name.
            found: What was found.
            changes: The number of changes before the search: after another one it is not kept. Another thread may make one.
        """
        if len(cache) >= CACHED_NAMES + len(self._entries):
            for oldest in tuple(islice(cache, len(cache) // 16)):
                cache.pop(oldest, None)
        cache[name] = found
        if self.changes != changes:
            cache.pop(name, None)

    def has(self, name: Hashable | None = None, /) -> bool:
        """Return True if a dispatch of the name would run a listener; without a name, if there is any listener."""
        return any(self._entries.values()) if name is None else bool(self.get(name))

    def is_heard(self, name: Hashable, listeners: Iterable[Listener], /) -> bool:
        """Return True if one of the listeners that a dispatch of a name runs is meant for the name.

        Bridges are not, nor is what is registered for ``**`` alone: they hear a misspelt name as well.
        """
        bystanders = self._bystanders.get(name)
        if bystanders is None:
            changes = self.changes
            meant = [(run, entry) for run, entry in zip(self.get(name), self._matching(name), strict=False)]
            bystanders = frozenset(id(run) for run, _ in meant) - {
                id(run) for run, entry in meant if entry.name != "**" and not _is_bridge(entry.listener)
            }
            self.keep(self._bystanders, name, bystanders, changes)
        return any(id(listener) not in bystanders for listener in listeners)

    def is_bridged(self, name: Hashable) -> bool:
        """Return True if a dispatch of a name runs a bridge."""
        found = self._bridged.get(name)
        if found is None:
            changes = self.changes
            found = any(_is_bridge(entry.listener) for entry in self._matching(name))
            self.keep(self._bridged, name, found, changes)
        return found

    def entries_of(self, owner: Owner) -> list[ListenerRow]:
        """Return the listeners of a plugin."""
        return [_row(entry) for entry in chain.from_iterable(self._entries.values()) if entry.owner is owner]

    def rows_of_package(self, package: str) -> list[ListenerRow]:
        """Return the listeners that belong to no plugin, and that a package, or one of its modules, defines."""
        rows = [_row(entry) for entry in chain.from_iterable(self._entries.values()) if entry.owner is None]
        return [row for row in rows if row.plugin.partition(".")[0] == package]

    def remove_all(self, owner: Owner) -> list[ref[Any]]:
        """Remove every listener of a plugin.

        Returns:
            Weak references to the callables: each dies when no dispatch that began before has it any more.
        """
        gone: list[ref[Any]] = []
        for entries in tuple(self._entries.values()):
            for entry in tuple(entries):
                if entry.owner is owner:
                    gone += [ref(run) for run in (entry.run, *(entry.variants or {}).values())]
                    self._discard(entry)
                    entry.run = _do_nothing  # the entry lives on in its registration
                    entry.variants = None
        return gone

    def items(self) -> Iterator[tuple[Hashable, tuple[Listener, ...]]]:
        """Yield each known name or pattern with what :meth:`get` returns for it."""
        return ((name, self.get(name)) for name in tuple(self._entries))

    def rows(self, name: Hashable | None = None, /) -> list[ListenerRow]:
        """Return the listeners of a name, or all listeners name by name, in running order, as ``describe()`` shows them."""
        if name is not None:
            return [_row(entry) for entry in self._matching(name)]
        key = _place if self._has_plugins else _order
        return [_row(entry) for entries in self._entries.values() for entry in sorted(entries, key=key)]

    def _matching(self, name: Hashable) -> list[_Entry]:
        found = list(self._entries.get(name, ()))
        if self._patterns and isinstance(name, str) and "*" not in name:
            text = name if type(name) is str else str.__str__(name)  # of a member of a str enum, its value
            dotted = f"{text}."
            for pattern, entries in tuple(self._patterns.values()):  # another thread may add one
                if pattern.fullmatch(dotted):
                    found += entries
            if len(found) > 1:
                found.sort(key=_order)
        if self._has_plugins:
            found = sorted([entry for entry in found if entry.owner is None or entry.owner.is_active], key=_place)
        return found

    def _variant(self, entry: _Entry, policy: Policy) -> Listener:
        """Return the callable of an entry for a name with a policy. The bridge is under none."""
        if _is_bridge(entry.listener):
            return entry.run
        if entry.variants is None:
            entry.variants = {}
        run = entry.variants.get(policy)
        if run is None:
            own = None if entry.owner is None else entry.owner.policy
            run = entry.variants[policy] = self._under_policy(entry, combine_policies(policy, own))
        return run

    def _under_policy(self, entry: _Entry, policy: Policy | None) -> PolicyListener:
        run = entry.run
        under = PolicyListener(
            run.target if isinstance(run, ConfiguredListener) else run,
            entry.options,
            self._policy if entry.options.on_error is None else entry.options.on_error,
            rank=entry.rank,
            unregister=entry.remove,
            owner=entry.owner,
            policy=policy,
            report=self._policy if callable(self._policy) else None,
        )
        if isinstance(run, ConfiguredListener):
            under.share_runs(run)
        return under

    def _discard(self, entry: _Entry) -> None:
        """Remove one entry, and its name when no listener is left under it."""
        entries = self._entries.get(entry.name, [])
        at = 0 if entries and entries[0] is entry else bisect_left(entries, _order(entry), key=_order)
        if at < len(entries) and entries[at] is entry:
            del entries[at]
            if not entries:
                del self._entries[entry.name]
                self._patterns.pop(entry.name, None)
                forgotten = self._forgotten
                if forgotten is not None:  # names may be made for each request: only so many are noted
                    forgotten.add(hash(entry.name))
                    if len(forgotten) > FORGOTTEN_NAMES:
                        self._forgotten = None
            self._changed(None if is_pattern(entry.name) else entry.name)

    def _changed(self, name: Hashable | None = None) -> None:
        """Drop what is known of a name whose listeners have changed; of all names by default, as after a change of a pattern."""
        self.changes += 1
        if name is None:
            self._cache.clear()
            self._bystanders.clear()
            self._bridged.clear()
            self.ready.clear()
        elif self._cache or self.ready:
            self._cache.pop(name, None)
            self._bystanders.pop(name, None)
            self._bridged.pop(name, None)
            self.ready.pop(name, None)


def registry_of(dispatcher: Any) -> ListenerRegistry:
    """Return the registry of one of silbo's dispatchers."""
    registry: ListenerRegistry = dispatcher._listeners  # noqa: SLF001  # for this package alone
    return registry


def container_of(dispatcher: object) -> Container | None:
    """Return the container of one of silbo's dispatchers; None if it has none, or for any other object."""
    registry = getattr(dispatcher, "_listeners", None)
    return registry.container if isinstance(registry, ListenerRegistry) else None


def _is_bridge(listener: Any) -> bool:
    owner = getattr(inspect.unwrap(listener), "__self__", None)
    return hasattr(type(owner), "__silbo_sends__")  # silbo.bridge imports this module, so its class is not known here


def _lateness(listener: Any) -> int:
    """Return 1 for a bridge, 2 for a ``wait_for``, and 0 for others. Of the listeners at LAST, those with a higher number run later.

    So none of them changes, stops or refuses an event that has left already.
    """
    if getattr(listener, "__silbo_waits__", None) is True:
        return 2
    return 1 if _is_bridge(listener) else 0


async def _do_nothing(event: object) -> None: ...


def _order(entry: _Entry) -> tuple[Any, int, int]:
    rank = entry.rank
    return rank, _lateness(entry.listener) if rank is LAST else 0, entry.number


def _place(entry: _Entry) -> tuple[Any, int, float, int]:
    return entry.place


def _row(entry: _Entry) -> ListenerRow:
    source = find_source(entry.listener)
    chosen = {
        option: value
        for option in ("once", "timeout", "concurrent", "on_error")
        if (value := getattr(entry.options, option)) not in (None, False)
    }
    return ListenerRow(
        name=entry.name,
        listener=entry.listener,
        priority=entry.priority,
        plugin=source.module if entry.owner is None else entry.owner.name,
        defined_at=source.place,
        options=chosen,
    )
