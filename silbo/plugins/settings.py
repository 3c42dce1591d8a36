"""The settings of a plugin: a table of the host's, checked by the class that the plugin states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import PurePath
from typing import Any

import msgspec

from silbo._checks import describe_object, suggest_name
from silbo.errors import PluginSettingsInvalid
from silbo.event import declared_fields
from silbo.plugins.plugin import Plugin
from silbo.wire.faults import explain_refusal, to_message_invalid
from silbo.wire.fields import is_root_model

__all__ = ["read_settings", "read_tables"]


def read_settings(plugin: Plugin, source: Mapping[str, Any] | str | PathLike[str] | None) -> Any:
    """Return the settings of a plugin as an object of the class that it states; None if it states none.

    Args:
        plugin: The plugin.
        source: The settings of all plugins, one table for each, under the plugin's name: a mapping, or the path of a TOML file.
            A plugin without a table gets the defaults of its class.

    Raises:
        PluginSettingsInvalid: A key is unknown, also in a table within the table; a value has another type; a field without a
            default is missing; the class refuses the settings; or the file is not TOML.
        OSError: The file can't be read.
    """
    table = read_tables(plugin, source).get(plugin.name, {})
    if not isinstance(table, Mapping):
        raise PluginSettingsInvalid(plugin.name, f"they are a table of settings by name, not {describe_object(table)}")
    cls: Any = plugin.settings
    if cls is None:
        if table:
            raise PluginSettingsInvalid(
                plugin.name, "it takes no settings; remove this one", key=str(next(iter(table)))
            )
        return None
    _check_keys(plugin, cls, table)  # before the class says that a misspelt field is missing
    settings = _convert(plugin, cls, table)
    for inner_cls, inner, place in _find_tables(table, settings):
        _check_keys(plugin, inner_cls, inner, place)
    return settings


def read_tables(plugin: Plugin, source: Any) -> Mapping[str, Any]:
    """Return the settings of all plugins by name, for one of them, which an error names."""
    if source is None or isinstance(source, Mapping):
        return source or {}
    if not isinstance(source, str | PathLike):
        raise TypeError(f"settings are a mapping or the path of a TOML file, not {describe_object(source)}")
    import tomllib  # needed for a file only

    with open(source, "rb") as file:
        try:
            return tomllib.load(file)
        except ValueError as error:
            raise PluginSettingsInvalid(plugin.name, f"{fspath(source)} is not TOML: {error}") from None


def _convert(plugin: Plugin, cls: Any, table: Mapping[str, Any]) -> Any:
    """Return an object of the class; pydantic reads its own."""
    try:
        if not hasattr(cls, "__pydantic_fields__"):
            return msgspec.convert(table, cls, dec_hook=_read_value)
        return cls.model_validate(table) if hasattr(cls, "model_validate") else cls(**table)
    except msgspec.ValidationError as error:
        fault = to_message_invalid(error)
        problem = "missing, and it has no default" if fault.problem == "missing" else fault.problem
        raise PluginSettingsInvalid(plugin.name, problem, key=fault.field) from None
    except Exception as error:  # noqa: BLE001  # the class is any code of the plugin's
        fault = explain_refusal(cls, error, under="")
        # pydantic's own error would show the values, and a setting may be a password.
        cause = None if callable(getattr(error, "errors", None)) else error
        raise PluginSettingsInvalid(plugin.name, fault.problem, key=fault.field) from cause


def _read_value(cls: Any, value: Any) -> Any:
    """Return a value of a type that msgspec does not know: a path, or an object that a mapping has as it is."""
    if isinstance(value, cls):
        return value
    if issubclass(cls, PurePath):
        return cls(value)
    raise ValueError(f"{cls.__qualname__} can't be read from settings")


def _check_keys(plugin: Plugin, cls: type, table: Mapping[str, Any], place: str = "") -> None:
    """Refuse a key that a class of settings does not know.

    Args:
        plugin: The plugin.
        cls: The class.
        table: The settings.
        place: The place of the table, as ``retry.``.
    """
    keys = _known_keys(cls)
    for key in table:
        if keys is not None and key not in keys:
            raise PluginSettingsInvalid(
                plugin.name, f"there is no such setting{suggest_name(str(key), keys)}", key=f"{place}{key}"
            )


def _find_tables(table: Any, value: Any, place: str = "") -> Iterator[tuple[type, Mapping[str, Any], str]]:
    """Yield each table from which an object was made, with the object's class and the table's place."""
    if isinstance(table, Mapping):
        if declared_fields(type(value)) is not None:
            yield type(value), table, place
            keys = _known_keys(type(value)) or {}
            inside = {key: getattr(value, keys.get(key, str(key)), None) for key in table}
        else:
            inside = dict(value) if isinstance(value, Mapping) else {}
        for key, inner in table.items():
            yield from _find_tables(inner, inside.get(key), f"{place}{key}.")
    elif isinstance(table, list | tuple) and isinstance(value, list | tuple):
        for index, (inner, made) in enumerate(zip(table, value, strict=False)):
            yield from _find_tables(inner, made, f"{place.removesuffix('.')}[{index}].")


def _known_keys(cls: Any) -> dict[str, str] | None:
    """Return the attribute that each key of a table is read into; None if any key may stand in it."""
    fields = declared_fields(cls)
    if fields is None or is_root_model(cls):
        return None
    if (models := getattr(cls, "__pydantic_fields__", None)) is not None:
        config = getattr(cls, "model_config", None) or getattr(cls, "__pydantic_config__", {})
        if config.get("extra") is not None:
            return None  # the author has said what becomes of them
        by_name = config.get("populate_by_name") or config.get("validate_by_name")
        return {key: name for name, field in models.items() for key in _model_keys(name, field, by_name)}
    if (encoded := getattr(cls, "__struct_encode_fields__", None)) is not None:
        tag = cls.__struct_config__.tag_field
        return dict(zip(encoded, fields, strict=True)) | ({tag: tag} if tag else {})
    return {name: name for name in fields}


def _model_keys(name: str, field: Any, by_name: Any) -> Iterator[str]:
    """Yield the keys from which pydantic reads a field: its aliases, or its name."""
    alias = field.validation_alias
    if alias is None or by_name:
        yield name
    for choice in getattr(alias, "choices", [alias]):
        if isinstance(choice, str):
            yield choice
        elif choice is not None:
            yield str(choice.path[0])
