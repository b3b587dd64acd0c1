"""The phases of a run, and how long one run took in each. Imports no torch."""

import math
import statistics
from typing import Literal, get_args

from bench.records.record import Record
from quantize.errors import UserError

Phase = Literal["total", "prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)


def phase_s(record: Record, phase: Phase) -> float | None:
    """Seconds of one run in this phase, None when it has no sample of it.

    total: median over repetitions of prefill plus all decode steps; prefill: median over repetitions;
    decode: median over all decode steps of all repetitions, that is seconds a token (of each prompt in the
    batch).
    Raises UserError for a time that is not above 0.
    """
    if record.latency is None:
        return None
    prefill, decode = record.latency.prefill_s, record.latency.decode_s
    steps = decode or ((),) * len(prefill)
    samples: dict[Phase, list[float]] = {
        "total": [first + math.fsum(rest) for first, rest in zip(prefill, steps, strict=False)],
        "prefill": list(prefill),
        "decode": [step for repetition in decode for step in repetition],
    }
    if not samples[phase]:
        return None
    seconds = statistics.median(samples[phase])
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(
            f"a record of {record.subject.name} holds a {phase} time of {seconds} s, no measurement: "
            "remove that line and measure again"
        )
    return seconds
