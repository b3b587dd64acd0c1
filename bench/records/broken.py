"""Which figures no sound checkpoint has: one judgment, of `bench` and of `report`. Imports no torch."""

import math
from collections.abc import Iterable, Sequence

from bench.records.comparison import grouped
from bench.records.record import Divergence, Quality, Record, Subject, latency_records

BETTER_RATIO = 0.95  # down from here the reference is broken: nothing made of a model predicts so much better
PERPLEXITY_RATIO = 2.0  # up from here the checkpoint is: quantization that works costs some percent
FAR_NATS, FAR_FLIPS = 1.0, 0.5  # a mean divergence, a share of other choices, that no working quantization has


def broken(quality: Quality, reference: Quality | None = None, others: Iterable[Quality] = ()) -> str | None:
    """Why these figures are of a broken checkpoint, None where they may be of a sound one.

    reference: on the same text, None where there is none; others: those of which this is the reference."""
    perplexity = quality.perplexity
    if not math.isfinite(perplexity) or perplexity < 1 - 1e-6:
        return f"its perplexity is {perplexity:g}, which no model has"
    if quality.vocabulary is not None and perplexity >= quality.vocabulary:
        return f"its perplexity of {perplexity:,.1f} is no better than guessing among {quality.vocabulary:,} tokens"
    best = min((one.perplexity for one in others if one.perplexity > 0), default=math.inf)
    if best <= BETTER_RATIO * perplexity:
        return f"its perplexity is {perplexity:,.2f}, a checkpoint that is compared with it has {best:,.2f}"
    if reference is not None:
        ratio = perplexity / reference.perplexity
        if not BETTER_RATIO < ratio < PERPLEXITY_RATIO:
            shown = f"x{ratio:,.0f}" if ratio >= 100 else f"x{ratio:.3g}"
            return f"its perplexity is {shown} the reference's"
    return next(filter(None, map(_far, (quality.divergence, quality.noise_floor))), None)


def _far(divergence: Divergence | None) -> str | None:
    if divergence is None:
        return None
    figures = (divergence.mean, divergence.median, divergence.p99, divergence.flips)
    if not all(math.isfinite(one) and one >= -1e-3 for one in figures):  # below 0 by rounding alone
        return f"its divergence from the reference is {min(figures):g}, which no model has"
    if divergence.mean < FAR_NATS and divergence.flips < FAR_FLIPS:
        return None
    flips = f"{divergence.flips:.0%} of the likeliest tokens are others"
    return f"it diverges from the reference by {divergence.mean:.2f} nats a token, {flips}"


def broken_subjects(records: Sequence[Record]) -> dict[Subject, str]:
    """What of these records, all of one device and dtype, is broken, and why: by its latest figures."""
    of_subject = grouped(records, lambda record: record.subject)
    references = references_of(records)
    figures = {subject: found for subject, own in of_subject.items() if (found := latest_quality(own))}
    of_base = grouped(figures, lambda subject: subject.base_model)
    reasons: dict[Subject, str] = {}
    for subject, own in of_subject.items():
        quality, reference = figures.get(subject), references.get(subject.baseline)
        last = next((one for one in reversed(own) if one.kind == "quality"), None)
        if last is not None and last.status == "broken":
            reasons[subject] = last.reason or ""
        elif quality is not None:
            same_base = [one for one in of_base[subject.base_model] if one != subject]
            compared = [figures[one] for one in same_base if references.get(one.baseline) == subject]
            theirs = figures.get(reference) if reference in same_base else None
            if why := broken(quality, theirs, compared):
                reasons[subject] = why
    return reasons


def references_of(records: Sequence[Record]) -> dict[str, Subject]:
    """What the rows of each baseline are compared with: of several half-precision checkpoints the first that ran."""
    references: dict[str, Subject] = {}
    ran = dict.fromkeys(record.subject for record in latency_records(records))
    for subject in (*ran, *dict.fromkeys(record.subject for record in records)):
        if subject.may_be_reference:
            references.setdefault(subject.baseline, subject)
    return references


def latest_quality(records: Iterable[Record]) -> Quality | None:
    found = [record.quality for record in records if record.status == "ok" and record.quality]
    return found[-1] if found else None
