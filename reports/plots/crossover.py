"""The crossover as one figure: time against the dense product's, over tokens at once."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.records.crossover import DECODE_BATCHES, PROMPT_TOKENS, CrossoverEntry, Style, crossings, series_by_contender
from quantize.errors import UserError
from reports.crossover import setting_text, tokens_text
from reports.plots.labels import freeze, place
from reports.plots.style import COLORS, FAINT, INK, METHOD_COLORS, MUTED, SHADE, name_text, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES: dict[Style, str] = {"dense": "-", "GEMM": "-", "GEMV": "--", "bitsandbytes": ":"}
MARKERS = ("o", "s", "^", "D", "v", "P")

Series = Mapping[int, float]
"""Tokens at once, ascending -> time as a multiple of the dense product's."""


def crossover_figure(entries: Sequence[CrossoverEntry], table_dtypes: Iterable[str] = ()) -> "Figure":
    """One line a contender, its name at the end; a ring where two cross over, with its tokens on the dense product's.

    table_dtypes: what the rows of the table beside it computed in: where that is another dtype, the figure says so.
    Raises UserError without figures of the dense product.
    """
    relative = {name: series for name, series in relative_to_dense(entries).items() if series}
    styles = {entry.contender: entry.style for entry in entries}
    others = [name for name in relative if styles[name] != "dense" and name not in METHOD_COLORS]
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(others)} | METHOD_COLORS
    dtypes = [dtype for dtype in table_dtypes if dtype != entries[0].compute_dtype]
    note = f"The table's rows computed in {', '.join(dtypes)}, these in {entries[0].compute_dtype}." if dtypes else ""
    figure = new_figure(f"Which kernel for how many tokens: {setting_text(entries[0])}", 6, note)
    axes = figure.add_subplot()
    _axes(axes, sorted({tokens for series in relative.values() for tokens in series}))
    ends = []
    for number, (name, series) in enumerate(relative.items()):
        dense = styles[name] == "dense"
        color = INK if dense else colors[name]
        marker = None if dense else MARKERS[(number - 1) % len(MARKERS)]
        axes.plot(
            list(series), list(series.values()), LINES[styles[name]], color=color, marker=marker, markersize=4, zorder=3
        )
        ends.append((list(series.items())[-1], name_text(name)))
    marked = _mark_crossings(axes, entries, relative)
    freeze(axes)
    place(axes, [*ends, *marked])
    return figure


def relative_to_dense(entries: Sequence[CrossoverEntry]) -> dict[str, dict[int, float]]:
    """Contender -> tokens -> median time over the dense one's, that first. Raises UserError where it was not timed."""
    medians = {
        name: {tokens: statistics.median(entry.seconds) for tokens, entry in series.items()}
        for name, series in series_by_contender(entries).items()
    }
    dense = next((entry.contender for entry in entries if entry.style == "dense" and entry.contender in medians), None)
    if dense is None:
        raise UserError(
            "the crossover has no figures of the dense product to draw the others against: measure it again"
        )
    base = medians[dense]
    return {
        name: {tokens: seconds / base[tokens] for tokens, seconds in medians[name].items() if tokens in base}
        for name in sorted(medians, key=lambda name: name != dense)
    }


def _axes(axes: "Axes", counts: Sequence[int]) -> None:
    """Logarithmic both ways, the two ranges of tokens marked."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    left, right = counts[0] / 1.3, counts[-1] * 2.6  # room for the names at the lines' ends
    axes.set(
        xlim=(left, right),
        xlabel="tokens at once",
        ylabel="time of one layer's linear layers, against the dense product",
    )
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("x{x:g}")
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    boundary = math.sqrt(DECODE_BATCHES[-1] * PROMPT_TOKENS[0])
    if counts[0] < boundary:
        axes.axvspan(left, min(boundary, right), color=SHADE, linewidth=0, zorder=0)
    for title, low, high in (("decode: batch", left, boundary), ("prefill: prompt", boundary, right)):
        if any(low < tokens < high for tokens in counts):
            middle, heights = math.sqrt(max(low, left) * min(high, right)), axes.get_xaxis_transform()
            axes.text(middle, 1.0, title, transform=heights, ha="center", va="bottom", color=MUTED)


def _mark_crossings(
    axes: "Axes", entries: Sequence[CrossoverEntry], relative: Mapping[str, Series]
) -> list[tuple[tuple[float, float], str]]:
    """A ring at every crossing; a filled one where it is with the dense product: those points, with their tokens."""
    dense = next(iter(relative))
    marked = []
    for crossing in sorted(crossings(entries), key=lambda one: one.tokens or 0.0):
        if crossing.tokens is None or not all(relative.get(name) for name in crossing.pair):
            continue
        point = crossing.tokens, height_at(relative[crossing.pair[1]], crossing.tokens)
        fill = INK if dense in crossing.pair else "none"
        axes.plot(*point, "o", markersize=5, markerfacecolor=fill, markeredgecolor=INK, zorder=4)
        if dense in crossing.pair:
            marked.append((point, tokens_text(point[0])))
    return marked


def height_at(series: Series, tokens: float) -> float:
    """The series at this number of tokens, straight in log-log between the measured ones."""
    import numpy as np

    return float(np.exp(np.interp(np.log(tokens), np.log(list(series)), np.log(list(series.values())))))
