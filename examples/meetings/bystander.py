"""A program that has never heard of silbo: with the bare redis library it reads what the channels carry.

It ends at a message on the channel `<prefix>:over`, and then prints what it counted. Redis delivers in order, so that
message comes after everything that was published before it.
"""

import json
import os
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime

from redis import Redis

from examples.meetings.process import Settings, ready, when_input_ends


def main(settings: Settings) -> None:
    """Subscribe, listen, report."""
    names: Counter[str] = Counter()
    event_ids: list[str] = []
    milliseconds: list[float] = []
    with Redis.from_url(settings.redis_url) as client, client.pubsub() as pubsub:
        pubsub.psubscribe(f"{settings.prefix}:notification_event:*", f"{settings.prefix}:ecst_event:*")
        pubsub.subscribe(f"{settings.prefix}:over")
        for heard in pubsub.listen():
            if heard["type"] == "subscribe":  # the last of the three to be confirmed
                ready()
            elif heard["type"] == "pmessage":
                now = time.time()
                message = json.loads(heard["data"])
                happened = datetime.fromisoformat(message["payload"]["event_timestamp"])
                names[message["message_name"]] += 1
                event_ids.append(message["message_id"])
                milliseconds.append((now - happened.timestamp()) * 1000)
            elif heard["type"] == "message":
                break
    print(json.dumps({"names": names, "event_ids": event_ids, "milliseconds": milliseconds}))


if __name__ == "__main__":
    settings = Settings.from_environment()
    when_input_ends(lambda: os._exit(0))
    with suppress(KeyboardInterrupt):
        main(settings)
