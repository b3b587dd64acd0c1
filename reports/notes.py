"""The words under the tables: what was measured, where and when, and what to be wary of."""

from collections.abc import Iterator, Sequence
from datetime import UTC

from bench.records.scenario import Scenario
from reports.compatibility import HEADLINE
from reports.results import Measurement, Timing
from reports.table import gigabytes_text

OUTLIER_SHARE, STALE_HOURS = 0.05, 1.0
"""From this share of outlying samples on a reader is told what to do; paired runs further apart are not of one go."""


def how_measured(measurement: Measurement) -> tuple[str, ...]:
    """What was measured, where, when and of what, a line each; from the records alone."""
    results, facts = measurement.results, measurement.environment
    used = {"Python": facts.python, **facts.libraries, "quantable": facts.source and facts.source.quantable}
    versions = [f"{name} {version}" for name, version in used.items() if version]
    timings = [timing for result in results for timing in result.timings.values()]
    scenarios = ", ".join(f"`{one.name}` ({shape_text(one)})" for one in measurement.scenarios)
    peaks = f", and peaks are of `{measurement.peak_scenario.name}`" if measurement.peak_scenario else ""
    texts = dict.fromkeys((one.tokens, one.text) for result in results if (one := result.quality))
    far, samples = sum(one.outliers for one in timings), sum(one.samples for one in timings)
    rounded = sorted({result.subject.method for result in results if result.subject.rounding == "gptq"})
    lines: dict[str, object] = {
        f"Measured on {setting_text(measurement)}.": True,
        dummy_text(measurement): True,
        f"Versions: {', '.join(versions)}.": versions,
        _dtype(measurement): True,
        f"Scenarios: {scenarios}.": scenarios,
        f"`{HEADLINE}` was not run: there is no Time{peaks}.": not measurement.headline,
        f"A plain copy moves {gigabytes_text(facts.copy_bytes_per_s or 0)} GB/s, read and written together.": any(
            measurement.copy_share(timing) for timing in timings
        ),
        **{f"Perplexity is over {tokens} tokens of held-out text ({text}).": True for tokens, text in texts},
        f"{far} of {samples} samples are outliers; none is dropped, medians are taken.": far,
        f"The 4-bit codes of {' and '.join(rounded)} were chosen with error feedback on calibration text.": rounded,
    }
    return tuple(line for line, holds in lines.items() if line and holds)


def setting_text(measurement: Measurement) -> str:
    """The machine, the days and the rounds: a CPU (Epyc 9) on 2026-11-24 in 3 to 5 rounds."""
    moments = (measurement.first_start, measurement.last_start)
    days = list(dict.fromkeys(moment.astimezone(UTC).date().isoformat() for moment in moments if moment))
    counts = sorted({timing.rounds for result in measurement.results for timing in result.timings.values()})
    when = f" from {days[0]} to {days[1]}" if len(days) > 1 else "".join(f" on {day}" for day in days)
    rounds = f" in {f'{counts[0]} to ' * (len(counts) > 1)}{plural(counts[-1], 'round')}" if counts else ""
    return f"{machine_text(measurement)}{when}{rounds}"


def warnings(measurement: Measurement) -> Iterator[str]:
    """One line for each thing that makes a row less than it seems."""
    references = {one.subject.baseline for one in measurement.results if one.is_reference}
    for baseline in dict.fromkeys(one.subject.baseline for one in measurement.results):
        if baseline not in references:
            yield f"{baseline}: no reference was measured, so its rows have no ratios."
    for result in measurement.results:
        label = measurement.labels[result.subject]
        for placement in result.placements:
            but = "its times include what moves between devices in every pass, its peak memory is the first GPU's"
            yield f"{label}: too big for one GPU, so accelerate spread it ({placement}); {but}."
        for timing in result.timings.values():
            where = f"{label}: in `{timing.scenario.name}`"
            yield from (f"{where} {words}" for words, holds in _doubts(timing).items() if holds)


def broken_lines(measurement: Measurement) -> tuple[str, ...]:
    """One line for each row that is broken: it must not be used, and what is compared with it says nothing."""
    then = {True: "Nothing that is compared with it means anything.", False: "Do not use it."}
    broken = [one for one in measurement.results if one.broken]
    return tuple(f"{measurement.labels[one.subject]}: {one.broken}. {then[one.is_reference]}" for one in broken)


def _doubts(timing: Timing) -> dict[str, object]:
    """What may make the figures of one scenario, or its ratios, doubtful, and what to do about it: whether it does."""
    comparison = timing.comparison
    hours = ((comparison and comparison.apart_s) or 0.0) / 3600
    apart = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
    return {
        f"the warm-up never became steady in {timing.unsteady_rounds} of {timing.rounds} rounds: close other programs "
        "and measure again.": timing.unsteady_rounds,
        f"{timing.outliers} of {timing.samples} samples lie far from the rest (none is dropped): something else ran; "
        "close it and measure again, or raise --rounds.": timing.outliers > OUTLIER_SHARE * timing.samples,
        f"the GPU's clocks were held down ({', '.join(timing.throttled)}): let it cool, or lower the load, and measure "
        "again.": timing.throttled,
        f"{plural(timing.other_processes, 'other program')} used the GPU: stop what runs there and measure "
        "again.": timing.other_processes,
        "it ran on the same side of the reference in every round, so the machine's drift is in its ratios; measure "
        "again with the rounds reversed in turn.": comparison and not comparison.order_balanced,
        f"it and its reference ran up to {apart} apart; measure both again in one go.": hours > STALE_HOURS,
    }


def dummy_text(measurement: Measurement) -> str:
    """Which weights were random, and in what shape; empty where none were."""
    shapes = " and ".join(dict.fromkeys(one.subject.dummy for one in measurement.results if one.subject.dummy))
    return shapes and f"The weights are random, in the shape {shapes}: time and memory depend on it alone."


def machine_text(measurement: Measurement) -> str:
    """The processor, and with it the GPU where that was measured."""
    facts = measurement.environment
    cpu = facts.cpu or "unknown processor"
    if not measurement.on_gpu:
        threads = f", {plural(facts.torch_threads, 'thread')}" if facts.torch_threads else ""
        return f"a CPU ({cpu}{threads})"
    size = facts.gpu_memory_bytes and f"{gigabytes_text(facts.gpu_memory_bytes)} GB"
    driver, cuda = facts.gpu_driver and f"driver {facts.gpu_driver}", facts.cuda and f"CUDA {facts.cuda}"
    return f"a GPU ({', '.join(str(one) for one in (facts.gpu or 'unknown', size, driver, cuda) if one)}; host {cpu})"


def plural(count: int, noun: str) -> str:
    """1 round; 3 rounds."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def joined(labels: Sequence[str], apart: str = ", ") -> str:
    """Several rows' labels as one, what they share said once: AWQ GEMM, GEMV, group 64."""
    heads, rests = zip(*(label.partition(", ")[::2] for label in labels), strict=True)
    starts, ends = zip(*(head.rpartition(" ")[::2] for head in heads), strict=True)
    if len(set(rests)) > 1 or len(set(starts)) > 1:
        return apart.join(labels)
    return ", ".join([heads[0], *ends[1:], *filter(None, rests[:1])])


def _dtype(measurement: Measurement) -> str:
    references = [result for result in measurement.results if result.is_reference and result.compute_dtype]
    if len(measurement.compute_dtypes) > 1:
        each = ", ".join(f"{one.subject.base_model} in {one.compute_dtype}" for one in references)
        return f"The references computed: {each}."
    if not references:
        return ""
    stored = "is stored in half precision and " if references[0].compute_dtype == "float32" else ""
    return f"The reference {stored}computed in {references[0].compute_dtype}."


def shape_text(scenario: Scenario) -> str:
    """1024 prompt tokens, 1 new, batch 1; or 12 prompts of 183 to 1,402 tokens, 1 new, batch 1."""
    prompts, lengths = f"{scenario.prompt_tokens} prompt tokens", scenario.lengths
    if lengths:
        prompts = f"{plural(len(lengths), 'prompt')} of {min(lengths):,} to {max(lengths):,} tokens"
    mode = "" if scenario.mode == "eager" else f", {scenario.mode} decode"
    return f"{prompts}, {scenario.new_tokens} new, batch {scenario.batch}{mode}"
