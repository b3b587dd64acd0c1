"""The crossover as one figure: time against the dense product's, over tokens at once. Needs matplotlib."""

import io
import logging
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.records.crossover import DECODE_BATCHES, PROMPT_TOKENS, CrossoverEntry, Style, crossings, series_by_contender
from quantize.errors import UserError
from quantize.files import write_whole
from reports.crossover import setting_text, tokens_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE_COLOR = "#000000"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's palette, told apart by colour-blind readers too; its yellow is too pale on white and left out."""

LINES: dict[Style, str] = {"dense": "-", "GEMM": "-", "GEMV": "--", "bitsandbytes": ":"}
MARKERS = ("o", "s", "^", "D", "v")
"""Five markers and seven colors meet again after 35 lines only."""

FILES: dict[str, dict[str, Any]] = {
    "crossover.png": {"format": "png", "metadata": {"Software": None}},
    "crossover.svg": {"format": "svg", "metadata": {"Date": None, "Creator": None}},
}
"""What would differ from run to run is left out of a file."""

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "quantable",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}

Series = Mapping[int, float]
"""Tokens at once, ascending -> time as a multiple of the dense product's."""


def crossover_plots(entries: Sequence[CrossoverEntry], folder: Path) -> list[Path]:
    """Draw a crossover as crossover.png and crossover.svg in the folder; the same entries give the same bytes.

    Raises UserError without matplotlib, without figures of the dense product, and where a file cannot be written.
    """
    relative = relative_to_dense(entries)
    for name, options in FILES.items():
        with _matplotlib_as_it_comes():
            drawn = io.BytesIO()
            _figure(entries, relative).savefig(drawn, dpi=150, **options)
        write_whole(folder / name, drawn.getvalue())
    return [folder / name for name in FILES]


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


@contextmanager
def _matplotlib_as_it_comes() -> Iterator[None]:
    """Inside, matplotlib has its own defaults and ours, whatever the user's matplotlibrc says, and is silent."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import matplotlib
            except ImportError:
                raise UserError("plots need matplotlib: install quantable[plots]") from None
            with matplotlib.rc_context():
                matplotlib.rcdefaults()
                matplotlib.rcParams.update(SETTINGS)
                yield
    finally:
        logger.setLevel(level)


def _figure(entries: Sequence[CrossoverEntry], relative: Mapping[str, Series]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    styles = {entry.contender: entry.style for entry in entries}
    drawn = {name: series for name, series in relative.items() if series}
    counts = sorted({tokens for series in drawn.values() for tokens in series})
    _axes(axes, counts, entries[0])
    colors = {}
    for place, (name, series) in enumerate(drawn.items()):
        style = styles[name]
        colors[name] = DENSE_COLOR if style == "dense" else COLORS[(place - 1) % len(COLORS)]
        marker = None if style == "dense" else MARKERS[(place - 1) % len(MARKERS)]
        axes.plot(
            list(series), list(series.values()), LINES[style], color=colors[name], marker=marker, markersize=4, zorder=3
        )
    _mark_crossings(axes, entries, drawn)
    _label_ends(axes, drawn, colors)
    return figure


def _axes(axes: "Axes", counts: Sequence[int], first: CrossoverEntry) -> None:
    """Logarithmic both ways, the two ranges of tokens marked."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    left, right = counts[0] / 1.3, counts[-1] * 1.3
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
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    axes.set_title(f"Which kernel for how many tokens: {setting_text(first)}", loc="left")
    boundary = math.sqrt(DECODE_BATCHES[-1] * PROMPT_TOKENS[0])
    if counts[0] < boundary:
        axes.axvspan(left, min(boundary, right), color="#F2F2F2", zorder=0)
    for title, low, high in (("decode: batch", left, boundary), ("prefill: prompt", boundary, right)):
        if any(low < tokens < high for tokens in counts):
            middle, heights = math.sqrt(max(low, left) * min(high, right)), axes.get_xaxis_transform()
            axes.text(middle, 0.985, title, transform=heights, ha="center", va="top", color="#555555")


def _mark_crossings(axes: "Axes", entries: Sequence[CrossoverEntry], relative: Mapping[str, Series]) -> None:
    """A ring at every crossing; a filled one, with its tokens, where it is with the dense product."""
    dense = next(iter(relative))
    below = False
    for crossing in sorted(crossings(entries), key=lambda one: one.tokens or 0.0):
        if crossing.tokens is None or not all(relative.get(name) for name in crossing.pair):
            continue
        point = crossing.tokens, height_at(relative[crossing.pair[1]], crossing.tokens)
        fill = "#000000" if dense in crossing.pair else "#FFFFFF"
        axes.plot(*point, "o", markersize=5, markerfacecolor=fill, markeredgecolor="#000000", zorder=4)
        if dense in crossing.pair:
            offset = (3, -12 if below else 5)
            axes.annotate(tokens_text(point[0]), point, xytext=offset, textcoords="offset points", zorder=5)
            below = not below  # neighbours' numbers keep out of each other's way


def height_at(series: Series, tokens: float) -> float:
    """The series at this number of tokens, straight in log-log between the measured ones."""
    import numpy as np

    return float(np.exp(np.interp(np.log(tokens), np.log(list(series)), np.log(list(series.values())))))


def _label_ends(axes: "Axes", relative: Mapping[str, Series], colors: Mapping[str, str]) -> None:
    """Each line's name at its right end, moved apart where ends lie close."""
    low, high = (math.log(value) for value in axes.get_ylim())
    names = sorted(relative, key=lambda name: list(relative[name].values())[-1])
    ends = {name: list(relative[name].items())[-1] for name in names}
    wanted = [(math.log(value) - low) / (high - low) for _, value in ends.values()]
    for name, height in zip(names, spread(wanted, 0.034), strict=True):
        axes.annotate(
            name,
            ends[name],
            xytext=(1.01, height),
            textcoords="axes fraction",
            va="center",
            color=colors[name],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colors[name], "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1},
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the order given (ascending), moved as little as possible from those wanted.

    The least squares of it: pools of neighbours that touch move to their mean (isotonic regression).
    """
    pools: list[list[float]] = []
    for place, value in enumerate(wanted):
        pools.append([value - place * gap])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = [statistics.fmean(pool) for pool in pools for _ in pool]
    return [value + place * gap for place, value in enumerate(flat)]
