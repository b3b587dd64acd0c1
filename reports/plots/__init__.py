"""Every plot that there are records for. Needs matplotlib, which is imported when a figure is made."""

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.records.crossover import CrossoverEntry
from quantize.errors import UserError
from quantize.files import write_whole
from reports.plots.crossover import crossover_figure
from reports.plots.rows import loss_figure, memory_figure, speed_figure
from reports.plots.style import FORMATS, Figure, file_bytes, matplotlib_as_it_comes, svg_element
from reports.results import Measurement

__all__ = ["draw", "plots", "svg_element"]


def plots(
    measurement: Measurement | None,
    crossover: Sequence[CrossoverEntry] = (),
    *,
    memory_bytes: int | None = None,
    context: int | None = None,
) -> tuple[dict[str, Figure], list[str]]:
    """The figures "loss", "time", "memory" and "crossover" that there are records for, and why others are not drawn.

    memory_bytes: what there is, a vertical line over the peaks. context: tokens of each sequence that the KV cache is
    reckoned for (`shares_of`). Raises UserError without matplotlib, and for a context below 1.
    """
    if context is not None and context < 1:
        raise UserError(f"a context of {context} tokens holds nothing: give --context at least 1")
    makers: dict[str, Callable[[], Figure]] = {}
    if measurement:
        makers["loss"] = lambda: loss_figure(measurement, memory_bytes, context)
        makers["time"] = lambda: speed_figure(measurement)
        makers["memory"] = lambda: memory_figure(measurement, memory_bytes, context)
    if crossover:
        makers["crossover"] = lambda: crossover_figure(crossover, measurement.compute_dtypes if measurement else ())
    figures, left_out = {}, []
    with matplotlib_as_it_comes():
        for name, make in makers.items():
            try:
                figures[name] = make()
            except UserError as error:
                left_out.append(f"no plot of {name}: {error}")
    return figures, left_out


def draw(
    folder: Path, found: Sequence[Measurement] = (), crossover: Sequence[CrossoverEntry] = (), **options: int | None
) -> tuple[list[Path], list[str]]:
    """Write `plots` as NAME.png and NAME.svg into the folder: the files, and why others are not drawn.

    The same records give the same bytes. Of several measurements all but the first have their device and dtype in
    NAME. options: as of `plots`. Raises UserError without matplotlib, and where a file cannot be written.
    """
    content, left_out = dict[str, bytes](), list[str]()
    for number, measurement in enumerate(found or (None,)):
        apart = "-".join(["", measurement.device, *measurement.compute_dtypes]) if number and measurement else ""
        figures, reasons = plots(measurement, () if number else crossover, **options)
        content |= {f"{name}{apart}.{form}": file_bytes(one, form) for name, one in figures.items() for form in FORMATS}
        left_out += reasons
    for name, data in content.items():
        write_whole(folder / name, data)
    return [folder / name for name in content], left_out
