"""Turn records into tables: `reports.report(...)`. Imports no torch."""

from reports.api import report

__all__ = ["report"]
