"""Which events leave, and to which address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest

from silbo._checks import check_address
from silbo.bridge import CACHED_NAMES, Route, Routes, routing_key
from silbo.errors import AddressInvalid, MessageRefused, NameInvalid, RouteConflict, SilboError
from silbo.names import EventName


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("user.joined", ["user.joined"], ["user.left", "user.joined.again", "user"]),
        ("user.*", ["user.joined", "user.left"], ["user", "user.a.b", "users.joined"]),
        ("user.**", ["user", "user.joined", "user.a.b"], ["users", "order.user"]),
        ("**", ["user", "user.joined", ""], []),
    ],
)
def test_route_matches_names_as_listeners_do(pattern: str, hits: list[str], misses: list[str]) -> None:
    route = Route(pattern)
    routes = Routes([route])
    assert [routes.match(name) for name in hits] == [route] * len(hits)
    assert [routes.match(name) for name in misses] == [None] * len(misses)


def test_first_route_that_matches_wins() -> None:
    """Order says what is special: the narrow route goes above the wide one, and nothing is merged."""
    narrow, wide = Route("order.paid", to="money"), Route("order.**", key="order_id")
    assert Routes([narrow, wide]).match("order.paid") is narrow
    assert Routes([wide, narrow]).match("order.paid") is wide
    assert Routes([narrow, wide]).match("order.sent") is wide


def test_name_constant_is_a_pattern_too() -> None:
    route = Route(EventName("user.joined"))
    assert Routes([route]).match("user.joined") is route


def test_two_equal_patterns_are_refused_when_built() -> None:
    """The second would never be used: that is a mistake, not a preference."""
    with pytest.raises(RouteConflict) as caught:
        Routes([Route("user.*", to="a"), Route("order.*"), Route("user.*", to="b")])
    assert caught.value.pattern == "user.*"
    assert "'a'" in str(caught.value)
    assert "'b'" in str(caught.value)


def test_same_route_twice_is_refused() -> None:
    route = Route("user.*")
    with pytest.raises(RouteConflict):
        Routes([route, route])


@pytest.mark.parametrize("address", ["", "a b", "a:b", "{a}", "a*", "ä", "a\n", 1, "a/b"])
def test_address_that_is_none_is_refused_when_built(address: object) -> None:
    """An address becomes a part of keys and channels: what has a meaning there can't be in it."""
    with pytest.raises(AddressInvalid) as caught:
        Route("**", to=address)  # type: ignore[arg-type]
    assert caught.value.address == address
    assert isinstance(caught.value, SilboError)


@pytest.mark.parametrize("address", ["orders", "orders-eu.v2_1", "A", "0"])
def test_address_is_letters_digits_dots_underscores_and_dashes(address: str) -> None:
    assert Route("**", to=address).to == address
    assert check_address(address) == address


def test_check_address_says_what_it_was_to_be() -> None:
    with pytest.raises(AddressInvalid, match=r"'my app' is not an app:"):
        check_address("my app", "an app")


def test_route_with_half_a_segment_is_refused_when_built() -> None:
    with pytest.raises(NameInvalid):
        Route("user.jo*")


def test_route_to_an_unknown_kind_is_refused_when_built() -> None:
    with pytest.raises(ValueError, match="domain"):
        Route("**", kind="domain")  # type: ignore[arg-type]


def test_names_without_number_leave_memory_flat() -> None:
    """Names can be dynamic: what is remembered about them is bounded."""
    route = Route("room.**")
    routes = Routes([route])
    for number in range(3 * CACHED_NAMES):
        assert routes.match(f"room.{number}") is route
        assert routes.match(f"other.{number}") is None
    assert len(routes._cache) <= CACHED_NAMES


@dataclass
class Paid:
    order_id: int | None = 7


def test_key_is_the_text_of_an_attribute_or_of_what_a_function_gives() -> None:
    assert routing_key(Paid(), "paid", "order_id") == "7"
    assert routing_key(Paid(), "paid", lambda event: event.order_id + 1) == "8"
    assert routing_key(Paid(), "paid", None) is None


def test_key_that_is_none_is_no_key() -> None:
    """``"None"`` would put everything that has none in one line."""
    assert routing_key(Paid(None), "paid", "order_id") is None
    assert routing_key(Paid(None), "paid", lambda event: event.order_id) is None


def test_missing_key_attribute_refuses_the_message_and_names_it() -> None:
    with pytest.raises(MessageRefused, match="no attribute 'customer'") as caught:
        routing_key(Paid(), "paid", "customer")
    assert (caught.value.name, caught.value.field) == ("paid", "customer")


def test_key_function_that_raises_refuses_the_message_and_keeps_its_error() -> None:
    def broken(event: Paid) -> str:
        raise KeyError("nothing here")

    with pytest.raises(MessageRefused, match="broken.*nothing here") as caught:
        routing_key(Paid(), "paid", broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_is_no_list_of_routes_is_refused_with_what_was_meant() -> None:
    wrong: Any = Route("a.b", to="x")
    with pytest.raises(TypeError, match="list of Route objects"):
        Routes(wrong)
    wrong = ["a.b"]
    with pytest.raises(TypeError, match=r"Route\('a\.b'\)"):
        Routes(wrong)


class _Account:
    """An object without a text."""

    def number(self) -> int:
        return 7


async def _key_later(event: Any) -> int:
    return 7


@pytest.mark.parametrize(
    "key",
    [
        _key_later,
        lambda _: _Account(),
        lambda _: _Account().number,
        lambda _: _Account,
        lambda _: (1, _Account()),
        lambda _: {"a", "b"},
        lambda _: (number for number in (1, 2)),
        "key",
    ],
)
def test_a_key_that_is_no_value_is_refused(key: Any) -> None:
    """Its text would be another one in each process, so the order of the events would be lost."""

    class Keyed:
        def key(self) -> int:
            return 7

    with pytest.raises(MessageRefused, match="no value"):
        routing_key(Keyed(), "paid", key)


def test_objects_with_a_text_are_keys() -> None:
    @dataclass(frozen=True)
    class Tenant:
        number: int

    class Shop:
        def __str__(self) -> str:
            return "shop-7"

    for value, text in [(Shop(), "shop-7"), (("a", 7), "('a', 7)"), (UUID(int=7), str(UUID(int=7))), (b"a", "b'a'")]:
        assert routing_key(None, "paid", lambda _, value=value: value) == text
    assert "Tenant(number=7)" in str(routing_key(None, "paid", lambda _: Tenant(7)))
