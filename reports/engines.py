"""Which engine reads which checkpoint, and whether it computes what the codes say: what `bench --engine` judged."""

from collections.abc import Iterator

from bench.records.comparison import grouped
from reports.results import Measurement, Result
from reports.table import Block, Column, Paragraph, Row, Table, bulleted

OURS = "quantable"
SAME, CLOSE = 1e-4, 3e-3  # nats a token: what float32 and float16 stay below, what bfloat16 and 8-bit activations do

EXPLAINED = (
    f"In brackets is the mean KL divergence, nats a token, from the same checkpoint dequantized to float32 where that "
    f"is above {SAME}, which rounding to bfloat16 and 8-bit activations cause. Above {CLOSE} the cell says so: that "
    "engine reads the file otherwise than it was written, or computes otherwise."
)


def matrix(measurement: Measurement) -> Iterator[Block]:
    """Perplexity of each checkpoint in each engine, then why cells are empty; nothing where one engine alone ran."""
    engines = list(dict.fromkeys(result.subject.engine or OURS for result in measurement.results))
    judged = [result for result in measurement.results if result.quality or result.failures]
    if engines == [OURS] or not any(result.subject.engine for result in judged):
        return
    rows = grouped(judged, lambda one: one.subject.folder)
    yield Table.of(_row(folder, engines, results) for folder, results in rows.items())
    yield Paragraph(EXPLAINED)
    yield from bulleted(line for results in rows.values() for one in results for line in reasons(one))


def _row(folder: str, engines: list[str], results: list[Result]) -> Row:
    of_engine = {one.subject.engine or OURS: one for one in results}
    return [
        (Column("Checkpoint"), folder),
        *((Column(engine), cell(of_engine[engine]) if engine in of_engine else None) for engine in engines),
    ]


def cell(result: Result) -> str:
    """14.92, 14.95 (0.0019), 15.30, otherwise (0.0210) or the way in which it failed."""
    if not result.quality:
        return next((one.status for one in result.failures), "not judged")
    exact = result.quality.from_exact
    text = f"{result.quality.perplexity:.2f}"
    if exact is None or exact.mean <= SAME:
        return text
    return f"{text}{', otherwise' if exact.mean > CLOSE else ''} ({exact.mean:.4f})"


def reasons(result: Result) -> list[str]:
    """Why an engine has no figure for a checkpoint."""
    failures = result.failures if result.subject.engine and not result.quality else ()
    return list(dict.fromkeys(f"{result.subject.folder}: {one.reason}" for one in failures))
