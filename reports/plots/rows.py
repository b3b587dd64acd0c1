"""The figures of a table's rows: loss against memory, time against FP16, peak memory by what it is for."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.records.comparison import grouped
from bench.records.ratio import CONFIDENCE, EQUIVALENCE
from bench.records.record import Phase, Subject
from bench.records.scenario import Scenario
from quantize.errors import UserError
from reports.notes import machine_text, shape_text
from reports.plots.labels import Point, freeze, groups, place
from reports.plots.style import COLORS, INK, MUTED, SHADE, method_colors, name_text, new_figure, scale
from reports.results import Measurement, Result, Timing
from reports.table import UNKNOWN, gigabytes_text, per_second_text, ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHOLE = "not told apart"
ROLES = {"weights": COLORS[3], "KV cache": COLORS[2], "activations": COLORS[1], "rest": "#BBBBBB", WHOLE: "#DDDDDD"}
ON_BAR = "#111111"
"""Bars are pale and the words on them dark on every page."""

PALE = 0.35
"""How much of its colour a ratio keeps whose verdict is "unsure"."""

PANELS = 3
"""Side by side."""


def loss_figure(measurement: Measurement, memory_bytes: int | None, context: int | None) -> "Figure":
    """Loss over GB of weights or, with `memory_bytes`, over GB of the peak; tokens/s and a name at each point.

    A broken row is hollow, and never on the dashed Pareto line. Raises UserError where no row's loss is known.
    """
    losses, meaning, form = losses_of(measurement)
    peaks = {one: sum(shares.values()) for one, shares in shares_of(measurement, context).items()}
    sizes = peaks if memory_bytes else {one.subject: one.weights_bytes for one in measurement.results}
    rows = [one for one in measurement.results if sizes.get(one.subject) and one.subject in losses]
    if all(one.is_reference for one in rows):
        random = all(one.subject.dummy for one in measurement.results)
        raise UserError("random weights have no quality" if random else "no row's loss is known")
    points = [((sizes[one.subject] or 0) / 1e9, losses[one.subject]) for one in rows]
    speeds, spoken = _speeds(measurement)
    what = f"peak {_memory_unit(measurement)}" if memory_bytes else "weights"
    notes = [f"Lower left is better; dashed: those that no other betters in both.{spoken}"]
    notes += [_peak_note(measurement, context)] if memory_bytes else []
    figure = _figure(measurement, f"Loss against {what}", 5 + 0.12 * len(rows), rows, *notes)
    axes = figure.add_subplot(xlabel=f"{what}, GB", ylabel=meaning)
    scale(axes, "x", [size for size, _ in points] + ([memory_bytes / 1e9] if memory_bytes else []))
    scale(axes, "y", [loss for _, loss in points], form)
    colors = method_colors(one.subject for one in measurement.results)
    for one, point in zip(rows, points, strict=True):
        color = colors[one.subject]
        face = "none" if one.broken else color
        axes.plot(*point, "o", markersize=7, color=color, markerfacecolor=face, zorder=4)
    for same in grouped(range(len(rows)), lambda number: rows[number].subject.base_model).values():
        line = pareto([points[number] for number in same if not rows[number].broken])
        axes.plot([x for x, _ in line], [y for _, y in line], color=MUTED, linewidth=1, dashes=(5, 3), zorder=2)
    _memory_line(axes, memory_bytes)
    freeze(axes)
    for together in (found := groups(axes, points)):
        together.sort(key=lambda number: rows[number].subject.name)
    place(axes, [(points[one[0]], _words(measurement, [rows[number] for number in one], speeds)) for one in found])
    return figure


def losses_of(measurement: Measurement) -> tuple[dict[Subject, float], str, str]:
    """Each row's loss where it is known, what that is, and how it is written; a reference loses nothing.

    The mean divergence (KLD) or, where no row has one, how much the perplexity is above the reference's, in percent.
    """
    results = measurement.results
    losses = {one.subject: one.quality.divergence.mean for one in results if one.quality and one.quality.divergence}
    meaning, form = "KLD: KL(reference || row), nats a token", "{x:g}"
    if not losses:
        losses = {one.subject: 100 * (one.perplexity_ratio - 1) for one in results if one.perplexity_ratio is not None}
        meaning, form = "perplexity above the reference's", "{x:g}%"
    losses |= {one.subject: 0.0 for one in results if one.is_reference}
    return {one: loss for one, loss in losses.items() if math.isfinite(loss)}, meaning, form


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other betters: none has less of one without more of the other; ascending by the first."""
    line: list[Point] = []
    for point in sorted(points):
        if not line or point[1] < line[-1][1]:
            line.append(point)
    return line


def joined(names: Sequence[str]) -> str:
    """Several rows' names as one, what they share said once: AWQ GEMM, GEMV, group 64."""
    parts = [name.partition(", ") for name in names]
    starts = [head.rpartition(" ") for head, _, _ in parts]
    if len({rest for _, _, rest in parts}) > 1 or len({start for start, _, _ in starts}) > 1:
        return ",\n".join(names)
    return ", ".join([parts[0][0], *(end for _, _, end in starts[1:]), *filter(None, [parts[0][2]])])


def _words(measurement: Measurement, rows: Sequence[Result], speeds: dict[Subject, float]) -> str:
    """What stands at a point: the rows there, and their tokens a second."""
    found = sorted(speeds[one.subject] for one in rows if one.subject in speeds)
    texts = dict.fromkeys(per_second_text(one) for one in found[:1] + found[-1:])
    names = joined([name_text(measurement.labels[one.subject]) for one in rows])
    return names + (f"\n{' to '.join(texts)} tokens/s" if texts else "")


def _speeds(measurement: Measurement) -> tuple[dict[Subject, float], str]:
    """Tokens a second of each row, and what of: of decoding where a scenario has it, else of the prompt."""
    scenario = max(measurement.scenarios, key=lambda one: one.decode_steps)
    timings = {one.subject: timing for one in measurement.results if (timing := one.timing(scenario))}
    phase = "decode" if scenario.decode_steps else "prefill"
    speeds = {one: getattr(timing, f"{phase}_tokens_per_s") for one, timing in timings.items()}
    return {one: speed for one, speed in speeds.items() if speed}, f" Tokens/s: {phase} in `{scenario.name}`."


def speed_figure(measurement: Measurement) -> "Figure":
    """A panel for each phase and scenario, in it a line a row: its ratio to FP16's time and the interval.

    Raises UserError where no row can be compared with a reference.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [one for one in measurement.results if not one.is_reference]
    phases: tuple[Phase, ...] = ("prefill", "decode")
    shown = {
        (phase, scenario): drawn
        for phase in phases
        for scenario in measurement.scenarios
        if (drawn := [one for one in rows if (timing := one.timing(scenario)) and timing.ratio(phase)])
    }
    if not shown:
        raise UserError("no row has a time to compare with the reference's")
    lines = math.ceil(len(shown) / PANELS)
    note = f"Bars: {CONFIDENCE:.0%} intervals over rounds. Pale: unsure, more rounds would tell. Right is slower."
    height = 1.3 + lines * (0.7 + 0.3 * len(rows))
    figure = _figure(measurement, "Time against FP16", height, measurement.results, note)
    grid = figure.subplots(lines, min(PANELS, len(shown)), sharex=True, sharey=True, squeeze=False)
    colors = method_colors(one.subject for one in measurement.results)
    for axes, (phase, scenario) in zip(grid.flat, shown, strict=False):
        axes.set_title(f"{phase} in {name_text(scenario.name)}", loc="left")
        for height, one in enumerate(rows):
            timing, color = one.timing(scenario), colors[one.subject]
            ratio = timing.ratio(phase) if timing else None
            failed = [failure.status for failure in one.failures if failure.work == scenario.name]
            words = ratio_text(ratio.value) if ratio else failed[-1] if failed else UNKNOWN
            axes.text(1.02, height, words, transform=axes.get_yaxis_transform(), va="center")
            if ratio:
                alpha, face = PALE if ratio.verdict == "unsure" else 1.0, "none" if one.broken else color
                axes.plot(ratio.interval or [ratio.value] * 2, [height] * 2, color=color, alpha=alpha, linewidth=2)
                axes.plot(ratio.value, height, "o", color=color, markerfacecolor=face, alpha=alpha)
        axes.axvspan(1 / (1 + EQUIVALENCE), 1 + EQUIVALENCE, color=SHADE, linewidth=0, zorder=0)
        axes.axvline(1.0, color=INK, linewidth=1, zorder=1)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    first = grid[0, 0]
    first.set_yticks(range(len(rows)), [name_text(measurement.labels[one.subject]) for one in rows])
    first.set_ylim(len(rows) - 0.5, -0.5)
    drawn = [float(x) for one in grid.flat[: len(shown)] for line in one.lines for x in line.get_xdata()]
    first.set_xscale("log", base=2)
    first.set_xlim(0.9 * min(0.5, *drawn), 1.1 * max(2.0, *drawn))
    first.xaxis.set_major_locator(LogLocator(base=2, numticks=5))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter("x{x:g}")
    return figure


def memory_figure(measurement: Measurement, memory_bytes: int | None, context: int | None) -> "Figure":
    """One bar a row, in parts: what the peak is for (`shares_of`); the peak at its end.

    Raises UserError where no row has a peak.
    """
    shares = {one: found for one, found in shares_of(measurement, context).items() if found}
    if not shares:
        raise UserError(f"no row's peak memory is known{' by what it is for' if context else ''}")
    rows = [one for one in measurement.results if one.subject in shares]
    title, note = f"Peak {_memory_unit(measurement)} by what it is for", _peak_note(measurement, context)
    figure = _figure(measurement, title, 1.9 + 0.32 * len(rows), rows, note)
    axes = figure.add_subplot(xlabel="GB", ylim=(len(rows) - 0.5, -0.5))
    peaks = [sum(found.values()) for found in shares.values()]
    right = 1.05 * max(*peaks, memory_bytes or 0) / 1e9
    axes.set(xlim=(0, right))
    for height, (found, peak) in enumerate(zip(shares.values(), peaks, strict=True)):
        start = 0.0
        for role, size in found.items():
            bar = axes.barh(height, size / 1e9, 0.7, start, color=ROLES[role], label=role)
            if size / 1e9 > 0.06 * right:
                axes.bar_label(bar, [gigabytes_text(size)], label_type="center", color=ON_BAR, fontsize=8, zorder=4)
            start += size / 1e9
        axes.text(1.01, height, gigabytes_text(peak), transform=axes.get_yaxis_transform(), va="center")
    axes.text(1.01, 1.0, "peak", transform=axes.transAxes, va="bottom", color=MUTED)
    axes.set_yticks(range(len(rows)), [name_text(measurement.labels[one.subject]) for one in rows])
    handles, roles = axes.get_legend_handles_labels()
    keys = dict(zip(roles, handles, strict=True))
    figure.legend(keys.values(), keys, loc="outside upper right", ncols=len(keys), frameon=False)
    _memory_line(axes, memory_bytes)
    return figure


def shares_of(measurement: Measurement, context: int | None = None) -> dict[Subject, dict[str, int]]:
    """For each row that ran in the peaks' scenario what its peak is for -> bytes, whose sum is the peak.

    One share where the peak was not told apart; none where it is unknown or, with a context, not told apart.

    context: tokens of each sequence, the batch as it ran, for which the KV cache is reckoned: in proportion to the
    tokens, from what was held or, where that is more, from layers * key-value heads * head size. So much holds a model
    whose every layer keeps every token; where layers attend to a window it is too much, and a record can tell only
    where its run was longer than the window. Activations stay those of the run.
    """
    scenario = _peak_scenario(measurement)
    timings = {one.subject: timing for one in measurement.results if (timing := one.timing(scenario))}
    return {one: _shares(timing, context) for one, timing in timings.items()}


def _shares(timing: Timing, context: int | None) -> dict[str, int]:
    memory, peak = timing.memory, timing.run_peak_bytes
    if memory is None or not peak:
        return {}
    sizes = memory.weights_bytes, memory.kv_cache_bytes, memory.activations_bytes, memory.rest_bytes
    known = {role: size for role, size in zip(ROLES, sizes, strict=False) if size is not None}
    if len(known) < len(sizes) or sum(known.values()) != peak:
        return {} if context else {WHOLE: peak}
    if context:
        held = max(known["KV cache"], memory.kv_cache_formula_bytes or 0)
        known["KV cache"] = round(held * context / timing.scenario.positions)
    return known


def _peak_scenario(measurement: Measurement) -> Scenario | None:
    """The scenario that peaks are shown of: `published`, or when that was not run, the one with the most tokens."""
    longest = max(measurement.scenarios, key=lambda one: one.positions * one.batch, default=None)
    return measurement.headline or longest


def _peak_note(measurement: Measurement, context: int | None) -> str:
    """Which scenario's peaks they are, and how the KV cache of another context was reckoned."""
    scenario = _peak_scenario(measurement)
    if scenario is None:
        return ""
    said = f"Peaks are of `{scenario.name}`: {shape_text(scenario)}."
    if context:
        said += f" The KV cache is that of {context:,} tokens, in proportion; activations as they were."
        found = [timing.memory for one in measurement.results if (timing := one.timing(scenario)) and timing.memory]
        if any((one.kv_cache_bytes or 0) < (one.kv_cache_formula_bytes or 0) for one in found):
            said += " It holds at most that: not every layer keeps every token."
    return said


def _memory_unit(measurement: Measurement) -> str:
    return "RAM" if measurement.memory_is_ram else "VRAM"


def _memory_line(axes: "Axes", memory_bytes: int | None) -> None:
    """The memory there is, as a vertical line over GB; what does not fit is shaded."""
    if memory_bytes:
        limit, (left, right) = memory_bytes / 1e9, axes.get_xlim()
        axes.axvspan(limit, right, color=SHADE, linewidth=0, zorder=0)
        axes.axvline(limit, color=INK, linewidth=1, dashes=(4, 2), zorder=3)
        align, heights = "right" if limit > (left + right) / 2 else "left", axes.get_xaxis_transform()
        axes.text(limit, 1.0, f"{limit:.4g} GB of memory", transform=heights, ha=align, va="bottom")


def _figure(measurement: Measurement, title: str, height_in: float, shown: Sequence[Result], *notes: str) -> "Figure":
    """An empty figure that says where it was measured and which rows are not in it."""
    names = [name_text(measurement.labels[one.subject]) for one in measurement.results if one not in shown]
    left_out = f"Without these figures: {', '.join(names)}." if names else ""
    return new_figure(f"{title}: {machine_text(measurement)}", height_in, *notes, left_out)
