"""Versions of installed libraries. Imports none of them."""

import importlib.metadata
from collections.abc import Iterable

MAKERS = ("torch", "transformers", "autoawq", "bitsandbytes", "safetensors", "tokenizers")
"""Libraries that decide what a checkpoint holds."""


def version_of(distribution: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    return {name: version for name in names if (version := version_of(name)) is not None}
