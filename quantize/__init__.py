"""Quantize a causal language model and load the result: `quantize.quantize(...)`, `quantize.load(...)`.

Importing the package imports no torch; the two functions do, when they are first used.
"""

from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.variant import VARIANTS, Variant

if TYPE_CHECKING:
    from quantize.building.build import quantize
    from quantize.building.job import BuildOptions
    from quantize.loader import Loaded, LoadedModel, load

__all__ = ["VARIANTS", "BuildOptions", "Loaded", "LoadedModel", "UserError", "Variant", "load", "quantize"]

_HOMES = {"quantize": "building.build", "BuildOptions": "building.job"} | dict.fromkeys(
    ("load", "Loaded", "LoadedModel"), "loader"
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"quantize.{_HOMES[name]}"), name)
