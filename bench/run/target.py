"""What a bench measures: a checkpoint on disk as a target. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.records.record import Subject
from bench.worker.request import Target
from quantize.checkpoint import Checkpoint
from quantize.variant import AUTO_KERNEL


def target_of(checkpoint: Checkpoint, *, kernel: str | None = None, family: str | None = None) -> Target:
    """A checkpoint on disk. kernel: what AWQ layers shall run on, as quantize.load takes it; others have no choice."""
    subject = replace(subject_of(checkpoint), family=family)
    if checkpoint.variant.is_awq:
        subject = with_kernel(subject, kernel)
    try:
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    return Target(
        subject,
        str(checkpoint.path.resolve()),
        half_dtype=half_dtype(config),
        has_text=checkpoint.manifest.source.kind != "dummy",
    )


def subject_of(checkpoint: Checkpoint) -> Subject:
    """How records name a checkpoint: by its folder, since two folders of one `bench` never share a name."""
    manifest, variant = checkpoint.manifest, checkpoint.variant
    return Subject(
        name=checkpoint.path.name,
        base_model=manifest.base_model,
        variant=variant.name,
        method=variant.method,
        q_group_size=manifest.q_group_size,
        w_bit=variant.w_bit,
        version=variant.version,
        download=None,
        content_sha256=checkpoint.content_sha256,
        file_weights_bytes=manifest.weights_bytes,
        rounding=manifest.options.get("rounding"),
    )


def with_kernel(subject: Subject, kernel: str | None) -> Subject:
    """The same weights on a kernel of the user's choice: a subject, and a row, of its own. "auto" is no choice."""
    if kernel in (None, AUTO_KERNEL):
        return subject
    return replace(subject, name=f"{subject.name}, {kernel} kernel", kernel=kernel)


def half_dtype(config: Mapping[str, Any]) -> str:
    """bfloat16 where a model's config says so, else float16."""
    named = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if named == "bfloat16" else "float16"
