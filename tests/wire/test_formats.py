"""Formats: the documented bytes, and every malformed input as one error that names the field."""

from __future__ import annotations

import gc
import json
import math
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import example, given, settings
from hypothesis import strategies as st

from silbo.errors import MessageInvalid, MessageRefused
from silbo.message import Format, Message, Origin
from silbo.names import MAX_NAME_LENGTH, compile_pattern
from silbo.wire.decode import to_event
from silbo.wire.encode import MAX_DEPTH, MAX_SIZE
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON, DiatorFormat

ID = "9f62e977-73f7-462b-92cb-8ea658d3bcb5"
ORIGIN = Origin("web", "0" * 32)
ALL = pytest.mark.parametrize("form", [JSON, DIATOR, CLOUDEVENTS], ids=["json", "diator", "cloudevents"])


def message(**payload: Any) -> Message:
    return Message(
        "notification_event",
        "user.joined",
        ID,
        {"event_id": ID, "event_timestamp": "2026-03-07T09:26:02.588855Z", **payload},
        {"publication": "p-1", "version": "1", "key": "123"},
        class_name="UserJoined",
    )


def record(**changes: Any) -> dict[str, Any]:
    """Return what JSON writes of a message; a change to None leaves the key out."""
    whole = json.loads(JSON.encode(message(user_id=123), ORIGIN)) | changes
    return {key: value for key, value in whole.items() if value is not None}


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


# -- silbo's JSON --------------------------------------------------------------------------------------------


def test_json_is_the_documented_bytes() -> None:
    """Compact, in this order of keys: other programs are written against it."""
    assert JSON.encode(message(user_id=123), ORIGIN) == (
        b'{"message_type":"notification_event","message_name":"user.joined",'
        b'"message_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5",'
        b'"payload":{"event_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5",'
        b'"event_timestamp":"2026-03-07T09:26:02.588855Z","user_id":123},'
        b'"headers":{"app":"web","instance":"00000000000000000000000000000000",'
        b'"publication":"p-1","version":"1","key":"123"}}'
    )


def test_json_gives_back_the_message_with_its_origin() -> None:
    decoded = JSON.decode(JSON.encode(message(user_id=123), ORIGIN))
    assert decoded.payload == message(user_id=123).payload
    assert (decoded.origin, decoded.key) == (ORIGIN, "123")
    assert (decoded.message_type, decoded.message_name, decoded.message_id) == ("notification_event", "user.joined", ID)


def test_an_origin_that_a_message_carries_is_kept() -> None:
    """A relay sends on what another process dispatched: that process has heard it already."""
    first = JSON.decode(JSON.encode(message(), ORIGIN))
    assert JSON.decode(JSON.encode(first, Origin("web", "relay"))).origin == ORIGIN


def test_unknown_keys_are_ignored_and_headers_may_be_missing() -> None:
    """Old consumers read new messages, and a bare publisher needs no headers."""
    decoded = JSON.decode(json.dumps(record(headers=None, later={"x": [1]})).encode())
    assert decoded.headers == {}
    assert decoded.origin is None


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    raw = JSON.encode(message(user_id=123), ORIGIN).replace(b'"user_id":123', b'"user_id":1,"user_id":2')
    assert JSON.decode(raw).payload["user_id"] == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"message_type": None}, "message_type"),
        ({"message_name": None}, "message_name"),
        ({"message_id": None}, "message_id"),
        ({"payload": None}, "payload"),
        ({"message_type": 1}, "message_type"),
        ({"message_name": ["user.joined"]}, "message_name"),
        ({"message_id": 7}, "message_id"),
        ({"payload": []}, "payload"),
        ({"payload": "{}"}, "payload"),
        ({"headers": []}, "headers"),
        ({"headers": {"version": 1}}, "headers[...]"),
        ({"payload": {"x": nested(MAX_DEPTH)}}, "payload"),
    ],
)
def test_json_names_the_key_that_is_wrong(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        JSON.decode(json.dumps(record(**changes)).encode())
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@ALL
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b'{"message_type":"\xff"}',
        b'{"message_type":"\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"payload":{"x":NaN}}',
        b'{"payload":{"x":1e999}}',
        b'{"payload":{"x":' + b"9" * 5000 + b"}}",
        b" " * (MAX_SIZE + 1),
    ],
    ids=range(16),
)
def test_what_is_no_message_is_message_invalid(form: Format, raw: bytes) -> None:
    """No other error comes out, whatever comes in: a consumer's loop counts on it."""
    with pytest.raises(MessageInvalid):
        form.decode(raw)


@ALL
@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b'{"a":' * 100_000, "levels deep$"),
        (b'{"message_type":"\xff"}', "^not UTF-8$"),
        (b'{"message_type":\xff}', "^not UTF-8$"),
        (b'{"\xff":1}', "^not UTF-8$"),
        (b'{"nobody":{"asks":["for \xc3\x28"]}}', "^not UTF-8$"),
        (b'{"message_type":"\xed\xa0\x80"}', "^not UTF-8$"),
        (b'{"message_type":"\xe2\x82', "^not UTF-8$"),
        (b"\xff\xfe{\x00}\x00", "^not UTF-8$"),
        (b"", "^not JSON: "),
        (b'{"message_type":"a', "^not JSON: "),
        (b"{} {}", "^not JSON: "),
        (b"{'message_type': 1}", "^not JSON: "),
        (b'{"message_type":NaN}', "^not JSON: "),
        (b'{"message_type":"\\ud800"}', "^not JSON: "),
        (b"\xef\xbb\xbf{}", "^not JSON: "),
        (b"null", "^not a JSON object$"),
        (b'["message_type"]', "^not a JSON object$"),
        (b'"{}"', "^not a JSON object$"),
        (b"7", "^not a JSON object$"),
        (b"{}", "^(message_type|specversion): missing$"),
    ],
    ids=range(20),
)
def test_what_can_not_be_parsed_says_why(form: Format, raw: bytes, problem: str) -> None:
    """In our words: those of the parser change from release to release."""
    with pytest.raises(MessageInvalid, match=problem):
        form.decode(raw)


@ALL
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"user_id":123', b'"user_id":"\xff"'),
        (b'"user_id":123', b'"user_id":[{"x":"\xff"}]'),
        (b'"user_id":123', b'"\xff":123'),
        (b'oined"', b'\xff"'),
    ],
    ids=["value", "nested", "key", "name"],
)
def test_an_invalid_byte_in_a_good_message_is_said_to_be_one(form: Format, old: bytes, new: bytes) -> None:
    good = form.encode(message(user_id=123), ORIGIN)
    assert old in good
    with pytest.raises(MessageInvalid, match="^not UTF-8$"):
        form.decode(good.replace(old, new))


@ALL
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"user_id":123', b'"user_id":"\xff"'),
        (b'"user_id":123', b'"user_id":"\\udfff"'),
        (b'"user_id":123', b'"user_id":NaN'),
        (b'"user_id":123', b'"user_id":-Infinity'),
        (b'"user_id":123', b'"user_id":1e999'),
        (b'"user_id":123', b'"user_id":' + b"9" * 5000),
        (b'"user_id":123', b'"user_id":' + b"[" * 5000 + b"]" * 5000),
        (b'"user_id":123', b'"user_id":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH),
        (b'"user_id":123', b'"user_id":"' + b"x" * MAX_SIZE + b'"'),
    ],
    ids=["bytes", "surrogate", "nan", "infinity", "overflow", "digits", "recursion", "depth", "size"],
)
def test_one_bad_value_in_a_good_message_is_message_invalid(form: Format, old: bytes, new: bytes) -> None:
    good = form.encode(message(user_id=123), ORIGIN)
    assert form.decode(good).payload["user_id"] == 123
    with pytest.raises(MessageInvalid):
        form.decode(good.replace(old, new))


# -- what can't be sent --------------------------------------------------------------------------------------


class Opaque:
    pass


@ALL
@pytest.mark.parametrize(
    ("value", "field"),
    [
        (math.nan, "x"),
        ([1.0, math.inf], "x[1]"),
        ({"a": [{"b": -math.inf}]}, "x.a[0].b"),
        ("\ud800", "x"),
        ({"a": "\ud800"}, "x.a"),
        ({"\ud800": 1}, None),
        (10**5000, "x"),
        (Opaque(), "x"),
        ([Opaque()], "x[0]"),
        ({(1, 2): 3}, "x.(1, 2)"),
        (nested(MAX_DEPTH), "x" + "[0]" * (MAX_DEPTH - 1)),
    ],
    ids=range(11),
)
def test_what_no_one_could_read_is_refused_when_written(form: Format, value: Any, field: str | None) -> None:
    """msgspec alone would write null for a NaN; what we send we also read."""
    with pytest.raises(MessageRefused) as caught:
        form.encode(message(x=value), ORIGIN)
    assert field is None or caught.value.field == field


@pytest.mark.parametrize(("name", "headers"), [("\ud800", {}), ("a", {"key": "\ud800"})])
@ALL
def test_what_is_wrong_beside_the_payload_is_refused_too(form: Format, name: str, headers: Any) -> None:
    if form is not DIATOR or not headers:
        with pytest.raises(MessageRefused):
            form.encode(Message("ecst_event", name, ID, {}, headers), ORIGIN)


@ALL
def test_a_message_of_the_largest_size_goes_through_and_one_byte_more_is_refused(form: Format) -> None:
    room = MAX_SIZE - len(form.encode(message(x=""), ORIGIN))
    raw = form.encode(message(x="x" * room), ORIGIN)
    assert len(raw) == MAX_SIZE
    assert len(form.decode(raw).payload["x"]) == room
    with pytest.raises(MessageRefused, match=str(MAX_SIZE + 1)):
        form.encode(message(x="x" * (room + 1)), ORIGIN)


@ALL
def test_a_name_of_the_greatest_length_goes_through_and_one_character_more_is_refused(form: Format) -> None:
    """By the sender, and by a receiver from other senders: names are kept in caches, and matched with patterns."""
    named = Message("ecst_event", "x" * MAX_NAME_LENGTH, ID, {})
    raw = form.encode(named, ORIGIN)
    assert form.decode(raw).message_name == named.message_name
    with pytest.raises(MessageRefused, match="'x{60}...'.*1001 characters"):
        form.encode(replace(named, message_name=f"{named.message_name}x"), ORIGIN)
    with pytest.raises(MessageInvalid) as caught:
        form.decode(raw.replace(b'"xx', b'"xxx'))
    assert caught.value.field == ("type" if form is CLOUDEVENTS else "message_name")
    assert len(str(caught.value)) < 200


@ALL
def test_a_payload_of_the_greatest_depth_goes_through(form: Format) -> None:
    deepest = nested(MAX_DEPTH - 1)
    assert form.decode(form.encode(message(x=deepest), ORIGIN)).payload["x"] == deepest


@ALL
def test_a_payload_may_be_any_mapping(form: Format) -> None:
    sent = Message("ecst_event", "a", ID, MappingProxyType({"x": MappingProxyType({"y": 1})}))
    assert form.decode(form.encode(sent, ORIGIN)).payload == {"x": {"y": 1}}


@ALL
def test_what_contains_itself_is_refused(form: Format) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(MessageRefused, match="contains itself"):
        form.encode(message(x=loop), ORIGIN)


# -- Diator --------------------------------------------------------------------------------------------------

# Sent by a real Diator 0.1.2: channel, bytes, and the event it was.
FROM_DIATOR = [
    (
        "python_diator_channel:notification_event:9f62e977-73f7-462b-92cb-8ea658d3bcb5",
        (
            b'{"message_type":"notification_event","message_name":"UserJoinedNotificationEvent",'
            b'"message_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5","payload":{'
            b'"event_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5","event_timestamp":"2023-03-07T09:26:02.588855",'
            b'"user_id":123}}'
        ),
        Message(
            "notification_event",
            "user.joined",
            "9f62e977-73f7-462b-92cb-8ea658d3bcb5",
            {
                "event_id": "9f62e977-73f7-462b-92cb-8ea658d3bcb5",
                "event_timestamp": "2023-03-07T09:26:02.588855Z",
                "user_id": 123,
            },
            {"publication": "p-1", "version": "1"},
            class_name="UserJoinedNotificationEvent",
        ),
    ),
    (
        "python_diator_channel:ecst_event:82a0b10e-1b3d-4c3c-9bdd-3934f8f824c2",
        (
            b'{"message_type":"ecst_event","message_name":"UserChangedECSTEvent",'
            b'"message_id":"82a0b10e-1b3d-4c3c-9bdd-3934f8f824c2","payload":{'
            b'"event_id":"82a0b10e-1b3d-4c3c-9bdd-3934f8f824c2","event_timestamp":"2023-03-06T12:11:35","user_id":987,'
            b'"new_username":"k\xc3\xa9nd \\"x\\"","tags":["a"],"note":null}}'
        ),
        Message(
            "ecst_event",
            "user.changed",
            "82a0b10e-1b3d-4c3c-9bdd-3934f8f824c2",
            {
                "event_id": "82a0b10e-1b3d-4c3c-9bdd-3934f8f824c2",
                "event_timestamp": "2023-03-06T12:11:35Z",
                "user_id": 987,
                "new_username": 'kénd "x"',
                "tags": ["a"],
                "note": None,
            },
            {"publication": "p-2", "version": "1"},
            class_name="UserChangedECSTEvent",
        ),
    ),
]


@pytest.mark.parametrize(("channel", "raw", "sent"), FROM_DIATOR)
def test_diators_bytes_and_channel_are_exact(channel: str, raw: bytes, sent: Message) -> None:
    """A program that listens to Diator does not notice the change."""
    assert DIATOR.encode(sent, ORIGIN) == raw
    assert DIATOR.channel(sent, "silbo") == channel


@pytest.mark.parametrize(("channel", "raw", "sent"), FROM_DIATOR)
def test_a_message_of_diators_is_read_with_its_time_as_utc(channel: str, raw: bytes, sent: Message) -> None:
    decoded = DIATOR.decode(raw)
    assert (decoded.message_name, decoded.class_name, decoded.headers) == (sent.class_name, sent.class_name, {})
    event = to_event(decoded, None)
    assert event.payload == sent.payload
    assert event.event_timestamp.utcoffset().total_seconds() == 0
    assert str(event.event_id) == decoded.message_id


def test_diators_prefix_is_the_formats_own() -> None:
    own = DiatorFormat(prefix="shop")
    assert own.channel(message(), "silbo") == f"shop:notification_event:{ID}"
    assert own.channels("user.joined", "silbo") == ["shop:notification_event:*", "shop:ecst_event:*"]


# -- CloudEvents ---------------------------------------------------------------------------------------------


def test_cloudevents_is_the_documented_record() -> None:
    """Version 1.0, structured mode; silbo's headers are extensions with names that the specification allows."""
    assert json.loads(CLOUDEVENTS.encode(message(user_id=123), ORIGIN)) == {
        "specversion": "1.0",
        "id": ID,
        "source": "web",
        "type": "user.joined",
        "time": "2026-03-07T09:26:02.588855Z",
        "datacontenttype": "application/json",
        "silbokind": "notification_event",
        "silboinstance": ORIGIN.instance,
        "silboversion": "1",
        "silbopublication": "p-1",
        "partitionkey": "123",
        "data": {"event_id": ID, "event_timestamp": "2026-03-07T09:26:02.588855Z", "user_id": 123},
    }


def test_cloudevents_gives_back_the_message() -> None:
    sent = JSON.decode(JSON.encode(message(user_id=123), ORIGIN))
    assert CLOUDEVENTS.decode(CLOUDEVENTS.encode(sent, ORIGIN)) == sent


def test_the_cloudevents_sdk_reads_ours_and_we_read_what_it_writes() -> None:
    """The project's own Python library is the judge of what we call CloudEvents."""
    event = JSONFormat().read(None, CLOUDEVENTS.encode(message(user_id=123), ORIGIN))
    assert (event.get_id(), event.get_source(), event.get_type()) == (ID, "web", "user.joined")
    assert event.get_extension("partitionkey") == "123"
    assert event.get_data()["user_id"] == 123

    theirs = CloudEvent({"type": "user.left", "source": "/shop", "id": "17", "tracestate": "x"}, {"user_id": 5})
    read = CLOUDEVENTS.decode(JSONFormat().write(theirs))
    assert (read.message_type, read.message_name, read.message_id) == ("notification_event", "user.left", "17")
    assert read.headers == {"app": "/shop", "tracestate": "x"}
    event = to_event(read, None)
    assert event.payload["user_id"] == 5
    assert event.event_timestamp == theirs.get_time()


def test_an_id_that_is_no_uuid_gives_the_same_event_id_each_time() -> None:
    """Redeliveries of one event stay recognisable; another source's 17 is another event."""

    def event_id(source: str) -> object:
        raw = {"specversion": "1.0", "id": "17", "source": source, "type": "user.left", "data": {}}
        return to_event(CLOUDEVENTS.decode(json.dumps(raw).encode()), None).event_id

    assert event_id("/shop") == event_id("/shop") != event_id("/depot")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"specversion": "0.3"}, "specversion"),
        ({"specversion": None}, "specversion"),
        ({"id": ""}, "id"),
        ({"id": 17}, "id"),
        ({"source": ""}, "source"),
        ({"type": None}, "type"),
        ({"time": "2026-03-07T09:26:02"}, "time"),
        ({"time": "yesterday"}, "time"),
        ({"time": "9999-12-31T23:59:59-01:00", "data": {}}, "time"),
        ({"silbokind": 1}, "silbokind"),
        ({"data": None}, "data"),
        ({"data": "<xml/>"}, "data"),
        ({"data": None, "data_base64": b64encode(b"x").decode()}, "data"),
        ({"data": {"x": nested(MAX_DEPTH)}}, "data"),
    ],
)
def test_cloudevents_names_the_attribute_that_is_wrong(changes: dict[str, Any], field: str) -> None:
    whole = json.loads(CLOUDEVENTS.encode(message(), ORIGIN)) | changes
    with pytest.raises(MessageInvalid) as caught:
        CLOUDEVENTS.decode(json.dumps({key: value for key, value in whole.items() if value is not None}).encode())
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "headers"),
    [
        ("", {}),
        ("a\nb", {}),
        ("a", {"Trace-Id": "1"}),
        ("a", {"subject": "x"}),
        ("a", {"silbokind": "x"}),
        ("a", {"traceparent": "\x00"}),
    ],
)
def test_cloudevents_refuses_what_the_specification_forbids(name: str, headers: dict[str, str]) -> None:
    with pytest.raises(MessageRefused, match="CloudEvents can't carry"):
        CLOUDEVENTS.encode(Message("ecst_event", name, ID, {}, headers), ORIGIN)


def test_cloudevents_carries_further_headers_and_leaves_an_empty_key_out() -> None:
    sent = Message("ecst_event", "a", ID, {}, {"traceparent": "00-1", "key": ""})
    record = json.loads(CLOUDEVENTS.encode(sent, ORIGIN))
    assert "partitionkey" not in record
    assert "time" not in record
    assert CLOUDEVENTS.decode(CLOUDEVENTS.encode(sent, ORIGIN)).headers["traceparent"] == "00-1"


# -- channels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [JSON, CLOUDEVENTS])
def test_a_channel_is_the_kind_and_the_event_name(form: Format) -> None:
    assert form.channel(message(), "silbo") == "silbo:notification_event:user.joined"
    assert form.channels("user.joined", "silbo") == [
        "silbo:notification_event:user.joined",
        "silbo:ecst_event:user.joined",
    ]


@ALL
def test_an_address_that_a_route_chose_is_the_channel(form: Format) -> None:
    sent = Message("ecst_event", "order.placed", ID, {}, to="orders")
    assert form.channel(sent, "silbo") == "silbo:orders"


def redis_glob(pattern: str) -> Callable[[str], bool]:
    """Redis's own matching (util.c, stringmatchlen) for the characters that we write: ``*`` and ``\\``."""
    parts: list[str | None] = []
    characters = iter(pattern)
    for character in characters:
        assert character not in "?[", "unescaped"
        parts.append(None if character == "*" else next(characters) if character == "\\" else character)

    def match(text: str, i: int = 0, j: int = 0) -> bool:
        while i < len(parts):
            if (part := parts[i]) is None:
                return any(match(text, i + 1, k) for k in range(j, len(text) + 1))
            if j >= len(text) or text[j] != part:
                return False
            i, j = i + 1, j + 1
        return j == len(text)

    return match


SEGMENTS = st.lists(st.sampled_from(["a", "b", "", "[x]", "?", "\\"]), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(segments=SEGMENTS, chance=st.randoms(use_true_random=False))
@example(segments=["user"], chance=["user", "**"])
@example(segments=["user"], chance=["**", "user"])
@example(segments=["a", "b"], chance=["a", "**", "b"])
@example(segments=["a", "b"], chance=["**", "**"])
def test_the_channels_of_a_pattern_cover_every_name_it_matches(segments: list[str], chance: Any) -> None:
    """A few too many may match, for receivers filter again; one too few would be a lost event."""
    name, pattern = ".".join(segments), ".".join(chance if isinstance(chance, list) else pattern_for(segments, chance))
    if compile_pattern(pattern).fullmatch(f"{name}."):
        channel = JSON.channel(Message("ecst_event", name, ID, {}), "silbo")
        assert any(redis_glob(glob)(channel) for glob in JSON.channels(pattern, "silbo"))


def pattern_for(segments: list[str], chance: Random) -> list[str]:
    """A pattern that is likely to match these segments."""
    parts: list[str] = []
    for segment in segments:
        parts += chance.choice(([segment], [segment], ["*"], ["**"], ["**", segment], [segment, "**"], ["**", "*"]))
    return parts


def test_a_pattern_does_not_match_everything() -> None:
    assert not any(redis_glob(glob)("silbo:ecst_event:order.placed") for glob in JSON.channels("user.*", "silbo"))
    assert JSON.channels("a[1]?", "silbo")[0] == r"silbo:notification_event:a\[1\]\?"


# -- any payload ---------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@ALL
@settings(deadline=None)
@given(payload=st.dictionaries(TEXT.filter(lambda key: not key.startswith("event_")), VALUES, max_size=5))
def test_any_json_payload_comes_back_as_it_was(form: Format, payload: dict[str, Any]) -> None:
    assert form.decode(form.encode(message(**payload), ORIGIN)).payload == message(**payload).payload | (
        {"event_timestamp": "2026-03-07T09:26:02.588855"} if form is DIATOR else {}
    )


@pytest.mark.parametrize("form", [JSON, DIATOR, CLOUDEVENTS], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize(
    "raw", [b"{", b"[]", b"{}", b"\xff", b'{"payload": 1}', b'{"message_name": "' + b"x" * 2000 + b'"}'], ids=range(6)
)
def test_refused_bytes_are_free_at_once(form: Format, raw: bytes) -> None:
    """No error holds the frame that holds the error: a flood of large malformed messages would fill the memory."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        with suppress(MessageInvalid):
            form.decode(raw)
        gc.collect()
        assert not [thing for thing in gc.garbage if isinstance(thing, BaseException)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
