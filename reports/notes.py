"""The words under the tables: machine, versions, scenarios, rounds, date, and what to be wary of."""

from collections.abc import Iterator, Sequence
from datetime import UTC

from bench.records.ratio import CONFIDENCE, EQUIVALENCE
from bench.records.scenario import Scenario
from reports.results import HEADLINE, OUTLIER_MADS, Measurement, Result, Timing
from reports.table import gigabytes_text

CUDA_GRAPH = "CUDA graph"
"""The decode mode of steps that a CUDA graph replays (Latency.decode_mode)."""

OUTLIER_SHARE = 0.05
"""From this share of outlying samples on, a reader is told what to do; fewer are only counted."""

STALE_S = 3600.0
"""Paired runs further apart than this were not measured in one go."""


def paragraph(measurement: Measurement) -> str:
    """What was measured, where, when and how, and what the columns mean; from the records alone."""
    timings = [timing for result in measurement.results for timing in result.timings.values()]
    sentences = [
        measured_text(measurement),
        dummy_text(measurement),
        _versions(measurement),
        _dtype(measurement),
        *(_scenario(scenario) for scenario in measurement.scenarios),
        _modes(measurement, timings),
        _memory(measurement),
        _outliers(timings),
        _time(measurement),
        _bandwidth(measurement, timings),
        _quality(measurement),
        _rounding(measurement),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def measured_text(measurement: Measurement) -> str:
    """On which machine, when and in how many rounds."""
    timings = [timing for result in measurement.results for timing in result.timings.values()]
    return f"Measured on {machine_text(measurement)}{dates_text(measurement)}{rounds_text(timings)}."


def warnings(measurement: Measurement) -> tuple[str, ...]:
    """One line for each thing that makes a row less than it seems."""
    results, labels = measurement.results, measurement.labels
    references = {one.subject.baseline for one in results if one.is_reference}
    alone = dict.fromkeys(one.subject.baseline for one in results if one.subject.baseline not in references)
    return (
        *(f"{baseline}: no reference was measured, so its rows have no ratios." for baseline in alone),
        *(f"{labels[one.subject]}: {words}" for one in results for words in _row_warnings(one)),
    )


def broken_lines(measurement: Measurement) -> tuple[str, ...]:
    """One line for each row that is broken: it must not be used, and what is compared with it says nothing."""
    return tuple(
        f"{measurement.labels[one.subject]}: {one.broken}"
        + (". Nothing that is compared with it means anything." if one.is_reference else ". Do not use it.")
        for one in measurement.results
        if one.broken
    )


def _row_warnings(result: Result) -> Iterator[str]:
    for placement in result.placements:
        yield (
            f"too big for one GPU, so accelerate spread it ({placement}); its times include what moves between devices "
            "in every pass, its peak memory is the first GPU's."
        )
    for timing in result.timings.values():
        yield from (f"in `{timing.scenario.name}` {words}" for words in _timing_warnings(timing))


def _timing_warnings(timing: Timing) -> Iterator[str]:
    """What makes the figures of one scenario, or its ratios to the reference, doubtful, and what to do about it."""
    if timing.unsteady:
        yield (
            f"the warm-up never became steady in {timing.unsteady} of {timing.rounds} rounds: close other "
            "programs and measure again."
        )
    if timing.outliers > OUTLIER_SHARE * timing.samples:
        yield (
            f"{timing.outliers} of {timing.samples} samples lie far from the rest (none is dropped): "
            "something else ran; close it and measure again, or raise --rounds."
        )
    if timing.throttled:
        yield (
            f"the GPU's clocks were held down ({', '.join(timing.throttled)}): let it cool, or lower the "
            "load, and measure again."
        )
    if timing.other_processes:
        programs = _plural(timing.other_processes, "other program")
        yield f"{programs} used the GPU: stop what runs there and measure again."
    comparison = timing.comparison
    if comparison and not comparison.order_balanced:
        yield (
            "it ran on the same side of the reference in every round, so the machine's "
            "drift is in its ratios; measure again with the rounds reversed in turn."
        )
    if comparison and comparison.apart_s is not None and comparison.apart_s > STALE_S:
        hours = comparison.apart_s / 3600
        apart = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
        yield f"it and its reference ran up to {apart} apart; measure both again in one go."


def dummy_text(measurement: Measurement) -> str:
    """Which weights were random, and in what shape; empty where none were."""
    shapes = dict.fromkeys(result.subject.dummy for result in measurement.results if result.subject.dummy)
    if not shapes:
        return ""
    return f"The weights are random, in the shape {' and '.join(map(str, shapes))}: time and memory depend on it alone."


def machine_text(measurement: Measurement) -> str:
    """The processor, and with it the GPU where that was measured."""
    facts = measurement.environment
    cpu = facts.cpu or "unknown processor"
    if not measurement.on_gpu:
        threads = f", {_plural(facts.torch_threads, 'thread')}" if facts.torch_threads else ""
        return f"a CPU ({cpu}{threads})"
    size = f", {gigabytes_text(facts.gpu_memory_bytes)} GB" if facts.gpu_memory_bytes else ""
    driver = f", driver {facts.gpu_driver}" if facts.gpu_driver else ""
    cuda = f", CUDA {facts.cuda}" if facts.cuda else ""
    return f"a GPU ({facts.gpu or 'unknown'}{size}{driver}{cuda}; host {cpu})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def dates_text(measurement: Measurement) -> str:
    """The days on which it was measured: on 2026-11-24."""
    moments = (measurement.first_start, measurement.last_start)
    days = list(dict.fromkeys(moment.astimezone(UTC).date().isoformat() for moment in moments if moment))
    return f" from {days[0]} to {days[1]}" if len(days) > 1 else f" on {days[0]}" if days else ""


def rounds_text(timings: Sequence[Timing]) -> str:
    """In how many rounds: in 3 to 5 rounds."""
    counts = sorted({timing.rounds for timing in timings})
    if len(counts) > 1:
        return f" in {counts[0]} to {counts[-1]} rounds"
    return f" in {_plural(counts[0], 'round')}" if counts else ""


def _versions(measurement: Measurement) -> str:
    facts = measurement.environment
    versions = {"Python": facts.python, **facts.libraries}
    if facts.source and facts.source.quantable:
        versions["quantable"] = facts.source.quantable
    known = [f"{name} {version}" for name, version in versions.items() if version]
    return f"Versions: {', '.join(known)}." if known else ""


def _dtype(measurement: Measurement) -> str:
    references = [result for result in measurement.results if result.is_reference and result.compute_dtype]
    if len(measurement.compute_dtypes) > 1:
        each = ", ".join(f"{one.subject.base_model} in {one.compute_dtype}" for one in references)
        return f"The references computed: {each}."
    if not references:
        return ""
    stored = "is stored in half precision and " if references[0].compute_dtype == "float32" else ""
    return f"The reference {stored}computed in {references[0].compute_dtype}."


def _scenario(scenario: Scenario) -> str:
    new = _plural(scenario.new_tokens, "new token")
    each = " each, the prompts one after the other" if scenario.lengths else ""
    return f"`{scenario.name}`: {prompts_text(scenario)}, then {new}{each}, batch {scenario.batch}."


def prompts_text(scenario: Scenario) -> str:
    """1024 prompt tokens; or 12 prompts of 183 to 1,402 tokens."""
    if not scenario.lengths:
        return f"{scenario.prompt_tokens} prompt tokens"
    low, high = min(scenario.lengths), max(scenario.lengths)
    return f"{_plural(len(scenario.lengths), 'prompt')} of {low:,} to {high:,} tokens"


def shape_text(scenario: Scenario) -> str:
    """1024 prompt tokens, 1 new, batch 1; or 12 prompts of 183 to 1,402 tokens, 1 new, batch 1."""
    mode = "" if scenario.mode == "eager" else f", {scenario.mode} decode"
    return f"{prompts_text(scenario)}, {scenario.new_tokens} new, batch {scenario.batch}{mode}"


def _modes(measurement: Measurement, timings: Sequence[Timing]) -> str:
    """How tokens were decoded, where some were not decoded by calling the model for each of them."""
    names: dict[str, list[str]] = {"graph": [], "eager": []}
    for scenario in measurement.scenarios:
        if scenario.decode_steps:
            names[scenario.mode].append(f"`{scenario.name}`")
    if not names["graph"]:
        return ""
    graph, eager = (" and ".join(names[mode]) for mode in ("graph", "eager"))
    said = f"In {graph} tokens are decoded on a static cache: "
    if not any(CUDA_GRAPH in timing.decode_modes for timing in timings if timing.scenario.mode == "graph"):
        return f"{said}step by step, without a CUDA graph."
    said += "one step is recorded as a CUDA graph, its RMS norms in one kernel each, and replayed."
    if not eager:
        return said
    return (
        f"{said} In {eager} decoding is eager: Python launches the kernels of every step, and where that takes "
        "longer than they do, it is what was measured."
    )


def _bandwidth(measurement: Measurement, timings: Sequence[Timing]) -> str:
    if not any(timing.decode_bytes_per_s for timing in timings):
        return ""
    copied = measurement.environment.copy_bytes_per_s
    copy = f"; a plain copy moves {gigabytes_text(copied)} GB/s here, read and written together" if copied else ""
    return (
        f"GB/s are the weights that a decode step must read at least, over its time, keys and values not counted{copy}."
    )


def _memory(measurement: Measurement) -> str:
    if measurement.memory is None:
        return ""
    words = {
        "RSS": "RAM GB is the largest resident set size of the process",
        "CUDA allocator": "VRAM GB is the most that PyTorch's CUDA allocator had handed out",
    }.get(measurement.memory, f"The memory column is a peak ({measurement.memory})")
    when = f"`{HEADLINE}`" if measurement.headline else "any scenario"
    return f"{words} while running {when}; GB are 1e9 bytes."


def _time(measurement: Measurement) -> str:
    first = f"In the first table it is that of `{HEADLINE}`, prompt and new tokens together."
    return (
        "Time is relative to the reference: x2.00 takes twice as long, so higher is slower. "
        f"{first if measurement.headline else f'`{HEADLINE}` was not run.'} "
        "Spread is the smallest and the largest ratio of one round. "
        f"The interval is a {CONFIDENCE:.0%} bootstrap over rounds. The verdict is slower or faster when all "
        f"of it lies more than {EQUIVALENCE:.0%} from x1.00, same within noise when all lies closer, else unsure."
    )


def _quality(measurement: Measurement) -> str:
    texts = dict.fromkeys((one.tokens, one.text) for result in measurement.results if (one := result.quality))
    words = [f"Perplexity is over {tokens} tokens of held-out text ({text})." for tokens, text in texts]
    if any(result.quality and result.quality.divergence for result in measurement.results):
        words.append(
            "KLD is the divergence KL(reference || row) of the next-token distributions on the same text, in nats a "
            "token; flips are the tokens whose likeliest choice is another. The reference against itself, its sums "
            "done in another order, is the noise floor."
        )
    return " ".join(words)


def _outliers(timings: Sequence[Timing]) -> str:
    far, samples = sum(one.outliers for one in timings), sum(one.samples for one in timings)
    if not far:
        return ""
    return (
        f"{far} of {samples} samples lie more than {OUTLIER_MADS:g} scaled median absolute deviations from their run's "
        "median; none is dropped, medians are taken."
    )


def _rounding(measurement: Measurement) -> str:
    """Error feedback is more than what AutoAWQ and load_in_4bit do, so a reader is told which rows have it."""
    methods = sorted({result.subject.method for result in measurement.results if result.subject.rounding == "gptq"})
    if not methods:
        return ""
    return f"The 4-bit codes of {' and '.join(methods)} were chosen with GPTQ's error feedback on calibration text."
