"""Many models on one page: a row for each on each machine, and what keeps the others from having one."""

from collections.abc import Sequence
from string import ascii_uppercase as letters

from bench.sweep.cell import Attempt
from reports.notes import machine_text, plural
from reports.results import Measurement
from reports.summary import marked, standings
from reports.table import Column, Heading, Page, Paragraph, Row, Table, bulleted

NEAR = 0.01  # losses this close count as one, as in `choose`
RULE = (
    f"Best: within {NEAR:.0%} perplexity of a model's least loss the fastest in decoding. Marks and changes are beside "
    "FP16 of the same model on the same machine; nothing is divided by a figure of another."
)


def sweep_table(models: Sequence[tuple[Attempt, Sequence[Measurement]]]) -> Page:
    """How these models stand, and what was measured of each; a measurement is of one machine."""
    machines = list(dict.fromkeys(machine_text(one) for _, found in models for one in found))
    yield Heading(f"{plural(len(models), 'model')}, {plural(len(machines), 'machine')}")
    yield Table.of(_row(how, one, machines) for how, found in models for one in (*found, None)[: len(found) or 1])
    yield from bulleted(f"{how.line()}." for how, _ in models if how.reason)
    yield from bulleted(f"{letter}: {machine}." for letter, machine in zip(letters, machines, strict=False))
    yield Paragraph(RULE)


def _row(how: Attempt, measurement: Measurement | None, machines: list[str]) -> Row:
    rows = [one for one in standings(measurement) if not one.first.is_reference] if measurement else []
    least = min((one.loss for one in rows if one.loss is not None), default=None)
    near = [one for one in rows if least is None or (one.loss is not None and one.loss <= least + NEAR)]
    best = max(near, key=lambda one: one.speeds.get("decode", 0.0), default=None)
    return [
        (Column("Model"), how.name),
        (Column("On"), letters[machines.index(machine_text(measurement))] if measurement else ""),
        (Column("Best variant"), best.name if best else how.state),
        (Column("PPL change", "change"), best.loss if best else None),
        (Column("Decode tokens/s", "per_second"), marked(best, "decode") if best else None),
        (Column("Weights GB", "gigabytes"), best.first.weights_bytes if best else None),
    ]
