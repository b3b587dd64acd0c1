"""The quantization table of the BioMistral-7B model card (Labrak et al. 2024, arXiv:2402.10373), and ours beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.records.record import Record, Subject
from quantize.variant import NATIVE_KERNEL, REFERENCE
from reports.compatibility import HEADLINE
from reports.notes import dummy_text, machine_text, shape_text
from reports.results import REFERENCE_METHOD, Measurement, Result
from reports.table import Column, Heading, Page, Paragraph, Row, Table, titled


@dataclass(frozen=True)
class PublishedRow:
    """One row as published, None where the card leaves a cell empty. time: latency over that of the FP16/BF16 row."""

    base_model: str
    method: str
    q_group_size: int | None
    w_bit: int | None
    version: str | None
    vram_gb: float
    time: float


BIOMISTRAL_7B = (
    PublishedRow("BioMistral-7B", "FP16/BF16", None, None, None, 15.02, 1.00),
    PublishedRow("BioMistral-7B", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
    PublishedRow("BioMistral-7B", "AWQ", 128, 4, "GEMV", 4.68, 10.30),
    PublishedRow("BioMistral-7B", "BnB.4", None, 4, None, 5.03, 3.25),
    PublishedRow("BioMistral-7B", "BnB.8", None, 8, None, 8.04, 4.34),
    PublishedRow("BioMistral-7B-DARE", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
    PublishedRow("BioMistral-7B-TIES", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
    PublishedRow("BioMistral-7B-SLERP", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
)
"""All eight rows, in the card's order. One GPU, batch 1, 3-shot medical questions, one new token."""

LAYERS, HIDDEN_SIZE = 32, 4096
"""The shape of all four base models."""

CARD = (
    "Published: the model card of BioMistral-7B (Labrak et al. 2024, arXiv:2402.10373). Its Time is the latency of "
    "3-shot medical questions, batch 1, one new token, relative to FP16/BF16: the prompt's pass (prefill) and no "
    "decoding. The card does not say on which GPU."
)
OTHER_SHAPE = (
    f"It is not the shape of the published models ({LAYERS} layers, hidden size {HIDDEN_SIZE}), so that nothing "
    "here compares with a published figure."
)
"""A rehearsal on a smaller model must not look like the table."""


def versus_page(found: Sequence[Measurement]) -> Page:
    """The published rows beside the measured ones, a table for each measurement; what was not measured is a dash.

    A second table has the rows measured on each layout's own kernel, where there are some: the published table's were.
    """
    for measurement in found:
        if len(found) > 1:
            yield Heading(f"On {measurement.device}")
        yield Table.of(_row(measurement, row, _measured(measurement, row, None)) for row in BIOMISTRAL_7B)
        native = ((row, _measured(measurement, row, NATIVE_KERNEL)) for row in BIOMISTRAL_7B)
        table = Table.of(_row(measurement, row, result) for row, result in native if result)
        yield from titled("The same layouts on the kernels that their names stood for:", table)
        headline, shape = measurement.headline, "" if has_published_shape(measurement) else OTHER_SHAPE
        protocol = f"`{HEADLINE}` ({shape_text(headline)})" if headline else f"other scenarios than `{HEADLINE}`"
        where = f"Measured: {protocol} on {machine_text(measurement)}."
        quotients = "Quotients are measured over published: below x1.00 is less. The rest: docs/method.md."
        yield Paragraph(" ".join(filter(None, (CARD, where, dummy_text(measurement), shape, quotients))))


def _row(measurement: Measurement, row: PublishedRow, result: Result | None) -> Row:
    peak, time = (measurement.run_peak_bytes(result), measurement.time(result)) if result else (None, None)
    comparable, published_bytes = has_published_shape(measurement), row.vram_gb * 1e9
    return [
        *checkpoint_cells(row, f"{row.method}, broken" if result and result.broken else row.method),
        (Column("Published VRAM GB", "gigabytes"), published_bytes),
        (Column("Measured weights GB", "gigabytes"), result.weights_bytes if result else None),
        (Column(f"Measured peak {measurement.memory_name} GB", "gigabytes"), peak),
        (Column("Peak / published", "ratio"), peak / published_bytes if comparable and peak is not None else None),
        (Column("Published Time", "ratio"), row.time),
        (Column("Measured Time", "ratio"), time),
        (Column("Time / published", "ratio"), time / row.time if comparable and isinstance(time, float) else None),
    ]


def checkpoint_cells(row: Subject | PublishedRow, method: str) -> Row:
    """What the published table says of a checkpoint before its figures."""
    return [
        (Column("Base Model"), row.base_model),
        (Column("Method"), method),
        (Column("q_group_size", "count", missing=""), row.q_group_size),
        (Column("w_bit", "count", missing=""), row.w_bit),
        (Column("version", missing=""), row.version),
    ]


def has_published_rows(records: Iterable[Record]) -> bool:
    """Whether one of these records is of a row of the published table."""
    return any(_is_of(subject, row) for subject in {record.subject for record in records} for row in BIOMISTRAL_7B)


def has_published_shape(measurement: Measurement) -> bool:
    """False where random weights were measured in another shape than the published models'."""
    drawn = [result.subject for result in measurement.results if result.subject.dummy]
    return all((one.dummy_layers, one.dummy_hidden_size) == (LAYERS, HIDDEN_SIZE) for one in drawn)


def _measured(measurement: Measurement, row: PublishedRow, kernel: str | None) -> Result | None:
    """What was measured of a published row on the kernel of this name, None for the one that was chosen by itself."""
    of_row = (result for result in measurement.results if _is_of(result.subject, row))
    return next((result for result in of_row if result.subject.kernel == kernel), None)


def _is_of(subject: Subject, row: PublishedRow) -> bool:
    method = REFERENCE_METHOD if subject.variant == REFERENCE.name else subject.method
    ours = (subject.base_model, method, subject.q_group_size, subject.version)
    return ours == (row.base_model, row.method, row.q_group_size, row.version)
