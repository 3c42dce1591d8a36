"""`silbo listeners`, `names` and `plugins` as processes of their own, beside a user's program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.support.app_files import SHOP, imports_undone, write
from tests.support.command_line import SILBO, Done, silbo


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with imports_undone(tmp_path):
        yield write(tmp_path, SHOP)


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


async def test_listeners_in_a_process(folder: Path) -> None:
    """From the folder of --app-dir; the table has them in running order, and the file relative to the current folder."""
    done = await silbo("listeners", "shop.web:dispatcher", "order.paid", "--app-dir", folder, command=SILBO)
    assert (done.code, done.err) == (0, "")
    head, _, *lines = squeezed(done.out)
    assert head == "priority registered for listener plugin options defined at"
    assert lines[0].startswith(f"-10 order.paid invoice shop.web timeout=5 {folder}/shop/web.py:")
    assert lines[1].startswith("5 order.* log_order shop.web once ")
    assert lines[2].startswith("LAST ** Bridge.forward silbo.bridge ") and len(lines) == 3


async def test_plugins_in_a_process(folder: Path) -> None:
    """Each is unloaded before the command ends, and what the app logs comes on stderr."""
    done = await silbo("plugins", "shop.web:switched_off", "--app-dir", folder, command=SILBO)
    assert (done.code, done.err) == (0, "plugin audit: switched off: too slow\n")
    _, _, line = squeezed(done.out)
    assert line == (
        "audit 1.2 off: too slow timeout 3 s, on failure ignore, 2 failures in 60 s shop.web.AuditSettings order.paid 0 0"
    )


async def test_error_in_the_programs_own_code_shows_its_traceback(folder: Path) -> None:
    """And the last line is silbo's, with what was tried."""
    write(folder, {"broken.py": "import nothing_of_the_kind\n"})
    try:
        done = await silbo("listeners", "broken:app", "--app-dir", folder, command=SILBO)
    except AssertionError as error:  # silbo() takes a traceback for silbo's own
        told = str(error)
        assert re.search(rf"recent call last\):\n +File \"{folder}/broken.py\", line 1", told), "from there on"
        assert "silbo: 'broken:app': its import failed: ModuleNotFoundError: No module named 'nothing_of" in told
    else:
        raise AssertionError(done)


# -- in this process: what differs only in the answer --------------------------------------------------------


@pytest.fixture
def ask(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in the folder."""
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> Done:
        with imports_undone(folder):
            return run(*arguments)

    return call


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["shop.web:dispatcher", "order.pad"], 1, "order.pad: the app does not declare it; did you mean order.paid?\n"),
        (
            ["shop.web:dispatcher", "cart.emptied"],
            0,
            "cart.emptied: no listener is meant for it, those above hear all names\n",
        ),
        (
            ["shop.web:dispatcher", "cart.emptied.twice"],
            1,
            "cart.emptied.twice: the app does not declare it; no listener is meant for it, those above hear all names; did ",
        ),
        (["shop.web:dispatcher", "cart.*"], 0, "no listeners for names like cart.*\n"),
        (
            ["shop.web:family", "order.sent"],
            0,
            "order.sent: no listener is meant for it; order.send has listeners: is that",
        ),
        (["shop.web:nothing", "x"], 1, "silbo: 'shop.web:nothing': shop.web has no attribute 'nothing'"),
        (["shop.web:dispatcher", "or*der"], 1, "'or*der': a '*' stands for a whole segment"),
    ],
)
def test_answer_about_a_name_without_listeners(ask: Run, arguments: list[str], code: int, told: str) -> None:
    done = ask("listeners", *arguments)
    assert done.code == code and told in done.err


def test_listeners_as_json(ask: Run) -> None:
    done = ask("listeners", "shop.web:dispatcher", "--json")
    assert done.code == 0 and [row["name"] for row in done.objects] == ["**", "order.*", "order.paid", "order.payed"]
    assert done.objects[2] == {
        "name": "order.paid",
        "listener": "invoice",
        "priority": -10.0,
        "options": {"timeout": 5},
        "plugin": "shop.web",
        "place": done.objects[2]["place"],
        "off": "",
        "is_meant": True,
    }


def test_names_in_a_table(ask: Run) -> None:
    """A name that a listener has and the app does not declare is told, with the one that may be meant."""
    done = ask("names", "shop.web:dispatcher")
    assert (done.code, done.err) == (0, "not declared: order.payed; did you mean order.paid?\n")
    _, _, *lines = squeezed(done.out)
    assert lines == [
        "order.paid OrderPaid notification order 1 order, tags? invoice, log_order an order was paid",
        "cart.emptied CartEmptied domain 2 cart nobody deprecated: say cart.left",
        "order.payed 1 misspelt, log_order",
    ]


def test_one_name_is_shown_with_all_that_is_known(ask: Run) -> None:
    done = ask("names", "shop.web:dispatcher", "order.paid")
    assert done.code == 0 and squeezed(done.out)[:10] == [
        "name order.paid",
        "declared yes",
        "class shop.events.OrderPaid",
        "kind notification",
        "key order",
        "version 1",
        "about an order was paid",
        "field order: int",
        "field tags?: list[str] | None",
        "leaves yes, by a bridge",
    ]
    assert squeezed(done.out)[10].startswith("listener invoice shop/web.py:")


def test_unheard_names_alone(ask: Run) -> None:
    done = ask("names", "shop.web:dispatcher", "--unheard", "--json")
    assert [(name["name"], name["is_heard"]) for name in done.objects] == [("cart.emptied", False)]
    assert done.code == 1, "for a deploy pipeline"


def test_name_that_a_bridge_alone_hears_leaves(ask: Run, folder: Path) -> None:
    """Other programs hear it, so a deploy goes on; but not if it only comes in here."""
    program = """
    from shop.events import OrderPaid
    from silbo import AsyncEventDispatcher, Bridge, Consumer, EventName
    from silbo.brokers.memory import MemoryBroker
    broker = MemoryBroker("shop")
    paid, any_kind = EventName("order.paid", OrderPaid), EventName("cart.left")
    dispatcher = AsyncEventDispatcher(names=[paid, any_kind])
    dispatcher.add_subscriber(Bridge(broker))
    consumer = Consumer(dispatcher, broker.group("billing", start="new"), own="skip", events=[paid])
    """
    write(folder, {"leaving.py": program})
    done = ask("names", "leaving:dispatcher")
    assert [line.split()[-1] for line in done.out.splitlines()[2:]] == [
        "leaves",
        "leave",
    ] and "1 may leave" in squeezed(done.out)[-1]
    done = ask("names", "leaving:dispatcher", "--unheard")
    assert (done.code, done.out, done.err) == (0, "", "each name is heard, or leaves\n")
    done = ask("names", "leaving:dispatcher", "order.paid", "--unheard")
    assert (done.code, done.err) == (0, "order.paid is heard, or leaves\n")
    shown = squeezed(ask("names", "leaving:dispatcher", "cart.left").out)
    assert shown[-2:] == ["leaves by a bridge, if its event's class has a kind", "listener nobody"]
    done = ask("names", "leaving:consumer", "--unheard", "--json")
    assert (done.code, done.object["name"], done.object["leaves"], done.object["reaches_nobody"]) == (
        1,
        "order.paid",
        True,
        True,
    )


def test_name_that_only_a_misspelt_listener_would_hear(ask: Run, folder: Path) -> None:
    """Of a consumer whose dispatcher declares nothing: the name of `events=` is what the listener should have."""
    program = """
    from silbo import AsyncEventDispatcher, Consumer, EventName
    from silbo.brokers.memory import MemoryBroker
    dispatcher = AsyncEventDispatcher()
    paid = EventName("order.paid")
    consumer = Consumer(dispatcher, MemoryBroker("shop").group("billing", start="new"), events=[paid])
    @dispatcher.listen("order.payed")
    async def invoice(event): ...
    @dispatcher.listen("order.sent")
    async def send(event): ...
    """
    write(folder, {"billing.py": program})
    hint = "nobody hears order.paid; order.payed has listeners: is that misspelt?\n"
    done = ask("names", "billing:consumer")
    assert done.code == 0 and done.err.endswith(hint) and done.err.count("misspelt?") == 1
    done = ask("names", "billing:consumer", "--unheard")
    assert done.code == 1 and done.err.endswith(hint)
    assert "nobody; order.payed has listeners: is that misspelt?" in ask("names", "billing:consumer", "order.paid").out
    write(folder, {"billing.py": program.replace("order.payed", "order.paid")})
    assert ask("names", "billing:consumer", "--unheard").code == 0


def test_unknown_name_is_an_error_with_a_similar_one(ask: Run) -> None:
    done = ask("names", "shop.web:dispatcher", "order.pad")
    assert (done.code, done.out) == (1, "")
    assert done.err == "silbo: the app has no name 'order.pad'; did you mean 'order.paid'?\n"


def test_what_the_app_prints_is_not_in_the_answer(ask: Run, folder: Path) -> None:
    """A program that reads the JSON gets JSON alone."""
    chatty = """
    from contextlib import asynccontextmanager
    from silbo import AsyncEventDispatcher
    print("imported")
    @asynccontextmanager
    async def opened():
        print("opened")
        yield AsyncEventDispatcher(names=[])
        print("closed")
    """
    write(folder, {"chatty.py": chatty})
    done = ask("names", "chatty:opened", "--json")
    assert (done.code, done.out, done.err) == (0, "", "imported\nopened\nclosed\nno names\n")


def test_app_that_declares_nothing_is_told_how(ask: Run, folder: Path) -> None:
    write(folder, {"bare.py": "from silbo import AsyncEventDispatcher\nevents = AsyncEventDispatcher()\n"})
    assert ask("names", "bare:events").err == "no names\n"
    assert ask("listeners", "bare:events").err == "no listeners\n"
    done = ask("plugins", "bare:events")
    assert done.code == 1 and "it has no silbo.Plugins" in done.err
    done = ask("listeners", "bare:events", "order.paid")
    assert (done.code, done.err) == (1, "order.paid: no listener is meant for it\n")
