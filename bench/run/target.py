"""What a bench measures: a checkpoint, or random weights in a model's shape. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.records.record import Subject
from bench.worker.request import Dummy
from quantize.checkpoint import Checkpoint
from quantize.variant import AUTO_KERNEL


@dataclass(frozen=True)
class Candidate:
    """One row to be: how its records name it, and what a worker makes the model of.

    checkpoint: the one on disk, or None and `dummy` says which weights to draw. half_dtype: what the model's config
    names, "bfloat16" or "float16".
    """

    subject: Subject
    checkpoint: Checkpoint | None = None
    dummy: Dummy | None = None
    half_dtype: str = "float16"

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.dummy is None):
            raise ValueError("a candidate is a checkpoint or random weights, one of the two")

    @property
    def has_text(self) -> bool:
        """Whether it can be judged on text: random weights have no quality, and no tokenizer."""
        return self.checkpoint is not None and self.checkpoint.manifest.source.kind != "dummy"


def candidate_of(checkpoint: Checkpoint, *, kernel: str | None = None, family: str | None = None) -> Candidate:
    """A checkpoint on disk. kernel: what AWQ layers shall run on, as quantize.load takes it; others have no choice."""
    subject = replace(subject_of(checkpoint), family=family)
    if checkpoint.variant.is_awq:
        subject = with_kernel(subject, kernel)
    try:
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    return Candidate(subject, checkpoint, half_dtype=half_dtype(config))


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
