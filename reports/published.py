"""The quantization table of the BioMistral-7B model card (Labrak et al. 2024, arXiv:2402.10373), as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One row as published: None where the card leaves a cell empty.

    vram_gb: GB of GPU memory; time: latency relative to the FP16/BF16 row; download: the checkpoint's name on the
    Hugging Face hub under "BioMistral/".
    """

    base_model: str
    method: str
    q_group_size: int | None
    w_bit: int | None
    version: str | None
    vram_gb: float
    time: float
    download: str


def _awq(base_model: str, version: str, time: float) -> PublishedRow:
    return PublishedRow(base_model, "AWQ", 128, 4, version, 4.68, time, f"{base_model}-AWQ-QGS128-W4-{version}")


BIOMISTRAL_7B: tuple[PublishedRow, ...] = (
    PublishedRow("BioMistral-7B", "FP16/BF16", None, None, None, 15.02, 1.00, "BioMistral-7B"),
    _awq("BioMistral-7B", "GEMM", 1.41),
    _awq("BioMistral-7B", "GEMV", 10.30),
    PublishedRow("BioMistral-7B", "BnB.4", None, 4, None, 5.03, 3.25, "BioMistral-7B-BnB.4"),
    PublishedRow("BioMistral-7B", "BnB.8", None, 8, None, 8.04, 4.34, "BioMistral-7B-BnB.8"),
    _awq("BioMistral-7B-DARE", "GEMM", 1.41),
    _awq("BioMistral-7B-TIES", "GEMM", 1.41),
    _awq("BioMistral-7B-SLERP", "GEMM", 1.41),
)
"""All eight rows, in the card's order. One GPU, batch 1, 3-shot medical questions, one new token."""

LAYERS, HIDDEN_SIZE = 32, 4096
"""The shape of all four base models."""
