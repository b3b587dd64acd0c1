"""Turn records into tables. Imports no torch."""

from reports.api import report

__all__ = ["report"]
