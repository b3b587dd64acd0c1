"""How every plot looks, and a figure as bytes and as text for a page. Imports matplotlib inside its functions."""

import io
import logging
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.records.record import Subject
from quantize.errors import UserError, printable
from reports.results import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any

INK = "#000000"
MUTED, FAINT, SHADE = (INK, 0.65), (INK, 0.12), (INK, 0.05)
"""Words and lines are black in a file and the page's own text colour in a page, shades the same, paler."""

METHOD_COLORS = {"FP16": INK, "AWQ": "#0072B2", "BnB.4": "#D55E00", "BnB.8": "#009E73"}
COLORS = ("#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's palette, which colour-blind readers tell apart, but for its pale yellow; COLORS are for the rest."""

FORMATS: dict[str, dict[str, Any]] = {  # what would differ from run to run is left out of a file
    "png": {"dpi": 150, "metadata": {"Software": None}},
    "svg": {"metadata": dict.fromkeys(("Date", "Creator", "Format", "Type"))},
}
LONGEST = 44  # characters of a name; of a longer one the middle is left out
LOG_FROM = 30.0  # from this many times the smallest value on, the largest one's axis is logarithmic


@contextmanager
def matplotlib_as_it_comes() -> Iterator[None]:
    """Where figures are made and saved: silent, with matplotlib's defaults and ours. Raises UserError without it."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            try:
                import matplotlib
            except ImportError:
                raise UserError("plots need matplotlib: install quantable[plots]") from None
            with matplotlib.rc_context(fname=Path(__file__).with_name("figures.mplstyle")):
                yield
    finally:
        logger.setLevel(level)


def new_figure(title: str, height_in: float, *notes: str) -> Figure:
    """An empty figure with a title and, under all axes, its notes, a line each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(printable(title), 110), x=0.01, ha="left", fontsize=10)
    lines = [textwrap.fill(printable(note), 150) for note in notes if note]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=MUTED)
    return figure


def file_bytes(figure: Figure, extension: str, **options: Any) -> bytes:
    """The figure as a PNG or SVG file; the same figure gives the same bytes."""
    written = io.BytesIO()
    with matplotlib_as_it_comes():
        figure.savefig(written, format=extension, **FORMATS[extension], **options)
    return written.getvalue()


def svg_element(figure: Figure, name: str) -> str:
    """The figure as one <svg> element for a page, light or dark: no background, black is the page's `color`.

    name: of letters, digits and hyphens; every id begins with it, so that no two figures of a page share one. Text
    stays text. The element is as wide as there is room, and styles nothing outside."""
    text = file_bytes(figure, "svg", transparent=True).decode()
    head, _, inner = re.sub(r"<style .*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL).partition(">")
    inner = re.sub(r"<[^<>]+>", lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag[0]), inner)
    head = re.sub(r' (width|height)="[^"]*"', "", head) + f' role="img" aria-label="{name}" fill="currentColor"'
    return f'{head} stroke-linejoin="round">{inner}'.replace("stroke: #000000", "stroke: currentColor")


def name_text(name: str) -> str:
    """A name from a record, fit for a picture: one line, nothing unseen in it, not too long."""
    name = printable(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"


def method_colors(measurement: Measurement) -> dict[Subject, str]:
    """A colour for each row, its method's; the same in every plot of these rows."""
    others = dict.fromkeys(row.subject.method for row in measurement.results if row.subject.method not in METHOD_COLORS)
    colors = {method: COLORS[1 + place % 4] for place, method in enumerate(others)} | METHOD_COLORS
    return {row.subject: colors[row.subject.method] for row in measurement.results}


def scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """The axis "x" or "y" for values from 0 on: linear or, where they span much, logarithmic above the smallest."""
    from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

    low, high = (pick((one for one in values if one > 0), default=1.0) for pick in (min, max))
    bottom, axis, wide = min(0.0, *values), {"x": axes.xaxis, "y": axes.yaxis}[which], high > LOG_FROM * low
    if wide:
        getattr(axes, f"set_{which}scale")("symlog", linthresh=low, linscale=0.5)
    pad = 0.0 if which == "x" else 0.3 * low if wide else 0.06 * (high - bottom)
    axes.set(**{f"{which}lim": (bottom - pad, 2.5 * high if wide else high + 0.12 * (high - bottom))})
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=low) if wide else MaxNLocator(7))
    axis.set_major_formatter("{x:g}")
    axes.grid(axis=which, color=FAINT, linewidth=0.7)  # type: ignore[arg-type]
