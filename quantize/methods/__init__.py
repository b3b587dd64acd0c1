"""Ways to quantize, one row each."""

from quantize.methods.awq import AWQ, RTN
from quantize.methods.base import Method
from quantize.methods.bnb import BNB_4BIT, BNB_8BIT
from quantize.methods.reference import REFERENCE

METHODS: dict[str, Method] = {method.name: method for method in (REFERENCE, AWQ, RTN, BNB_4BIT, BNB_8BIT)}
"""By the name that a Variant refers to."""
