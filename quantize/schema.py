"""What files hold becomes dataclasses here, checked on the way: types, ranges, unknown fields. Imports no torch."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from quantize.errors import UserError

T = TypeVar("T")

Positive = Annotated[float, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(ge=1e-12, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
"""Ranges of fields, checked where a file is read."""


def from_json(cls: type[T], text: str | bytes, where: str) -> T:
    """An instance of a dataclass from JSON; `where` begins the message. Raises UserError as `from_data` does."""
    return from_data(cls, parse_json(text, where), where)


def parse_json(text: str | bytes, where: str) -> Any:
    """What JSON holds, by the letter of the standard: no NaN, no infinity. Raises UserError for what is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error})") from None


def from_data(cls: type[T], data: object, where: str) -> T:
    """An instance of a dataclass from what JSON or TOML holds; lists become tuples, whole numbers floats.

    Raises UserError, naming the place and the field, for a field of another type or out of range, one that is missing,
    one that the class does not have, and what its `__post_init__` rejects."""
    try:
        made = msgspec.convert(data, cls)
        msgspec.convert(data, strict(cls))  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        if unknown := message.partition("Object contains unknown field ")[2].strip("`"):
            known = "" if field else f"; there are: {', '.join(getattr(cls, '__dataclass_fields__', ()))}"
            raise UserError(f"{where}: unknown field {field + '.' if field else ''}{unknown}{known}") from None
        raise UserError(f"{where}: {field + ': ' if field else ''}{message[:1].lower()}{message[1:]}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return made


def to_data(made: Any) -> Any:
    """A dataclass, or a mapping or sequence of some, as JSON and TOML hold it; what `from_data` reads back."""
    # Not msgspec's own: of what it made itself it leaves out fields that have their default.
    if dataclasses.is_dataclass(made):
        return {field.name: to_data(getattr(made, field.name)) for field in dataclasses.fields(made)}
    if isinstance(made, Mapping):
        return {key: to_data(value) for key, value in made.items()}
    return [to_data(value) for value in made] if isinstance(made, list | tuple) else made


def with_choices(options: T, inner: str, choices: Mapping[str, Any]) -> T:
    """These options with fields replaced, also of options they hold as `inner`. Raises UserError for any other name."""
    within = choices.get(inner, getattr(options, inner))
    for name in choices:
        if name not in (known := vars(options) | vars(within)):
            raise UserError(f"there is no option {name!r}; there are: {', '.join(known)}")
    own = {name: value for name, value in choices.items() if name in vars(options)}
    theirs = {name: value for name, value in choices.items() if name not in own}
    return dataclasses.replace(options, **own | {inner: dataclasses.replace(within, **theirs)})  # type: ignore[type-var]


@functools.cache
def strict(kind: Any) -> Any:
    """What takes the JSON of this type and refuses a field that its dataclasses do not have."""
    if not dataclasses.is_dataclass(kind):
        parts = tuple(map(strict, get_args(kind)))
        if parts == get_args(kind):
            return kind
        return functools.reduce(operator.or_, parts) if get_origin(kind) is UnionType else get_origin(kind)[parts]
    kinds, fields = get_type_hints(kind, include_extras=True), list[Any]()
    for one in dataclasses.fields(kind):
        given: dict[str, Any] = {"default": one.default, "default_factory": one.default_factory}
        default = msgspec.field(**{key: x for key, x in given.items() if x is not dataclasses.MISSING})
        fields.append((one.name, strict(kinds[one.name]), default))
    return msgspec.defstruct("Part", fields, kw_only=True, forbid_unknown_fields=True)
