"""Plugins in a consumer: a delivery is done only when they have really run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, Budget, Plugins, PluginView, Policy
from silbo.brokers.memory import MemoryBroker
from tests.support.consumer import Consumer, UserJoined, handle_one, joined


async def fail(event: Any) -> None:
    event.plan = "half"
    raise ConnectionError("database is away")


@pytest.mark.parametrize("on_failure", ["raise", "collect", "ignore", "refuse"])
async def test_a_dead_letter_names_the_plugin(on_failure: Any) -> None:
    """Whatever the policy says, a failed plugin fails the delivery; its dead letter says which plugin and listener it was."""
    dispatcher = AsyncEventDispatcher()
    async with Plugins(dispatcher, policy=Policy(on_failure=on_failure), report=lambda report: None) as plugins:
        await plugins.load(lambda view: view.add_listener("user.joined", fail), name="audit")
        consumer, subscription, _ = await handle_one(dispatcher)
    assert (consumer.stats.handled, consumer.stats.failed, consumer.stats.dead) == (0, 3, 1)
    ((_, text, *_),) = subscription.buried
    assert "database is away" in text or "failed" in text
    assert "plugin 'audit' by fail" in text
    assert text.count("audit") == 1


async def test_a_delivery_waits_for_a_plugin_that_its_budget_has_switched_off() -> None:
    """Switched off for a while, a plugin runs later: its delivery waits until it is back, and that counts as no attempt."""
    dispatcher = AsyncEventDispatcher()
    heard: list[str] = []
    fails = True

    async def hear(event: UserJoined) -> None:
        if fails:
            raise OSError
        heard.append(event.plan)

    policy = Policy(on_failure="ignore", budget=Budget(failures=0, pause=0.05))
    async with Plugins(dispatcher, policy=policy, report=lambda report: None) as plugins:
        await plugins.load(lambda view: view.add_listener("user.joined", hear), name="audit")
        await dispatcher.adispatch("user.joined", UserJoined(1))
        assert plugins.describe()[0].state == "off"
        fails = False
        consumer, _, _ = await handle_one(dispatcher, max_attempts=1)
    assert heard == ["free"]
    assert (consumer.stats.handled, consumer.stats.dead) == (1, 0)
    assert consumer.stats.failed > 0


async def test_a_delivery_does_not_wait_for_a_plugin_that_is_off_by_hand() -> None:
    """The host has decided to go on without it."""
    dispatcher = AsyncEventDispatcher()
    async with Plugins(dispatcher, report=lambda report: None) as plugins:
        await plugins.load(lambda view: view.add_listener("user.joined", fail), name="audit")
        plugins.switch_off("audit")
        consumer, subscription, _ = await handle_one(dispatcher)
    assert (consumer.stats.handled, subscription.buried) == (1, [])


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_delivery_is_not_done_without_a_plugin_that_nobody_switched_off_by_hand(refuses: bool) -> None:
    """A plugin that its budget has switched off for good, and a name that decides: the delivery has failed."""
    dispatcher = AsyncEventDispatcher()
    budget = None if refuses else Budget(failures=0, pause=None)
    policy = Policy(on_failure="refuse" if refuses else "ignore", budget=budget)
    async with Plugins(dispatcher, policy=policy, report=lambda report: None) as plugins:
        await plugins.load(lambda view: view.add_listener("user.joined", fail), name="audit")
        if refuses:
            plugins.switch_off("audit")
        consumer, subscription, _ = await handle_one(dispatcher)
    assert (consumer.stats.handled, len(subscription.buried)) == (0, 1)
    assert "audit" in subscription.buried[0][1]


async def test_a_consumers_time_limit_holds_for_plugins_without_one() -> None:
    """The limits are the plugin's where it has one, and the consumer's where it has none."""
    dispatcher = AsyncEventDispatcher()
    errors: list[Any] = []

    async def hang(event: UserJoined) -> None:
        await asyncio.Event().wait()

    policy = Policy(on_failure="ignore")
    async with Plugins(dispatcher, policy=policy, report=lambda report: errors.append(report.error)) as plugins:
        await plugins.load(lambda view: view.add_listener("user.joined", hang), name="audit")
        consumer, _, _ = await handle_one(dispatcher, listener_timeout=0.02)
    assert (consumer.stats.handled, consumer.stats.dead) == (0, 1)
    assert [error.timeout for error in errors] == [0.02] * 3


async def test_a_plugin_is_reloaded_while_a_consumer_works() -> None:
    """Every message is handled by exactly one generation of the plugin."""
    dispatcher, broker = AsyncEventDispatcher(), MemoryBroker(app="web")
    heard: list[int] = []

    def plugin(view: PluginView) -> None:
        async def hear(event: Any) -> None:
            await asyncio.sleep(0)
            heard.append(event.payload["user_id"])

        view.add_listener("user.joined", hear)

    group = broker.group("workers", start="oldest")
    async with Plugins(dispatcher) as plugins:
        await plugins.load(plugin)
        await broker.publish(*(joined(number) for number in range(200)))
        async with Consumer(dispatcher, group, own="handle") as consumer:
            running = asyncio.create_task(consumer.run())
            async with asyncio.timeout(60):
                while consumer.stats.handled < 200:
                    await plugins.reload("plugin", overlap=True)
                    await asyncio.sleep(0)
            consumer.stop()
            await running
    assert sorted(heard) == list(range(200))
