"""The annotations of a class: strings, type parameters of generic bases and aliases resolved."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    LiteralString,
    NotRequired,
    Protocol,
    Required,
    Self,
    TypeVar,
    TypeVarTuple,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

__all__ = [
    "find_hints",
    "find_init_hints",
    "is_alias",
    "required_keys",
    "resolve_alias",
    "resolve_self",
    "resolve_variable",
]


def find_hints(cls: type, arguments: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the annotations of a class and its bases; type parameters are replaced as the bases fix them, ``Self`` by the class.

    Args:
        cls: Any class.
        arguments: The type arguments of the class itself, as ``(int,)`` for ``Box[int]``.

    Raises:
        TypeError: an annotation can't be resolved.
    """
    return _collect(cls, arguments, init=False)


def required_keys(kind: Any, hints: Mapping[str, Any]) -> set[str]:
    """Return the keys that a value of a TypedDict has at least.

    Args:
        kind: The TypedDict. Its own ``__required_keys__`` takes no note of annotations that are strings.
        hints: Its resolved hints, with ``Required`` and ``NotRequired``.
    """
    marks = {name: get_origin(hint) for name, hint in hints.items()}
    named = {name for name, mark in marks.items() if mark is Required}
    return named | {name for name in kind.__required_keys__ if marks.get(name) is not NotRequired}


def find_init_hints(cls: type) -> dict[str, Any]:
    """Return the annotations of the arguments of a class's ``__init__`` and of those of its bases.

    Raises:
        TypeError: an annotation can't be resolved.
    """
    return _collect(cls, (), init=True)


def _collect(cls: type, arguments: Sequence[Any], *, init: bool) -> dict[str, Any]:
    bound = _bind_parameters(cls, arguments)
    hints: dict[str, Any] = {}
    try:
        # A TypedDict has none of its bases in its __mro__, and all of their annotations.
        bases = tuple(bound) if is_typeddict(cls) else cls.__mro__
        for base in reversed(bases):
            holder: Any = vars(base).get("__init__") if init else base
            own = inspect.get_annotations(holder) if inspect.isfunction(holder) or isinstance(holder, type) else {}
            if is_typeddict(base):
                own = _own_keys(base, own)
            if own:
                # Type parameters of `class Box[T]`; without them get_type_hints looks into the class first, as it should.
                scope = {parameter.__name__: parameter for parameter in getattr(base, "__type_params__", ())}
                resolved = get_type_hints(holder, localns=scope or None, include_extras=True)
                hints.update({name: _substitute(resolved[name], bound.get(base, {})) for name in own})
    except Exception as error:  # noqa: BLE001  # annotations are any code of the host's
        raise TypeError(
            f"the annotations of {cls.__qualname__} can't be resolved ({error}); define the classes that they name at the "
            "top of its module, neither inside of a function nor under TYPE_CHECKING"
        ) from None
    hints.pop("return", None)
    own_type: Any = cls
    if arguments:
        own_type = own_type[tuple(arguments)]
    return {
        name: resolve_self(hint, own_type)
        for name, hint in hints.items()
        if hint is not ClassVar and get_origin(hint) is not ClassVar
    }


def _own_keys(cls: type, annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Return the annotations of a TypedDict without those that its bases gave it."""
    inherited: dict[str, Any] = {}
    for base in vars(cls).get("__orig_bases__", ()):
        inherited.update(getattr(get_origin(base) or base, "__annotations__", {}))
    return {name: hint for name, hint in annotations.items() if inherited.get(name) != hint}


def _bind_parameters(cls: type, arguments: Sequence[Any]) -> dict[type, dict[Any, Any]]:
    """Return the type arguments of a class and each of its bases, by parameter."""
    bound: dict[type, dict[Any, Any]] = {}

    def visit(cls: type, arguments: Sequence[Any]) -> None:
        if arguments or cls not in bound:
            bound[cls] = _pair(getattr(cls, "__parameters__", ()), arguments)
        for base in vars(cls).get("__orig_bases__", cls.__bases__):
            origin: Any = get_origin(base) or base
            if isinstance(origin, type) and origin not in (object, Generic, Protocol):
                visit(origin, _substitute_all(get_args(base), bound[cls]))

    visit(cls, arguments)
    return bound


def _pair(parameters: Sequence[Any], arguments: Sequence[Any]) -> dict[Any, Any]:
    """Return the argument of each type parameter; of a ``TypeVarTuple``, the tuple of its arguments."""
    many = next((index for index, parameter in enumerate(parameters) if isinstance(parameter, TypeVarTuple)), None)
    if many is not None and arguments:
        end = len(arguments) - (len(parameters) - many - 1)
        arguments = [*arguments[:many], tuple(arguments[many:end]), *arguments[end:]]
    return dict(zip(parameters, arguments, strict=False))


def _substitute_all(hints: Sequence[Any], bound: Mapping[Any, Any]) -> list[Any]:
    found: list[Any] = []
    for hint in hints:
        if get_origin(hint) is Unpack and isinstance(get_args(hint)[0], TypeVarTuple):
            found += bound.get(get_args(hint)[0], (hint,))
        else:
            found.append(_substitute(hint, bound))
    return found


def _substitute(hint: Any, bound: Mapping[Any, Any]) -> Any:
    if isinstance(hint, TypeVar):
        return bound.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    if not bound or not parameters or get_origin(hint) is None:  # a generic class without arguments keeps its own
        return hint
    arguments: list[Any] = []
    for parameter in parameters:
        if isinstance(parameter, TypeVarTuple):
            arguments += bound.get(parameter, (Unpack[parameter],))
        else:
            arguments.append(bound.get(parameter, parameter))
    return hint[tuple(arguments)]


def resolve_self(hint: Any, cls: Any) -> Any:
    """Return an annotation of a class with the class, or the class with its type arguments, in the place of ``Self``."""
    if hint is Self:
        return cls
    origin, arguments = get_origin(hint), get_args(hint)
    resolved = [resolve_self(argument, cls) for argument in arguments]
    if all(map(operator.is_, resolved, arguments)):
        return hint
    first, *others = resolved
    if origin is Annotated:
        return Annotated[(first, *hint.__metadata__)]
    if origin is UnionType:
        return Union[tuple(resolved)]  # noqa: UP007  # of a tuple
    return origin[tuple(resolved) if others else first]


def is_alias(hint: Any) -> bool:
    """Return True for ``type X = ...`` and its ``X[int]``: only such an alias can name itself."""
    return "TypeAliasType" in (type(hint).__name__, type(get_origin(hint)).__name__)


def resolve_alias(hint: Any) -> Any:
    """Return the annotation that a ``NewType``, ``type X = ...`` or ``Final[...]`` stands for; others as they are.

    pydantic's ``JsonValue`` stands for any JSON value, ``LiteralString`` for a text.
    """
    while True:
        origin = get_origin(hint)
        if (supertype := getattr(hint, "__supertype__", None)) is not None:
            hint = supertype
        elif hint is LiteralString:
            return str
        elif type(hint).__name__ == "TypeAliasType":
            is_json_value = (hint.__module__, hint.__name__) == ("pydantic.types", "JsonValue")
            hint = Any if is_json_value else hint.__value__
        elif type(origin).__name__ == "TypeAliasType":
            hint = _substitute(origin.__value__, _pair(origin.__type_params__, get_args(hint)))
        elif str(origin) in ("typing.Final", "typing.Required", "typing.NotRequired", "typing.ReadOnly"):
            hint = get_args(hint)[0]
        else:
            return hint


def resolve_variable(variable: Any) -> Any:
    """Return the type that stands for a type parameter which no class has fixed: its default, bound or constraints.

    Raises:
        TypeError: it has none of them.
    """
    has_default = getattr(variable, "has_default", None)
    if has_default is not None and has_default():
        return variable.__default__
    if variable.__bound__ is not None:
        return variable.__bound__
    if variable.__constraints__:
        return Union[variable.__constraints__]  # noqa: UP007  # of a tuple
    raise TypeError(
        f"its type parameter {variable} is not fixed: name a class that fixes it, as class DateChanged(Changed[date])"
    )
