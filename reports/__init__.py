"""Turn records into tables: `reports.report(...)`. Imports no torch, and nothing before it is first used."""

from typing import TYPE_CHECKING

from quantize.lazy import lazily

if TYPE_CHECKING:
    from reports.api import report

__all__ = ["report"]

__getattr__ = lazily(__name__, {"reports.api": __all__})
