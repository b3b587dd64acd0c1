"""Turn records into tables. Imports no torch, and nothing at all before `report` is first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reports.api import report

__all__ = ["report"]


def __getattr__(name: str) -> Any:
    if name != "report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reports.api import report

    return report
