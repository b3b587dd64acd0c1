"""The crossover as one figure: time against the dense product's, over tokens at once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantize.errors import UserError
from reports.plots.labels import place
from reports.plots.style import COLORS, FAINT, INK, METHOD_COLORS, MUTED, SHADE, Axes, Figure, name_text, new_figure
from tests.lab.crossover.crossings import DECODE_BATCHES, PROMPT_TOKENS, crossings, series_by_contender
from tests.lab.crossover.page import setting_text, tokens_text
from tests.lab.records import CrossoverEntry, Style

LINES: dict[Style, str] = {"dense": "-", "GEMM": "-", "GEMV": "--", "bitsandbytes": ":"}
MARKERS = ("o", "s", "^", "D", "v", "P")


def crossover_figure(entries: Sequence[CrossoverEntry]) -> Figure:
    """One line a contender; a ring where two cross over, filled and with its tokens on the dense product's.

    Raises UserError without figures of the dense product.
    """
    relative = {name: series for name, series in relative_to_dense(entries).items() if series}
    figure = new_figure(f"Which kernel for how many tokens: {setting_text(entries[0])}", 6)
    axes = figure.add_subplot(xlabel="tokens at once", ylabel="time of one layer's linear layers, over the dense one's")
    _scale(axes, sorted({tokens for series in relative.values() for tokens in series}))
    styles = {entry.contender: entry.style for entry in entries}
    colors = iter(COLORS * len(relative))
    ends = []
    for number, (name, series) in enumerate(relative.items()):
        look: dict[str, Any] = {"color": INK, "label": name_text(name)}
        if styles[name] != "dense":
            look |= {"color": METHOD_COLORS.get(name) or next(colors), "marker": MARKERS[number % len(MARKERS)]}
        [line] = axes.plot(list(series), list(series.values()), LINES[styles[name]], ms=4, zorder=3, **look)
        ends.append((list(series.values())[-1], number, line))
    from_above = [line for _, _, line in sorted(ends, reverse=True)]
    axes.legend(handles=from_above, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    dense, marked = next(iter(relative)), []
    for crossing in sorted(crossings(entries), key=lambda one: one.tokens or 0.0):
        if crossing.tokens is not None and all(name in relative for name in crossing.pair):
            point = crossing.tokens, height_at(relative[crossing.pair[1]], crossing.tokens)
            axes.plot(*point, "o", ms=5, color=INK, mfc=INK if dense in crossing.pair else "none", zorder=4)
            marked += [(point, tokens_text(point[0]))] * (dense in crossing.pair)
    place(axes, marked)
    return figure


def relative_to_dense(entries: Sequence[CrossoverEntry]) -> dict[str, dict[int, float]]:
    """Contender -> tokens -> median time over the dense one's, that first. Raises UserError where it was not timed."""
    timed = series_by_contender(entries)
    dense = next((entry.contender for entry in entries if entry.style == "dense" and entry.contender in timed), None)
    if dense is None:
        raise UserError("the crossover has no figures of the dense product to compare with: measure it again")
    base = {n: one.median_s or math.nan for n, one in timed[dense].items()}
    return {
        name: {n: (one.median_s or math.nan) / base[n] for n, one in timed[name].items() if n in base}
        for name in sorted(timed, key=lambda name: name != dense)
    }


def _scale(axes: Axes, counts: Sequence[int]) -> None:
    """Logarithmic both ways, the two ranges of tokens marked."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    left, right = counts[0] / 1.3, counts[-1] * 1.3
    axes.set(xlim=(left, right), xticks=counts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("x{x:g}")
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    boundary = math.sqrt(DECODE_BATCHES[-1] * PROMPT_TOKENS[0])
    axes.axvspan(left, max(left, min(boundary, right)), color=SHADE, linewidth=0, zorder=0)
    ranges = {"decode: batch": (left, min(boundary, right)), "prefill: prompt": (max(boundary, left), right)}
    for title, (low, high) in ranges.items():
        if low < high:
            heights = axes.get_xaxis_transform()
            axes.text(math.sqrt(low * high), 1, title, transform=heights, ha="center", va="bottom", color=MUTED)


def height_at(series: Mapping[int, float], tokens: float) -> float:
    """A series of times by tokens at this number of tokens, straight in log-log between the measured ones."""
    import numpy as np

    return float(np.exp(np.interp(np.log(tokens), np.log(list(series)), np.log(list(series.values())))))
