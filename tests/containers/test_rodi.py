"""The dispatcher in a rodi container."""

from __future__ import annotations

import subprocess
import sys

import pytest
import rodi
import whistle

import silbo
from silbo.containers.rodi import register_dispatcher


class HostDispatcher(silbo.AsyncEventDispatcher):
    pass


class Emitter:
    def __init__(self, dispatcher: whistle.IAsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher


class Plugin:
    def __init__(self, dispatcher: silbo.AsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher


class Untyped:
    def __init__(self, async_event_dispatcher) -> None:  # type: ignore[no-untyped-def]
        self.dispatcher = async_event_dispatcher


@pytest.fixture(params=[False, True], ids=["aliases", "strict"])
def container(request: pytest.FixtureRequest) -> rodi.Container:
    return rodi.Container(strict=request.param)


@pytest.mark.parametrize(
    "asked", [silbo.AsyncEventDispatcher, silbo.IAsyncEventDispatcher, whistle.AsyncEventDispatcher]
)
def test_every_type_gives_the_same_dispatcher_again_and_again(container: rodi.Container, asked: type) -> None:
    """Whatever a component is typed against, there is one dispatcher."""
    dispatcher = register_dispatcher(container)
    assert container.resolve(asked) is container.resolve(asked) is dispatcher


async def test_components_hear_each_other_whatever_they_are_typed_against(container: rodi.Container) -> None:
    """A plugin that asks for silbo's class hears what a component typed against Whistle dispatches."""
    register_dispatcher(container)
    container.register(Emitter)
    container.register(Plugin)
    heard: list[silbo.Event] = []

    async def listener(event: silbo.Event) -> None:
        heard.append(event)

    container.resolve(Plugin).dispatcher.add_listener("my.event", listener)
    event = await container.resolve(Emitter).dispatcher.adispatch("my.event", silbo.Event())
    assert heard == [event]


def test_a_hosts_own_dispatcher_is_found_under_its_class_too(container: rodi.Container) -> None:
    mine = HostDispatcher(on_error="collect")
    assert register_dispatcher(container, mine) is mine
    for asked in (HostDispatcher, silbo.AsyncEventDispatcher, whistle.IAsyncEventDispatcher):
        assert container.resolve(asked) is mine


def test_a_parameter_without_annotation_is_found_by_its_name() -> None:
    """As it is where Whistle's dispatcher alone is registered."""
    container = rodi.Container()
    dispatcher = register_dispatcher(container)
    container.register(Untyped)
    assert container.resolve(Untyped).dispatcher is dispatcher


@pytest.mark.parametrize(
    "taken", [whistle.IAsyncEventDispatcher, whistle.AsyncEventDispatcher, silbo.AsyncEventDispatcher]
)
def test_a_container_that_has_a_dispatcher_is_left_as_it_was(container: rodi.Container, taken: type) -> None:
    """Two dispatchers would not hear each other; half a registration would be just that."""
    container.add_instance(silbo.AsyncEventDispatcher(), taken)
    with pytest.raises(rodi.OverridingServiceException, match=taken.__name__):
        register_dispatcher(container)
    assert [cls for cls, _ in container] == [taken]


@pytest.mark.parametrize("wrong", [whistle.AsyncEventDispatcher(), silbo.AsyncEventDispatcher])
def test_only_an_instance_of_silbos_dispatcher_is_accepted(container: rodi.Container, wrong: object) -> None:
    with pytest.raises(TypeError, match=r"takes a silbo\.AsyncEventDispatcher, not "):
        register_dispatcher(container, wrong)  # type: ignore[type-var]
    assert not list(container)


_HIDING = """
import sys
import silbo
class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hiding())
sys.modules.pop({hidden!r}, None)
try:
    import silbo.containers.rodi
except ImportError as error:
    print(type(error).__name__, "|", error)
"""


def _import_without(hidden: str) -> str:
    script = [sys.executable, "-c", _HIDING.format(hidden=hidden)]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()


def test_without_rodi_the_import_says_what_to_install() -> None:
    wanted = "silbo.containers.rodi needs a library that is not installed: pip install 'silbo[rodi]'"
    assert _import_without("rodi") == f"MissingExtra | {wanted}"


def test_a_broken_rodi_is_not_taken_for_a_missing_one() -> None:
    """What rodi itself can't import is named as it is."""
    assert _import_without("inspect") == "ModuleNotFoundError | No module named 'inspect'"
