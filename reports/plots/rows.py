"""The figures of a table's rows: loss against memory, time against FP16, peak memory by what it is for."""

import math
from collections.abc import Sequence

from bench.records.comparison import grouped
from bench.records.ratio import CONFIDENCE
from bench.records.record import Phase
from quantize.errors import UserError
from reports.notes import joined, machine_text, shape_text
from reports.plots.labels import Point, place
from reports.plots.style import COLORS, INK, MUTED, SHADE, Axes, Figure, method_colors, name_text, new_figure, scale
from reports.results import PARTS, Measurement, Result, Timing
from reports.table import UNKNOWN, gigabytes_text, per_second_text, ratio_text

WHOLE = "not told apart"
ROLES = {"weights": COLORS[3], "KV cache": COLORS[2], "activations": COLORS[1], "rest": "#BBBBBB", WHOLE: "#DDDDDD"}
ON_BAR = "#111111"  # bars are pale, and the words on them dark on every page
SAME = 300  # points within one part in so many of the axes are one to the eye


def loss_figure(measurement: Measurement, memory_bytes: int | None, context: int | None) -> Figure:
    """Loss over GB of weights or, with `memory_bytes`, over GB of the peak; a name and tokens/s at each point.

    Loss is the mean divergence or, where no row has one, how much the perplexity is above the reference's. A broken row
    is hollow, and never on the dashed Pareto line. Raises UserError where no row's loss is known."""
    scenario, judged = measurement.peak_scenario, any(row.mean_divergence is not None for row in measurement.results)
    meaning = "KLD: KL(reference || row), nats a token" if judged else "perplexity above the reference's, %"
    points: list[tuple[Result, Point]] = []
    for row in measurement.results:
        loss = row.mean_divergence if judged else row.loss and 100 * row.loss
        loss = 0.0 if row.is_reference else loss
        size = sum(shares_of(row.timing(scenario), context).values()) if memory_bytes else row.weights_bytes
        if size and loss is not None and math.isfinite(loss):
            points.append((row, (size / 1e9, loss)))
    if all(row.is_reference for row, _ in points) or not measurement.scenarios:
        random = all(row.subject.dummy for row in measurement.results)
        raise UserError("random weights have no quality" if random else "no row's loss is known")
    phase: Phase = "decode" if measurement.scenario_of("decode") else "prefill"
    what = f"peak {measurement.memory_name}" if memory_bytes else "weights"
    timed = getattr(measurement.scenario_of(phase), "name", "")
    note = f"Lower left is better; dashed: no other row is better in both. Tokens/s: {phase} in {timed}."
    notes = [note, _peak_note(measurement, context) if memory_bytes else ""]
    figure = _figure(measurement, f"loss against {what}", 5 + 0.12 * len(points), [row for row, _ in points], *notes)
    axes = figure.add_subplot(xlabel=f"{what}, GB", ylabel=meaning)
    scale(axes, "x", [*(size for _, (size, _) in points), (memory_bytes or 0) / 1e9])
    scale(axes, "y", [loss for _, (_, loss) in points])
    for row, point in points:
        color = method_colors(measurement)[row.subject]
        axes.plot(*point, "o", ms=7, color=color, mfc="none" if row.broken else color, zorder=4)
    for same in grouped(points, lambda one: one[0].subject.base_model).values():
        line = pareto([point for row, point in same if not row.broken])
        axes.plot([x for x, _ in line], [y for _, y in line], color=MUTED, linewidth=1, dashes=(5, 3))
    _memory_line(axes, memory_bytes)
    to_axes = axes.transScale + axes.transLimits
    seen = grouped(points, lambda one: tuple(round(SAME * float(way)) for way in to_axes.transform(one[1])))
    place(axes, [(one[0][1], _words(measurement, [row for row, _ in one], phase)) for one in seen.values()])
    return figure


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other betters: none has less of one without more of the other; ascending by the first."""
    ordered = sorted(points)
    return [point for n, point in enumerate(ordered) if all(point[1] < other[1] for other in ordered[:n])]


def _words(measurement: Measurement, rows: Sequence[Result], phase: Phase) -> str:
    """What stands at a point: the rows there, and their tokens a second."""
    timings = filter(None, (row.timing(measurement.scenario_of(phase)) for row in rows))
    speeds = sorted(filter(None, (timing.tokens_per_s(phase) for timing in timings)))
    texts = dict.fromkeys(per_second_text(speed) for speed in speeds[:1] + speeds[-1:])
    names = joined([name_text(measurement.labels[row.subject]) for row in rows], ",\n")
    return names + (f"\n{' to '.join(texts)} tokens/s" if texts else "")


def speed_figure(measurement: Measurement) -> Figure:
    """A panel a phase and scenario: rows' times over FP16's, and intervals. Raises UserError where no row has one."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in measurement.results if not row.is_reference]
    kinds = [(phase, scenario) for phase in PARTS for scenario in measurement.scenarios]
    shown = [one for one in kinds if any(timing.ratio(one[0]) for _, timing in measurement.timed(one[1]))]
    if not shown:
        raise UserError("no row has a time to compare with the reference's")
    note = f"Right is slower. Bars: {CONFIDENCE:.0%} intervals over rounds. Pale: unsure, more rounds would tell."
    height_in = 1 + len(shown) * (0.4 + 0.3 * len(rows))
    figure = _figure(measurement, "time against FP16", height_in, measurement.results, note)
    panels = figure.subplots(len(shown), sharex=True, sharey=True, squeeze=False)[:, 0]
    drawn = [0.5, 2.0]
    for axes, (phase, scenario) in zip(panels, shown, strict=True):
        axes.set_title(name_text(f"{phase} in {scenario.name}"), loc="left")
        axes.axvline(1.0, color=INK, linewidth=1)
        for height, row in enumerate(rows):
            timing, color = row.timing(scenario), method_colors(measurement)[row.subject]
            ratio = timing.ratio(phase) if timing else None
            words = ratio_text(ratio.value) if ratio else row.status_in(scenario) or UNKNOWN
            axes.text(1.02, height, words, transform=axes.get_yaxis_transform(), va="center")
            if ratio:
                alpha = 0.35 if ratio.verdict == "unsure" else 1.0
                low, high = ratio.interval or (ratio.value, ratio.value)
                axes.plot([low, high], [height] * 2, color=color, alpha=alpha, linewidth=2)
                axes.plot(ratio.value, height, "o", color=color, alpha=alpha, mfc="none" if row.broken else color)
                drawn += [low, high]
    first = panels[0]
    first.set_yticks(range(len(rows)), [name_text(measurement.labels[row.subject]) for row in rows])
    first.set_xscale("log", base=2)
    first.set(xlim=(0.9 * min(drawn), 1.1 * max(drawn)), ylim=(len(rows) - 0.5, -0.5))
    first.xaxis.set_major_locator(LogLocator(base=2, numticks=5))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter("x{x:g}")
    return figure


def memory_figure(measurement: Measurement, memory_bytes: int | None, context: int | None) -> Figure:
    """One bar a row, in parts: what the peak is for (`shares_of`). Raises UserError where no row has a peak."""
    scenario = measurement.peak_scenario
    found = [(row, shares_of(row.timing(scenario), context)) for row in measurement.results]
    bars = [(row, shares, sum(shares.values())) for row, shares in found if shares]
    if not bars:
        raise UserError(f"no row's peak memory is known{' by what it is for' if context else ''}")
    rows, title = [row for row, _, _ in bars], f"peak {measurement.memory_name} by what it is for"
    figure = _figure(measurement, title, 1.9 + 0.32 * len(rows), rows, _peak_note(measurement, context))
    right = 1.05 * max(memory_bytes or 0, *(peak for _, _, peak in bars)) / 1e9
    axes = figure.add_subplot(xlabel="GB", xlim=(0, right), ylim=(len(rows) - 0.5, -0.5))
    for height, (_, shares, peak) in enumerate(bars):
        start = 0.0
        for role, size in shares.items():
            bar = axes.barh(height, size / 1e9, 0.7, start, color=ROLES[role], label=role)
            if size / 1e9 > 0.06 * right:
                axes.bar_label(bar, [gigabytes_text(size)], label_type="center", color=ON_BAR, fontsize=8, zorder=4)
            start += size / 1e9
        axes.text(1.01, height, gigabytes_text(peak), transform=axes.get_yaxis_transform(), va="center")
    axes.text(1.01, 1.0, "peak", transform=axes.transAxes, va="bottom", color=MUTED)
    axes.set_yticks(range(len(rows)), [name_text(measurement.labels[row.subject]) for row in rows])
    keys = {role: handle for handle, role in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(keys.values()), list(keys), loc="outside right upper", frameon=False)
    _memory_line(axes, memory_bytes)
    return figure


def shares_of(timing: Timing | None, context: int | None = None) -> dict[str, int]:
    """What the peak is for -> bytes, whose sum is the peak; one share where it was not told apart, none without a peak.

    context: tokens of each sequence, the batch as it ran, for which the KV cache is reckoned: in proportion to the
    tokens, from what was held or, where that is more, from layers * key-value heads * head size. So much holds a model
    whose every layer keeps every token; where layers attend to a window it is too much, and a record can tell only
    where its run was longer than the window. Activations stay those of the run."""
    memory, peak = (timing.memory, timing.run_peak_bytes) if timing else (None, None)
    if timing is None or memory is None or not peak:
        return {}
    sizes = memory.weights_bytes, memory.kv_cache_bytes, memory.activations_bytes, memory.rest_bytes
    shares = {role: size for role, size in zip(ROLES, sizes, strict=False) if size is not None}
    if len(shares) < len(sizes) or sum(shares.values()) != peak:
        return {} if context else {WHOLE: peak}
    if context:
        held = max(shares["KV cache"], memory.kv_cache_formula_bytes or 0)
        shares["KV cache"] = round(held * context / timing.scenario.positions)
    return shares


def _peak_note(measurement: Measurement, context: int | None) -> str:
    """Which scenario's peaks they are, and how the KV cache of another context was reckoned."""
    scenario = measurement.peak_scenario
    said = f"Peaks are of {scenario.name}: {shape_text(scenario)}." if scenario else ""
    if context:
        said += f" The KV cache is that of {context:,} tokens, in proportion; activations as they were."
        found = [timing.memory for _, timing in measurement.timed(scenario) if timing.memory]
        if any((one.kv_cache_bytes or 0) < (one.kv_cache_formula_bytes or 0) for one in found):
            said += " It is at most that: not every layer keeps every token."
    return said


def _memory_line(axes: Axes, memory_bytes: int | None) -> None:
    """The memory there is, as a vertical line over GB; what does not fit is shaded."""
    if memory_bytes:
        limit, (left, right) = memory_bytes / 1e9, axes.get_xlim()
        axes.axvspan(limit, right, color=SHADE, linewidth=0, zorder=0)
        axes.axvline(limit, color=INK, linewidth=1, dashes=(4, 2), zorder=3)
        align, heights = "right" if limit > (left + right) / 2 else "left", axes.get_xaxis_transform()
        axes.text(limit, 1.0, f"{limit:.4g} GB of memory", transform=heights, ha=align, va="bottom")


def _figure(measurement: Measurement, title: str, height_in: float, shown: Sequence[Result], *notes: str) -> Figure:
    """An empty figure that says of what and where it was measured, and which rows are not in it."""
    models = ", ".join(dict.fromkeys(row.subject.baseline for row in measurement.results))
    absent = [name_text(measurement.labels[row.subject]) for row in measurement.results if row not in shown]
    left_out = f"Without these figures: {', '.join(absent)}." if absent else ""
    return new_figure(f"{models}, {title}, on {machine_text(measurement)}", height_in, *notes, left_out)
