"""What files hold becomes dataclasses here, checked on the way: types, ranges, unknown fields. Imports no torch."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from quantize.errors import UserError

T = TypeVar("T")

Positive = Annotated[float, msgspec.Meta(gt=0)]
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
    one that the class does not have, and what its `__post_init__` rejects.
    """
    try:
        made = msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise UserError(f"{where}: {field + ': ' if field else ''}{message[:1].lower()}{message[1:]}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    unknown = next(_unknown(data, made, ""), None)
    if unknown is not None:
        known = ", ".join(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise UserError(f"{where}: unknown field {unknown}" + ("" if "." in unknown else f"; there are: {known}"))
    return made


def to_data(made: Any) -> Any:
    """A dataclass, or a mapping or sequence of some, as JSON and TOML hold it; what `from_data` reads back."""
    # Not msgspec's own: of what it made itself it leaves out fields that have their default.
    if dataclasses.is_dataclass(made):
        return {field.name: to_data(getattr(made, field.name)) for field in dataclasses.fields(made)}
    if isinstance(made, Mapping):
        return {key: to_data(value) for key, value in made.items()}
    return [to_data(value) for value in made] if isinstance(made, list | tuple) else made


def _unknown(data: Any, made: Any, path: str) -> Iterator[str]:
    """The keys in `data` that the dataclasses made of it have no field for."""
    if dataclasses.is_dataclass(made):
        fields = {field.name for field in dataclasses.fields(made)}
        yield from (f"{path}{key}" for key in data if key not in fields)
        for name in fields & data.keys():
            yield from _unknown(data[name], getattr(made, name), f"{path}{name}.")
    elif isinstance(made, Mapping):
        for key, value in made.items():
            yield from _unknown(data[key], value, f"{path}{key}.")
    elif isinstance(made, tuple) and made and dataclasses.is_dataclass(made[0]):
        for number, (one, value) in enumerate(zip(data, made, strict=True)):
            yield from _unknown(one, value, f"{path}{number}.")
