"""Readers of values: JSON to the type that an annotation asks for, at every depth of an event.

One file, for the readers call one another: a class is read by its fields, a field by its annotation, which names classes.

msgspec reads what it reads faithfully, in one call. Everything else is read here. A reader is made once for each class of
events; making it refuses what JSON can't give back.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections import abc
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Final, ForwardRef, Literal, TypeVar, Union, Unpack, get_args, get_origin
from uuid import UUID

import msgspec

from silbo.errors import MessageInvalid
from silbo.wire.encode import Unwritable, to_json_value
from silbo.wire.faults import explain_refusal, to_message_invalid
from silbo.wire.fields import encoded_fields, has_serializer, is_root_model, wire_names
from silbo.wire.hints import find_hints, is_alias, required_keys, resolve_alias, resolve_self, resolve_variable
from silbo.wire.shapes import find_overlap

__all__ = ["Constructor", "FieldReader", "Reader", "convert_custom", "model_steps", "object_fields", "place_error"]

Reader = Callable[[Any], Any]
"""Converts a JSON value; raises an error if it does not fit."""
Seen = dict[Any, "_ObjectReader | _AliasReader"]
"""The readers of classes and aliases that are being made, by annotation: each may contain itself."""

_AS_IT_IS: Final = frozenset({Any, object, None, NoneType, str, int, float, bool, msgspec.UnsetType})
_SCALARS: Final = frozenset({bytes, bytearray, memoryview, UUID, datetime, date, time, timedelta, Decimal})
_JSON_TYPES: Final[tuple[tuple[type, type], ...]] = (
    (str, str),
    (int, int),
    (float, float),
    (UUID, str),
    (Decimal, str),
    (date, str),
)
"""The base of a host's own class of values, and the type of its JSON."""
_LISTS: Final[dict[Any, Callable[[Any], Any]]] = {
    list: list,
    abc.Sequence: list,
    abc.MutableSequence: list,
    abc.Collection: list,
    set: set,
    abc.Set: set,
    abc.MutableSet: set,
    frozenset: frozenset,
}
_MAPPINGS: Final = (dict, abc.Mapping, abc.MutableMapping)


def find_reader(hint: Any, seen: Seen) -> Reader | None:
    """Return the reader of an annotation; None if msgspec reads it faithfully.

    Raises:
        TypeError: JSON can't give its values back.
    """
    if isinstance(hint, TypeVar):
        return _read_with(resolve_variable(hint), seen)
    if is_alias(hint):
        return _alias_reader(hint, seen)
    if (real := resolve_alias(hint)) is not hint:
        return _read_with(real, seen)
    if hint in _AS_IT_IS or hint in _SCALARS:
        return None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return find_reader(arguments[0], seen)
    if origin is Literal:
        return _literal_reader(arguments)
    if origin in (Union, UnionType):
        return _union_reader(hint, arguments, seen)
    kind = origin or hint
    if kind in _LISTS:
        return _list_reader(hint, _LISTS[kind], arguments, seen)
    if kind in _MAPPINGS:
        return _mapping_reader(hint, arguments, seen)
    if kind is tuple:
        return _tuple_reader(hint, arguments, seen)
    if not isinstance(kind, type):
        raise _unreadable(hint)
    if typing.is_typeddict(kind):
        return _typed_dict_reader(kind, arguments, seen)
    if issubclass(kind, Enum):
        return _enum_reader(kind)
    if wire_names(kind)[0] != "plain":
        return _object_reader(hint, kind, arguments, seen)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _named_tuple_reader(kind, arguments, seen)
    if any(issubclass(kind, base) for base, _ in _JSON_TYPES):
        return None
    raise _unreadable(hint)


def _unreadable(hint: Any) -> TypeError:
    if isinstance(hint, ForwardRef):
        name = hint.__forward_arg__
        return TypeError(
            f"its annotation names {name!r}, which can't be resolved here; write an alias that names itself as "
            f"TypeAliasType({name!r}, ...), or Any for any JSON value"
        )
    return TypeError(f"its annotation {hint!r} can't be read from JSON")


def _read_with(hint: Any, seen: Seen) -> Reader:
    return find_reader(hint, seen) or _read_by_msgspec(hint)


class _AliasReader:
    """The reader of an alias that names itself, ``type Tree = dict[str, Tree] | int``, where it does."""

    contains_itself = False
    read: Reader

    def __call__(self, value: Any) -> Any:
        return self.read(value)


def _alias_reader(hint: Any, seen: Seen) -> Reader:
    if hint in seen:
        return seen[hint]
    reader = seen[hint] = _AliasReader()
    try:
        reader.read = _read_with(resolve_alias(hint), seen)
    finally:
        del seen[hint]
    return reader.read


def _read_by_msgspec(hint: Any) -> Reader:
    return partial(msgspec.convert, type=hint, dec_hook=convert_custom, str_keys=True)


def _is_supported(hint: Any) -> bool:
    try:
        msgspec.json.Decoder(hint)
    except (TypeError, NameError, AttributeError):
        return False
    return True


def convert_custom(kind: Any, value: Any) -> Any:
    """Return a value of a type that msgspec asks for and does not know: ``object``, or a class derived from one of its own.

    Raises:
        TypeError: it is another type, or the JSON is of another one.
    """
    if kind is object:
        return value
    for base, json in _JSON_TYPES:
        if isinstance(kind, type) and issubclass(kind, base) and type(value) is json:
            make: Any = kind
            return getattr(make, "fromisoformat", make)(value)
    raise TypeError(f"{getattr(kind, '__qualname__', kind)} can't be read from JSON")


def _read_under(step: str, reader: Reader, value: Any) -> Any:
    """Read a value inside of another; an error names its place."""
    try:
        return reader(value)
    except Exception as error:  # also the host's constructors
        raise place_error(error, step) from error


def place_error(error: Exception, step: str) -> MessageInvalid:
    """Return an error of a reader as ours, with one step in front of its place."""
    found = error if isinstance(error, MessageInvalid) else to_message_invalid(error)
    if found.field:
        step += found.field if found.field.startswith("[") else f".{found.field}"
    placed = MessageInvalid(found.problem, field=step)
    placed.__cause__ = found.__cause__
    return placed


# -- values -------------------------------------------------------------------------------------------------


def _choose(choices: list[tuple[Any, Any]], what: object) -> Reader:
    """Return a reader that finds a value by its JSON.

    Raises:
        TypeError: two values have the same JSON.
    """
    for index, (json, _) in enumerate(choices):
        if any(json == other and type(json) is type(other) for other, _ in choices[:index]):
            raise TypeError(f"two values of {what!r} are {json!r} as JSON")

    def read(value: Any) -> Any:
        for json, member in choices:
            if json == value and type(json) is type(value):
                return member
        raise ValueError(f"invalid enum value {value!r}, none of {[json for json, _ in choices]!r}")

    return read


def _literal_reader(values: tuple[Any, ...]) -> Reader | None:
    if all(type(value) in (str, int, NoneType) for value in values):
        return None
    return _choose([(to_json_value(value), value) for value in values], Literal[values])


def _enum_reader(kind: type[Enum]) -> Reader | None:
    if issubclass(kind, Flag):
        return partial(_read_flag, kind)
    if kind.__dict__.get("_missing_") is None and _is_supported(kind):
        return None
    try:
        return _choose([(to_json_value(member.value), member) for member in kind], kind)
    except Unwritable as error:
        raise TypeError(f"{kind.__qualname__}: {error.problem}") from None


def _read_flag(kind: type[Flag], value: Any) -> Flag:
    if type(value) is not int:
        raise ValueError(f"expected `int`, got {value!r}")
    return kind(value)


class _UnionUnclear(TypeError):
    """Two members of a union have values that are the same in JSON."""


def _union_reader(hint: Any, members: tuple[Any, ...], seen: Seen) -> Reader | None:
    readers = [(member, find_reader(member, seen)) for member in members]
    if (overlap := find_overlap(members)) is not None:
        raise _UnionUnclear(f"JSON can't tell {overlap[0]!r} from {overlap[1]!r}")
    if all(reader is None for _, reader in readers) and _is_supported(hint):
        return None
    # A text in the form of a UUID or a time is read as such, so plain text comes last.
    ordered = sorted(readers, key=lambda pair: pair[0] is str)
    return partial(_read_union, [reader or _read_by_msgspec(member) for member, reader in ordered])


def _read_union(readers: list[Reader], value: Any) -> Any:
    """Return the value of the first reader whose result is written as the same JSON again, else of the first that takes it."""
    taken: list[Any] = []
    errors: list[str] = []
    for reader in readers:
        try:
            candidate = reader(value)
            if _is_same(to_json_value(candidate), value):
                return candidate
            taken.append(candidate)
        except Exception as error:  # noqa: BLE001  # also the host's constructors
            errors.append(str(error))
    if taken:
        return taken[0]
    raise ValueError(f"fits none of {len(readers)} types: {'; '.join(errors)}")


def _is_same(one: Any, other: Any) -> bool:
    """Return True if two JSON values are written alike: unlike for Python, 1 is neither 1.0 nor true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other) and _number_of(one) is _number_of(other)


def _number_of(json: Any) -> type | None:
    return next((kind for kind in (bool, int, float) if isinstance(json, kind)), None)


# -- containers ---------------------------------------------------------------------------------------------


def _list_reader(hint: Any, make: Callable[[Any], Any], arguments: tuple[Any, ...], seen: Seen) -> Reader | None:
    reader = find_reader(arguments[0], seen) if arguments else None
    if reader is None:
        return None if _is_supported(hint) else _refuse(hint)

    def read(value: Any) -> Any:
        return make(_read_items(value, lambda _: reader))

    return read


def _refuse(hint: Any) -> Reader:
    raise _unreadable(hint)


def _read_items(value: Any, reader_at: Callable[[int], Reader]) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"expected `array`, got {type(value).__name__}")
    return [_read_under(f"[{index}]", reader_at(index), item) for index, item in enumerate(value)]


def _tuple_reader(hint: Any, arguments: tuple[Any, ...], seen: Seen) -> Reader | None:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return _list_reader(hint, tuple, arguments[:1], seen)
    if any(get_origin(argument) is Unpack or getattr(argument, "__unpacked__", False) for argument in arguments):
        raise _unreadable(hint)
    found = [find_reader(argument, seen) for argument in arguments]
    if all(reader is None for reader in found):
        return None if _is_supported(hint) else _refuse(hint)
    readers = [reader or _read_by_msgspec(item) for reader, item in zip(found, arguments, strict=True)]
    return lambda value: tuple(_read_fixed(value, readers))


def _read_fixed(value: Any, readers: list[Reader]) -> list[Any]:
    if type(value) is list and len(value) != len(readers):
        raise ValueError(f"expected `array` of length {len(readers)}, got {len(value)}")
    return _read_items(value, readers.__getitem__)


def _mapping_reader(hint: Any, arguments: tuple[Any, ...], seen: Seen) -> Reader | None:
    if not arguments:
        return None
    key, item = arguments
    if (real := resolve_alias(key)) is not key:
        return _read_with((get_origin(hint) or dict)[real, item], seen)
    keys: Any = dict[key, Any]  # type: ignore[valid-type]  # a type of the host's
    if find_reader(key, seen) is not None or not _is_key(key) or not _is_supported(keys):
        raise TypeError(f"keys of {hint!r} can't be read from JSON")
    reader = find_reader(item, seen)
    if reader is None:
        return None if _is_supported(hint) else _refuse(hint)

    def read(value: Any) -> Any:
        found: dict[Any, Any] = msgspec.convert(value, keys, dec_hook=convert_custom, str_keys=True)
        return {name: _read_under(str(name), reader, inside) for name, inside in found.items()}

    return read


def _is_key(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _is_key(get_args(hint)[0])
    if get_origin(hint) is Literal or hint is Any:
        return True
    return isinstance(hint, type) and get_origin(hint) is None and not issubclass(hint, bool | NoneType | tuple)


def _typed_dict_reader(kind: Any, arguments: tuple[Any, ...], seen: Seen) -> Reader | None:
    written = find_hints(kind, arguments)
    hints = {name: resolve_alias(hint) for name, hint in written.items()}
    found = {name: find_reader(hint, seen) for name, hint in hints.items()}
    if not arguments and not any(found.values()) and _is_supported(kind):
        return None
    fields = FieldReader({name: (name, hint) for name, hint in hints.items()}, seen)
    required = required_keys(kind, written)

    def read(value: Any) -> Any:
        values = fields.read(_expect_object(value))
        for name in required:
            if name not in values:
                raise MessageInvalid("missing", field=name)
        return values

    return read


def _named_tuple_reader(kind: Any, arguments: tuple[Any, ...], seen: Seen) -> Reader | None:
    hints = find_hints(kind, arguments)
    hints = {name: hints.get(name, Any) for name in kind._fields}
    found = [find_reader(hint, seen) for hint in hints.values()]
    if not arguments and all(reader is None for reader in found):
        return None
    readers = [reader or _read_by_msgspec(hint) for reader, hint in zip(found, hints.values(), strict=True)]
    return lambda value: kind(*_read_fixed(value, readers))


def _expect_object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"expected `object`, got {type(value).__name__}")
    return value


# -- fields of a class --------------------------------------------------------------------------------------


class FieldReader:
    """Converts a payload to the annotated types of a class: in one call what msgspec reads, the other fields one by one.

    Args:
        fields: The wire name and annotation of each attribute.
        seen: The classes whose readers are being made.

    Raises:
        TypeError: JSON can't give back the values of an annotation; the error names the attribute.
    """

    def __init__(self, fields: Mapping[str, tuple[str, Any]], seen: Seen) -> None:
        self._apart: dict[str, tuple[str, Reader]] = {}  # fields that msgspec does not read
        self._together: list[str] = []
        self._hints: dict[str, Any] = {}
        columns: list[tuple[str, Any, Any]] = []
        for attribute, (wire, hint) in fields.items():
            try:
                reader = find_reader(hint, seen)
            except (TypeError, Unwritable) as error:
                raise TypeError(f"{attribute}: {error}") from None
            if reader is None:
                columns.append((f"f{len(columns)}", hint, msgspec.field(name=wire, default=msgspec.UNSET)))
                self._together.append(attribute)
                self._hints[wire] = hint
            else:
                self._apart[attribute] = (wire, reader)
        self.is_native = not self._apart
        self._struct = msgspec.defstruct("Fields", columns)

    def read(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the attributes that the payload has.

        Raises:
            MessageInvalid: a value does not fit its annotation; the error names the field.
        """
        try:
            found = msgspec.convert(payload, self._struct, dec_hook=convert_custom, str_keys=True)
        except Exception as error:  # also the host's constructors
            for wire, hint in self._hints.items():  # each on its own, to name the field at fault
                if wire in payload:
                    _read_under(wire, _read_by_msgspec(hint), payload[wire])
            raise to_message_invalid(error) from error
        pairs = zip(self._together, msgspec.structs.astuple(found), strict=True)
        values = {attribute: value for attribute, value in pairs if value is not msgspec.UNSET}
        for attribute, (wire, reader) in self._apart.items():
            if wire in payload:
                values[attribute] = _read_under(wire, reader, payload[wire])
        return values


class Constructor:
    """A callable that makes an object of a class: ``__init__`` gets the values that it takes, the others are set after it.

    If ``__init__`` requires an argument that no message has (a service, an ``InitVar``), it is not called, as in pickle. If
    it has a default for one, all values are set after it: it may have computed them with another argument than the sender's.

    Args:
        cls: The class.
        names: The wire name of each declared attribute; empty for a plain class.
    """

    def __init__(self, cls: Any, names: Mapping[str, str]) -> None:
        self._cls = cls
        self._names = names
        self._parameters, self._passes_on = _find_parameters(cls)

    def __call__(self, values: dict[str, Any]) -> Any:
        """Return an object with these values, by attribute."""
        left = dict(values)
        args: list[Any] = []
        options: dict[str, Any] = {}
        sets_all = False
        for name, attribute, by_position, required in self._parameters or ():
            if attribute in left:
                if by_position:
                    args.append(left.pop(attribute))
                else:
                    options[name] = left.pop(attribute)
            elif required and attribute in self._names:
                raise MessageInvalid("missing", field=self._names[attribute])
            elif required:
                return self._without_init(values)
            elif attribute not in self._names:
                sets_all = True
        if self._parameters is None:
            return self._without_init(values)
        try:
            made = self._cls(*args, **options)
        except TypeError:
            if not self._passes_on:
                raise
            return self._without_init(values)  # its __init__ gives the next one an argument of its own
        return _set_attributes(made, values if sets_all else left)

    def find_keywords(self) -> dict[str, str] | None:
        """Return the attribute of each keyword, if a call with all attributes as keywords does what a call of this does; else None."""
        parameters = self._parameters
        if parameters is None or self._passes_on or any(parameter.by_position for parameter in parameters):
            return None
        keywords = {parameter.name: parameter.attribute for parameter in parameters}
        return keywords if {*keywords.values()} == self._names.keys() else None

    def _without_init(self, values: Mapping[str, Any]) -> Any:
        return _set_attributes(self._cls.__new__(self._cls), values)


class _Parameter(typing.NamedTuple):
    name: str
    attribute: str
    by_position: bool
    required: bool


def _find_parameters(cls: type) -> tuple[list[_Parameter] | None, bool]:
    """Return the parameters of a class's constructor, and True if it passes some on to the constructors of its bases.

    The parameters are None if they can't be known.
    """
    if issubclass(cls, msgspec.Struct):  # its own signature would resolve its annotations anew
        return _struct_parameters(cls), False
    try:
        signature = inspect.signature(cls)
    except (ValueError, TypeError):
        return None, False
    attributes = {field.alias: field.name for field in getattr(cls, "__attrs_attrs__", ())}
    found: dict[str, _Parameter] = {}
    chain = [signature]
    inits = [vars(base)["__init__"] for base in cls.__mro__ if inspect.isfunction(vars(base).get("__init__"))]
    while _has(chain[-1], inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL) and len(inits) > len(chain):
        chain.append(inspect.signature(partial(inits[len(chain)], None)))
    for signature in chain:
        for name, parameter in signature.parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                by_position = parameter.kind is parameter.POSITIONAL_ONLY or (
                    signature is not chain[0] and not _has(chain[0], parameter.VAR_KEYWORD)
                )
                required = parameter.default is parameter.empty
                found.setdefault(name, _Parameter(name, attributes.get(name, name), by_position, required))
    parameters = list(found.values())
    if any(parameter.by_position for parameter in parameters) and len(chain) > 1:
        # `*args` come after all other parameters, so those are given by position, too.
        parameters = [
            parameter._replace(by_position=not _is_keyword_only(chain, parameter.name)) for parameter in parameters
        ]
    return parameters, len(chain) > 1


def _struct_parameters(cls: type[msgspec.Struct]) -> list[_Parameter]:
    fields, defaults = cls.__struct_fields__, cls.__struct_defaults__
    given = (msgspec.NODEFAULT,) * (len(fields) - len(defaults)) + defaults
    return [
        _Parameter(name, name, by_position=False, required=default is msgspec.NODEFAULT)
        for name, default in zip(fields, given, strict=True)
    ]


def _has(signature: inspect.Signature, *kinds: Any) -> bool:
    return any(parameter.kind in kinds for parameter in signature.parameters.values())


def _is_keyword_only(chain: list[inspect.Signature], name: str) -> bool:
    found = [signature.parameters[name] for signature in chain if name in signature.parameters]
    return found[0].kind is inspect.Parameter.KEYWORD_ONLY


def _set_attributes(event: Any, values: Mapping[str, Any]) -> Any:
    for attribute, value in values.items():
        object.__setattr__(event, attribute, value)  # also on a frozen object
    return event


# -- objects inside of events -------------------------------------------------------------------------------


class _ObjectReader:
    """The reader of a class inside of an event; its steps are filled in when its fields are known."""

    read: Callable[[Any], Any]
    build: Callable[[Any], Any]
    contains_itself = False

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __call__(self, value: Any) -> Any:
        values = self.read(value)
        try:
            return self.build(values)
        except Exception as error:  # noqa: BLE001  # the host's own constructor and validators
            refused = explain_refusal(self._cls, error, under="")
            raise refused from (None if refused is error else error)


def _object_reader(hint: Any, cls: type, arguments: tuple[Any, ...], seen: Seen) -> Reader | None:
    if hint in seen:
        seen[hint].contains_itself = True
        return seen[hint]
    reader = seen[hint] = _ObjectReader(cls)
    library, names = wire_names(cls)
    try:
        if library == "pydantic":
            reader.read, reader.build = model_steps(cls, names, seen)
            return reader
        fields = object_fields(cls, names, arguments)
        field_reader = FieldReader(fields, seen)
        is_generic = bool(arguments or getattr(cls, "__orig_bases__", ()))
        if field_reader.is_native and not reader.contains_itself and not is_generic and _is_ordinary(cls, library):
            return None
    except TypeError as error:
        raise TypeError(f"{cls.__qualname__}.{error}") from None
    finally:
        del seen[hint]
    reader.read = partial(_read_struct, cls, field_reader, names) if library == "struct" else _read_fields(field_reader)
    reader.build = Constructor(cls, names)
    return reader


def object_fields(cls: type, names: Mapping[str, str], arguments: tuple[Any, ...] = ()) -> dict[str, tuple[str, Any]]:
    """Return the wire name and annotation of each attribute of a class.

    Raises:
        TypeError: an annotation can't be resolved.
    """
    types = {field.name: field.type for field in getattr(cls, "__attrs_attrs__", ()) if field.type is not None}
    hints = types | find_hints(cls, arguments)
    return {name: (wire, hints.get(name, Any)) for name, wire in names.items()}


def _read_fields(fields: FieldReader) -> Reader:
    return lambda value: fields.read(_expect_object(value))


def _read_struct(cls: Any, fields: FieldReader, names: Mapping[str, str], value: Any) -> dict[str, Any]:
    config = cls.__struct_config__
    if config.array_like:
        if type(value) is not list:
            raise ValueError(f"expected `array`, got {type(value).__name__}")
        wires = [*([] if config.tag is None else [config.tag_field]), *names.values()]
        value = dict(zip(wires, value, strict=False))
    elif config.forbid_unknown_fields and (unknown := {*_expect_object(value)} - {*names.values(), config.tag_field}):
        raise ValueError(f"unknown field {min(unknown)!r}")
    if config.tag is not None and _expect_object(value).get(config.tag_field, config.tag) != config.tag:
        raise ValueError(f"invalid value {value[config.tag_field]!r} of its tag")
    return fields.read(_expect_object(value))


def _is_ordinary(cls: Any, library: str) -> bool:
    """Return True if msgspec's own way to make objects of a class has the same effect as its constructor."""
    if library == "struct":
        return True
    if any(wire != name for name, wire in wire_names(cls)[1].items()):
        return False
    source = getattr(getattr(cls.__init__, "__code__", None), "co_filename", "")
    if library == "attrs":
        return source.startswith("<attrs generated") and all(
            field.init and field.validator is None and field.converter is None and not _takes_self(field)
            for field in cls.__attrs_attrs__
        )
    init = [field.name for field in dataclasses.fields(cls) if field.init]
    return source == "<string>" and [*inspect.signature(cls).parameters] == [*wire_names(cls)[1]] == init


def _takes_self(field: Any) -> bool:
    return bool(getattr(field.default, "takes_self", False))


# -- pydantic models ----------------------------------------------------------------------------------------


def model_steps(cls: Any, names: Mapping[str, str], seen: Seen) -> tuple[Reader, Reader]:
    """Return the two steps that rebuild a pydantic model: read its fields, validate them.

    Values are converted as their annotations ask, bytes from base64. A value that does not fit is left to pydantic's own
    conversions and error texts, unless it holds bytes or an object.

    Raises:
        TypeError: a field can't be read back: what is written of it is not what is read.
    """
    models = cls.__pydantic_fields__
    for name, field in models.items():
        if name not in names and field.is_required():
            raise TypeError(f"{name}: it is required, and exclude=True holds it back")
    if _refuse_serializers(cls):
        return (lambda value: value), cls.model_validate
    readers = {name: _field_step(cls, name, resolve_self(models[name].annotation, cls), seen) for name in names}
    if is_root_model(cls):
        return readers["root"], cls.model_validate
    keys = {name: _validation_key(cls, name) for name in names}
    by_name = None in keys.values()  # an alias that is only a path: names are taken for all fields
    if by_name:
        keys = dict.fromkeys(names)
    options = {"by_alias": False, "by_name": True} if by_name else {}
    keeps_extras = cls.model_config.get("extra") == "allow"

    def read(value: Any) -> Any:
        payload = _expect_object(value)
        values: dict[str, Any] = {}
        for name, wire in names.items():
            if wire in payload:
                values[keys[name] or name] = _read_under(wire, readers[name], payload[wire])
        if keeps_extras:
            wires = set(names.values())
            values.update((key, extra) for key, extra in payload.items() if key not in wires and key not in values)
        return values

    return read, partial(cls.model_validate, **options)


def _validation_key(cls: Any, name: str) -> str | None:
    """Return the key under which a model reads a field; None if the field has only paths."""
    if cls.model_config.get("validate_by_alias") is False:
        return name
    alias = cls.__pydantic_fields__[name].validation_alias
    if alias is None:
        return name
    return next((choice for choice in getattr(alias, "choices", (alias,)) if isinstance(choice, str)), None)


def _refuse_serializers(cls: Any) -> bool:
    """Return True if a model writes and reads itself as a whole: with a serializer and a validator of the model.

    Raises:
        TypeError: a serializer has no validator that reads what it writes.
    """
    decorators = cls.__pydantic_decorators__
    if decorators.model_serializers:
        if not decorators.model_validators:
            raise TypeError("its model_serializer has no model_validator that reads what it writes")
        return True
    for name in cls.__pydantic_fields__:
        if has_serializer(cls, name) and not _has_validator(cls, name):
            raise TypeError(f"{name}: its serializer has no validator that reads what it writes")
    return False


def _has_validator(cls: Any, name: str) -> bool:
    decorators = cls.__pydantic_decorators__
    if decorators.model_validators or name in encoded_fields(cls):
        return True
    if any({name, "*"} & {*decorator.info.fields} for decorator in decorators.field_validators.values()):
        return True
    kinds = ("BeforeValidator", "AfterValidator", "PlainValidator", "WrapValidator")
    return any(type(item).__name__ in kinds for item in cls.__pydantic_fields__[name].metadata)


def _field_step(cls: Any, name: str, hint: Any, seen: Seen) -> Reader:
    if has_serializer(cls, name):
        return lambda value: value
    try:
        reader = _read_with(hint, seen)
    except TypeError as error:
        if (
            _holds_objects(hint)
            or (isinstance(error, _UnionUnclear) and not _has_validator(cls, name))  # pydantic takes the text
            or isinstance(hint, TypeVar)
            or (get_args(hint) and getattr(hint, "__parameters__", ()))
        ):
            raise TypeError(f"{name}: {error}") from None
        return lambda value: value  # a type of pydantic's own
    if _holds_objects(hint):
        return reader

    def read(value: Any) -> Any:
        try:
            return reader(value)
        except Exception:  # noqa: BLE001  # pydantic says it better
            return value

    return read


def _holds_objects(hint: Any, aliases: frozenset[Any] = frozenset()) -> bool:
    """Return True if an annotation contains a type that pydantic does not read from plain JSON values.

    Those are bytes, members of an enum in a ``Literal``, and classes whose names on the wire pydantic does not know.
    """
    if hint in aliases:
        return False
    if is_alias(hint):
        return _holds_objects(resolve_alias(hint), aliases | {hint})
    hint = resolve_alias(hint)
    if isinstance(hint, type) and not get_args(hint):
        return (
            issubclass(hint, bytes | bytearray | memoryview | tuple)
            or typing.is_typeddict(hint)
            or (wire_names(hint)[0] != "plain")
        )
    origin = get_origin(hint)
    if origin is Literal:
        return any(isinstance(value, Enum) for value in get_args(hint))
    return any(_holds_objects(inner, aliases) for inner in get_args(hint)) or (
        isinstance(origin, type) and wire_names(origin)[0] != "plain"
    )
