"""A Kafka for the tests: the mock cluster inside librdkafka, in this process, on real sockets.

    with KafkaMock() as kafka:
        producer = AIOKafkaProducer(bootstrap_servers=kafka.url)
        kafka.down(); kafka.up()                    # it goes away and returns

librdkafka comes inside the wheel of `confluent-kafka`, whose Python names it not: so ctypes. It keeps what it gets in memory
and knows produce, fetch, groups and transactions of current protocol versions; it replicates nothing.

Source: rdkafka_mock.h of librdkafka 2.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

__all__ = ["OFFSET_COMMIT", "KafkaMock"]

PRODUCER: Final = 0
PRODUCE: Final = 0
"""Kafka's number of the request that brings messages."""
OFFSET_COMMIT: Final = 8
"""Kafka's number of the request that commits offsets."""
BROKER: Final = 1


class KafkaMock:
    """One broker; a topic is there once it is asked for, with four partitions. Entering starts it, leaving ends it."""

    def __init__(self) -> None:
        self._library = _library()
        self._client: Any = None
        self._cluster: Any = None

    def __enter__(self) -> Self:
        library, problem = self._library, ctypes.create_string_buffer(512)
        settings = ctypes.c_void_p(library.rd_kafka_conf_new())
        library.rd_kafka_conf_set(settings, b"log_level", b"2", problem, len(problem))
        self._client = library.rd_kafka_new(PRODUCER, settings, problem, len(problem))
        if not self._client:
            raise RuntimeError(f"librdkafka: {problem.value.decode()}")
        self._cluster = library.rd_kafka_mock_cluster_new(self._client, 1)
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)  # by default a group begins after 3 s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)

    @property
    def url(self) -> str:
        """For `bootstrap_servers=`."""
        url: bytes = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return url.decode()

    def down(self) -> None:
        """Go away: connections break, and no other is taken. What was stored stays."""
        self._check(self._library.rd_kafka_mock_broker_set_down(self._cluster, BROKER))

    def up(self) -> None:
        """Return, on the same port."""
        self._check(self._library.rd_kafka_mock_broker_set_up(self._cluster, BROKER))

    def slow(self, seconds: float) -> None:
        """Answer every request only after so long; carried out it is at once."""
        self._check(self._library.rd_kafka_mock_broker_set_rtt(self._cluster, BROKER, int(seconds * 1000)))

    def refuse(self, *codes: int, request: int = PRODUCE) -> None:
        """Answer the next requests of a kind with these errors, and store nothing of them."""
        errors = (ctypes.c_int * len(codes))(*codes)
        self._library.rd_kafka_mock_push_request_errors_array(self._cluster, request, len(codes), errors)

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"librdkafka: error {code}")


@cache
def _library() -> Any:
    spec = importlib.util.find_spec("confluent_kafka")
    if spec is None or spec.origin is None:
        raise RuntimeError("no confluent-kafka here, whose librdkafka is the Kafka of the tests; make test installs it")
    package = Path(spec.origin).parent
    found = [*package.parent.glob("confluent_kafka.libs/librdkafka*.so*"), *package.glob(".dylibs/librdkafka*.dylib")]
    if not found:
        raise RuntimeError(f"no librdkafka beside {package}")
    library = ctypes.CDLL(str(found[0]))
    pointer, text, integer, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "rd_kafka_conf_new": (pointer, []),
        "rd_kafka_conf_set": (integer, [pointer, text, text, text, size]),
        "rd_kafka_new": (pointer, [integer, pointer, text, size]),
        "rd_kafka_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_new": (pointer, [pointer, integer]),
        "rd_kafka_mock_cluster_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_bootstraps": (text, [pointer]),
        "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [pointer, ctypes.c_int32]),
        "rd_kafka_mock_broker_set_down": (integer, [pointer, ctypes.c_int32]),
        "rd_kafka_mock_broker_set_up": (integer, [pointer, ctypes.c_int32]),
        "rd_kafka_mock_broker_set_rtt": (integer, [pointer, ctypes.c_int32, integer]),
        "rd_kafka_mock_push_request_errors_array": (None, [pointer, ctypes.c_int16, size, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
