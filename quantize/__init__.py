"""Quantize a causal language model and load the result: `quantize.quantize(...)`, `quantize.load(...)`.

Importing the package imports no torch; the two functions do, when they are first used.
"""

from typing import TYPE_CHECKING

from quantize.errors import UserError
from quantize.lazy import lazily
from quantize.variant import VARIANTS, Variant

if TYPE_CHECKING:
    from quantize.building.build import quantize
    from quantize.building.job import BuildOptions
    from quantize.loader import Loaded, LoadedModel, load

__all__ = ["VARIANTS", "BuildOptions", "Loaded", "LoadedModel", "UserError", "Variant", "load", "quantize"]

BUILDING = {"quantize.building.build": ("quantize",), "quantize.building.job": ("BuildOptions",)}
__getattr__ = lazily(__name__, {**BUILDING, "quantize.loader": ("Loaded", "LoadedModel", "load")})
