"""What a bench measures: a checkpoint on disk as a target. Imports no torch."""

import json
from collections.abc import Mapping
from typing import Any

from bench.records.record import Subject
from bench.worker.request import Target
from quantize.checkpoint import Checkpoint
from quantize.variant import AUTO_KERNEL, Variant


def target_of(checkpoint: Checkpoint, *, kernel: str | None = None, family: str | None = None) -> Target:
    """A checkpoint on disk, by its folder's name: two folders of one `bench` never share one.

    kernel: what AWQ layers shall run on, as quantize.load takes it; others have no choice.
    """
    manifest, variant = checkpoint.manifest, checkpoint.variant
    subject = subject_of(
        variant,
        name=checkpoint.path.name,
        base_model=manifest.base_model,
        q_group_size=manifest.q_group_size,
        content_sha256=checkpoint.content_sha256,
        file_weights_bytes=manifest.weights_bytes,
        rounding=manifest.options.get("rounding"),
        family=family,
        kernel=kernel if variant.is_awq else None,
    )
    try:
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    has_text = manifest.source.kind != "dummy"
    return Target(subject, str(checkpoint.path.resolve()), half_dtype=half_dtype(config), has_text=has_text)


def subject_of(variant: Variant, *, name: str, kernel: str | None, **fields: Any) -> Subject:
    """A subject of this variant; `fields` are Subject's.

    The same weights on a kernel of the user's choice are a subject, and a row, of its own; "auto" is no choice.
    """
    return Subject(
        name=name_on(name, kernel),
        variant=variant.name,
        method=variant.method,
        w_bit=variant.w_bit,
        version=variant.version,
        download=None,
        kernel=None if kernel == AUTO_KERNEL else kernel,
        **fields,
    )


def name_on(name: str, kernel: str | None) -> str:
    """What tells a row on a kernel of the user's choice from the same row without."""
    return name if kernel in (None, AUTO_KERNEL) else f"{name}, {kernel} kernel"


def half_dtype(config: Mapping[str, Any]) -> str:
    """bfloat16 where a model's config says so, else float16."""
    named = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if named == "bfloat16" else "float16"
