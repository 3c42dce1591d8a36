"""A program without silbo: it reads the channels with the redis library alone.

While Redis is away it misses messages, and they are not sent again: that is Pub/Sub. It ends at a message on the channel
`<prefix>:over`, and then prints what it heard. Redis delivers in order, so that message comes after all messages that were
published before it.
"""

import json
import os
import time
from contextlib import suppress
from datetime import datetime

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisIsAway
from redis.retry import Retry

from examples.meetings.process import Settings, ready, when_input_ends


class Bystander:
    """A subscriber that keeps a list of the messages it hears."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._announced = False
        self.event_ids: list[str] = []
        self.milliseconds: list[float] = []

    def listen(self) -> None:
        """Listen until the demo is over, or Redis goes away."""
        prefix = self._settings.prefix
        with (
            Redis.from_url(self._settings.redis_url, retry=Retry(NoBackoff(), 0)) as client,
            client.pubsub() as pubsub,
        ):
            pubsub.psubscribe(f"{prefix}:notification_event:*", f"{prefix}:ecst_event:*")
            pubsub.subscribe(f"{prefix}:over")
            for heard in pubsub.listen():
                if heard["type"] == "subscribe":  # the last of the three to be confirmed
                    self._announce()
                elif heard["type"] == "pmessage":
                    self._note(json.loads(heard["data"]))
                elif heard["type"] == "message":
                    return

    def _announce(self) -> None:
        if not self._announced:
            ready()
        self._announced = True

    def _note(self, message: dict[str, dict[str, str] | str]) -> None:
        payload = message["payload"]
        assert isinstance(payload, dict)
        happened = datetime.fromisoformat(payload["event_timestamp"])
        self.milliseconds.append((time.time() - happened.timestamp()) * 1000)
        self.event_ids.append(str(message["message_id"]))


def main(settings: Settings) -> None:
    """Listen to the end, then print a report."""
    bystander = Bystander(settings)
    while True:
        try:
            bystander.listen()
        except RedisIsAway:
            time.sleep(0.05)
        else:
            break
    print(json.dumps({"event_ids": bystander.event_ids, "milliseconds": bystander.milliseconds}))


if __name__ == "__main__":
    settings = Settings.from_environment()
    when_input_ends(lambda: os._exit(0))
    with suppress(KeyboardInterrupt):
        main(settings)
