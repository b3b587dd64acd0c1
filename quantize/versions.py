"""Versions of installed libraries. Imports none of them."""

VERSION = "0.1.0"  # this program's
MAKERS = ("torch", "transformers", "autoawq", "bitsandbytes", "safetensors", "tokenizers")  # of a checkpoint


def version_of(distribution: str) -> str | None:
    import importlib.metadata  # slow, and no --help needs it

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def maker_versions() -> dict[str, str]:
    return {name: version for name in MAKERS if (version := version_of(name)) is not None}
