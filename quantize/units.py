"""Sizes and shares as a user writes them, and as they are shown. Imports no torch."""

import re
from collections.abc import Sequence

from quantize.errors import UserError

UNITS = {"": 1, "b": 1} | {f"{x}b": 1000**n for n, x in enumerate("kmgt", 1)}  # bytes of a unit in small letters
UNITS |= {f"{x}ib": 1024**n for n, x in enumerate("kmgt", 1)}


def parse_bytes(text: str) -> int:
    """Bytes: 6GB (6e9), 6 GB, 1.5GiB, 800MB, 8e9 (bytes). Raises UserError for anything else, and below 1 kB."""
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d\d?)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    size = float(found[1]) * UNITS.get(found[2].lower(), 0) if found else 0
    if not 1000 <= size < 2**63:
        raise UserError(f"{text!r} is no size: write 6GB, 6GiB, 800MB or 8e9 (bytes)")
    return int(size)


def parse_share(text: str) -> float:
    """A share: 5% or 0.05. Raises UserError for anything else, 5 among it, which could be either."""
    found = re.fullmatch(r"\s*(\d{1,9}\.?\d*)\s*(%?)\s*", text, re.ASCII)
    if not found or not (found[2] or float(found[1]) < 1):
        raise UserError(f"{text!r} is no share: write 5% or 0.05")
    return float(found[1]) / (100 if found[2] else 1)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
