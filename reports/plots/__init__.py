"""Every plot that there are records for. Needs matplotlib, which is imported when a figure is made."""

from collections.abc import Callable

from quantize.errors import UserError
from reports.plots.rows import loss_figure, memory_figure, speed_figure
from reports.plots.style import FORMATS, Figure, file_bytes, matplotlib_as_it_comes, svg_element
from reports.results import Measurement

__all__ = ["FORMATS", "file_bytes", "plots", "svg_element"]


def plots(
    measurement: Measurement, *, memory_bytes: int | None = None, context: int | None = None
) -> tuple[dict[str, Figure], list[str]]:
    """The figures "loss", "time" and "memory" that there are records for, and why others are not drawn.

    memory_bytes: what there is, a vertical line over the peaks. context: tokens of each sequence that the KV cache is
    reckoned for (`shares_of`). Raises UserError without matplotlib, and for a context below 1."""
    if context is not None and context < 1:
        raise UserError(f"a context of {context} tokens holds nothing: give --context at least 1")
    makers: dict[str, Callable[[], Figure]] = {
        "loss": lambda: loss_figure(measurement, memory_bytes, context),
        "time": lambda: speed_figure(measurement),
        "memory": lambda: memory_figure(measurement, memory_bytes, context),
    }
    figures, left_out = {}, []
    with matplotlib_as_it_comes():
        for name, make in makers.items():
            try:
                figures[name] = make()
            except UserError as error:
                left_out.append(f"no plot of {name}: {error}")
    return figures, left_out
