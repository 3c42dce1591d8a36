"""The settings of a plugin: checked when they are read, with an error that names plugin, key and what is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

from silbo.errors import PluginSettingsInvalid
from silbo.plugins.plugin import Plugin
from silbo.plugins.settings import read_settings


@dataclass(frozen=True)
class Retry:
    pause: float = 1.0
    attempts: int = 3


@dataclass(frozen=True)
class InDataclass:
    level: int
    folder: Path = Path("/tmp")
    since: date | None = None
    retry: Retry = Retry()
    more: dict[str, list[Retry]] = field(default_factory=dict)


class RetryStruct(msgspec.Struct):
    pause: float = 1.0
    attempts: int = 3


class InStruct(msgspec.Struct):
    level: int
    folder: Path = Path("/tmp")
    since: date | None = None
    retry: RetryStruct = msgspec.field(default_factory=RetryStruct)
    more: dict[str, list[RetryStruct]] = {}


@attrs.frozen
class RetryAttrs:
    pause: float = 1.0
    attempts: int = 3


@attrs.frozen
class InAttrs:
    level: int
    folder: Path = Path("/tmp")
    since: date | None = None
    retry: RetryAttrs = RetryAttrs()
    more: dict[str, list[RetryAttrs]] = attrs.Factory(dict)


class RetryModel(pydantic.BaseModel):
    pause: float = 1.0
    attempts: int = 3


class InModel(pydantic.BaseModel):
    level: int
    folder: Path = Path("/tmp")
    since: date | None = None
    retry: RetryModel = RetryModel()
    more: dict[str, list[RetryModel]] = {}


@pydantic.dataclasses.dataclass
class RetryPydantic:
    pause: float = 1.0
    attempts: int = 3


@pydantic.dataclasses.dataclass
class InPydantic:
    level: int
    folder: Path = Path("/tmp")
    since: date | None = None
    retry: RetryPydantic = field(default_factory=RetryPydantic)
    more: dict[str, list[RetryPydantic]] = field(default_factory=dict)


every_library = pytest.mark.parametrize("cls", [InDataclass, InStruct, InAttrs, InModel, InPydantic])


def setup(view: object, settings: object) -> None: ...


def plugin(cls: Any) -> Plugin:
    return Plugin(setup, name="audit", settings=cls)


def refuse(cls: Any, table: Any) -> PluginSettingsInvalid:
    with pytest.raises(PluginSettingsInvalid) as raised:
        read_settings(plugin(cls), {"audit": table})
    assert raised.value.plugin == "audit"
    assert str(raised.value).startswith("plugin 'audit', setting")
    return raised.value


TOML = """
[audit]
level = 3
folder = "/var"
since = 2026-01-02
retry = {pause = 2}
more.a = [{}, {attempts = 1}]

[other]
adress = "not the business of audit"
"""


@every_library
def test_table_of_a_toml_file_becomes_an_object(cls: Any, tmp_path: Path) -> None:
    file = tmp_path / "plugins.toml"
    file.write_text(TOML)
    found = read_settings(plugin(cls), file)
    assert type(found) is cls
    assert (found.level, found.folder, found.since) == (3, Path("/var"), date(2026, 1, 2))
    assert (found.retry.pause, found.retry.attempts, found.more["a"][1].attempts) == (2, 3, 1)
    assert found == read_settings(plugin(cls), str(file))


@every_library
def test_table_of_a_mapping_becomes_an_object(cls: Any) -> None:
    found = read_settings(plugin(cls), {"audit": {"level": 3, "folder": Path("/var")}, "other": {}})
    assert (found.level, found.folder, found.retry.pause) == (3, Path("/var"), 1)


@pytest.mark.parametrize("source", [None, {}, {"other": {"level": 3}}])
def test_plugin_without_a_table_gets_the_defaults(source: Any) -> None:
    assert read_settings(plugin(Retry), source) == Retry()
    assert read_settings(Plugin(lambda view: None, name="audit"), source) is None


@every_library
def test_missing_field_is_named(cls: Any) -> None:
    assert refuse(cls, {}).key == "level"


def test_text_of_a_missing_field() -> None:
    assert str(refuse(InDataclass, {})) == "plugin 'audit', setting 'level': missing, and it has no default"


@every_library
def test_wrong_type_is_named_with_the_right_one(cls: Any) -> None:
    error = refuse(cls, {"level": "high"})
    assert error.key == "level"
    assert "int" in error.problem
    assert refuse(cls, {"level": 1, "retry": {"attempts": "x"}}).key == "retry.attempts"
    assert refuse(cls, {"level": 1, "more": {"a": [{}, {"pause": "x"}]}}).key in (
        "more.a[1].pause",
        "more[...][1].pause",
    )


def test_text_of_a_wrong_type() -> None:
    text = "plugin 'audit', setting 'level': Expected `int`, got `str`"
    error = refuse(InDataclass, {"level": "high"})
    assert (str(error), error.__cause__) == (text, None)


@every_library
def test_unknown_key_is_answered_with_the_nearest(cls: Any) -> None:
    """Also if the misspelt field has no default, and so is missing."""
    error = refuse(cls, {"lvel": 3})
    assert str(error) == "plugin 'audit', setting 'lvel': there is no such setting; did you mean 'level'?"


@every_library
def test_unknown_key_of_an_inner_table_is_an_error(cls: Any) -> None:
    """Each library would ignore it."""
    error = refuse(cls, {"level": 1, "retry": {"puase": 3}})
    assert str(error) == "plugin 'audit', setting 'retry.puase': there is no such setting; did you mean 'pause'?"
    assert refuse(cls, {"level": 1, "more": {"a": [{}, {"puase": 3}]}}).key == "more.a[1].puase"


def test_unknown_key_like_no_other_is_answered_with_all() -> None:
    assert str(refuse(Retry, {"x": 1})).endswith("there is no such setting; known: 'pause', 'attempts'")


def test_plugin_without_settings_takes_none() -> None:
    with pytest.raises(PluginSettingsInvalid, match="setting 'level': it takes no settings"):
        read_settings(Plugin(lambda view: None, name="audit"), {"audit": {"level": 3}})


# -- names that differ from those of the attributes ---------------------------------------------------------


class Renamed(msgspec.Struct, rename="kebab", tag=True):
    max_size: int = 1
    inner: RetryStruct | None = None


def test_fields_of_a_struct_have_the_names_that_it_gives_them() -> None:
    table = {"max-size": 3, "type": "Renamed", "inner": {"pause": 2}}
    assert read_settings(plugin(Renamed), {"audit": table}) == Renamed(3, RetryStruct(2))
    assert refuse(Renamed, {"max_size": 3}).problem.endswith("did you mean 'max-size'?")
    assert refuse(Renamed, {"inner": {"puase": 3}}).key == "inner.puase"


class Aliased(pydantic.BaseModel):
    size: int = pydantic.Field(1, alias="max-size")
    level: int = pydantic.Field(
        1, validation_alias=pydantic.AliasChoices("level", "old-level", pydantic.AliasPath("old", "level"))
    )


class ByName(Aliased):
    model_config = pydantic.ConfigDict(populate_by_name=True)


def test_fields_of_a_model_have_their_aliases() -> None:
    for table in ({"max-size": 3, "old-level": 2}, {"max-size": 3, "old": {"level": 2}}):
        found = read_settings(plugin(Aliased), {"audit": table})
        assert (found.size, found.level) == (3, 2)
    assert refuse(Aliased, {"size": 3}).problem.endswith("did you mean 'max-size'?")
    assert read_settings(plugin(ByName), {"audit": {"size": 3}}).size == 3


@pytest.mark.parametrize("extra", ["allow", "ignore"])
def test_model_that_says_what_becomes_of_other_keys_is_heard(extra: Any) -> None:
    class Open(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra=extra)
        level: int = 1

    assert read_settings(plugin(Open), {"audit": {"x": 3}}).level == 1


def test_root_model_has_any_keys() -> None:
    levels = pydantic.RootModel[dict[str, int]]
    assert read_settings(plugin(levels), {"audit": {"x": 3}}).root == {"x": 3}


# -- refusals -----------------------------------------------------------------------------------------------


@dataclass
class Checked:
    level: int

    def __post_init__(self) -> None:
        if self.level < 0:
            raise ValueError("a level is not negative")
        if self.level > 9:
            raise LookupError("no such level")


def test_class_may_refuse_its_settings() -> None:
    assert "a level is not negative" in str(refuse(Checked, {"level": -1}))
    error = refuse(Checked, {"level": 10})
    assert "Checked refuses it: LookupError: no such level" in str(error)
    assert isinstance(error.__cause__, LookupError)


class Client: ...


@dataclass
class WithObjects:
    thing: object
    client: Client | None = None


def test_objects_are_taken_as_they_are_and_not_made_of_text() -> None:
    client = Client()
    assert read_settings(plugin(WithObjects), {"audit": {"thing": 1, "client": client}}).client is client
    assert str(refuse(WithObjects, {"thing": 1, "client": "x"})) == (
        "plugin 'audit', setting 'client': Client can't be read from settings"
    )


@pydantic.dataclasses.dataclass
class Limited:
    level: int = pydantic.Field(gt=3)


def test_pydantic_checks_its_own_dataclasses() -> None:
    error = refuse(Limited, {"level": 1})
    assert (error.key, error.problem) == ("level", "Input should be greater than 3")


class Secret(pydantic.BaseModel):
    password: int

    @pydantic.model_validator(mode="after")
    def refuse_all(self) -> Secret:
        raise ValueError("refused")


@pytest.mark.parametrize("password", ["hunter2", 4711])
def test_error_does_not_show_values(password: Any) -> None:
    """Errors go to logs, and settings hold passwords."""
    error = refuse(Secret, {"password": password})
    assert str(password) not in str(error)
    assert error.__cause__ is None


@pytest.mark.parametrize("table", [3, "level", ["level"]])
def test_table_that_is_none_is_refused(table: Any) -> None:
    assert refuse(Retry, table).problem.startswith("they are a table of settings by name, not ")


def test_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a mapping or the path of a TOML file"):
        read_settings(plugin(Retry), [("audit", {})])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        read_settings(plugin(Retry), tmp_path / "absent.toml")


def test_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "plugins.toml"
    for content in (b"[audit\n", b"[audit]\nx = '\xff'\n"):
        file.write_bytes(content)
        with pytest.raises(PluginSettingsInvalid) as raised:
            read_settings(plugin(Retry), file)
        assert str(raised.value).startswith(f"plugin 'audit', settings: {file} is not TOML: ")
