"""Where the time of a prompt and of a decode step goes, as tables (`quantable profile`)."""

from collections.abc import Sequence

from bench.records.profile import Operation, ProfileRecord
from reports.table import Column, Page, Paragraph, Table

SHOWN_OPERATIONS, NAME_CHARACTERS = 12, 70  # a profile's rows; templates make names of hundreds of characters


def profile_page(records: Sequence[ProfileRecord]) -> Page:
    """Where the time of each phase goes: the longest operations of a pass, the rest in one row."""
    for one in records:
        named = f"{one.source}, {one.variant}" if one.variant else one.source
        times = f"{one.wall_s * 1e3:.2f} ms, of which busy {one.busy_s * 1e3:.2f} ms"
        machine = one.environment.gpu or one.environment.cpu or "an unknown machine"
        yield Paragraph(f"{named}, {one.phase}: {times}, on {machine}.")
        shown, rest = [*one.operations[:SHOWN_OPERATIONS]], one.operations[SHOWN_OPERATIONS:]
        if rest:
            calls, seconds = sum(other.calls for other in rest), sum(other.seconds for other in rest)
            shown.append(Operation(f"{len(rest)} others", calls, seconds))
        yield Table.of(
            [
                (Column("ms", "milliseconds"), op.seconds),
                (Column("Share", "share"), op.seconds / one.busy_s if one.busy_s else None),
                (Column("Calls", "calls"), op.calls),
                (Column("Operation"), op.name[:NAME_CHARACTERS]),
            ]
            for op in shown
        )
