"""Labels that lie over nothing: a place for each name near its point."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from reports.plots.style import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Point = tuple[float, float]

ANGLES = tuple(map(math.radians, (0, 30, -30, 60, -60, 90, -90, 150, -150, 120, -120, 180, 15, -15)))
"""From a point to its label, best first: a label is looked for at the right."""

DISTANCES_PX = range(7, 900, 6)
LEADER_PX = 14
"""From this far on a line leads from a label to its point."""

SAME_PX = 3.0
"""Points this close are one to the eye."""


def freeze(axes: "Axes") -> None:
    """Lay the figure out and keep it so, that places on it can be reckoned in pixels."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def groups(axes: "Axes", points: Sequence[Point]) -> list[list[int]]:
    """The numbers of the points, together those that one sees as one. The figure is frozen."""
    pixels = axes.transData.transform(points)
    found: list[list[int]] = []
    for number, pixel in enumerate(pixels):
        home = next((one for one in found if math.dist(pixels[one[0]], pixel) <= SAME_PX), None)
        if home is None:
            found.append(home := [])
        home.append(number)
    return found


def place(axes: "Axes", labels: Iterable[tuple[Point, str]]) -> None:
    """Write each text as near to its point as there is room: inside the axes, over no other text and over no line.

    Where lines are in the way everywhere, they are written over; where there is no room at all, a text is left out.
    The figure is frozen, and its points and lines are drawn.
    """
    import numpy as np
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    renderer = figure.canvas.get_renderer()
    room = axes.get_window_extent(renderer).padded(-2)
    taken = [text.get_window_extent(renderer).padded(2) for text in axes.texts]
    drawn = np.concatenate([np.empty((0, 2)), *map(_pixels, axes.lines)])
    style: dict[str, Any] = {"ha": "center", "va": "center", "multialignment": "left", "zorder": 5}
    for point, words in labels:
        trial = axes.text(*point, words, **style)
        half, start = trial.get_window_extent(renderer).size / 2, axes.transData.transform(point)
        trial.remove()
        for over_lines, distance, angle in itertools.product((False, True), DISTANCES_PX, ANGLES):
            move = np.array([math.cos(angle), math.sin(angle)]) * (half + distance)
            box, leader = (
                Bbox([start + move - half, start + move + half]),
                start + np.linspace(0, 1, 40)[:, None] * move,
            )
            if not np.all((room.min <= box.min) & (box.max <= room.max)):
                continue
            if any(box.overlaps(one) or one.count_contains(leader) for one in taken):
                continue
            if over_lines or not box.padded(4).count_contains(drawn):
                taken.append(box.padded(2))
                arrow = None
                if distance > LEADER_PX:
                    drawn = np.concatenate([drawn, leader])
                    arrow = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
                shift = tuple(move * 72 / figure.dpi)
                axes.annotate(words, point, shift, textcoords="offset points", arrowprops=arrow, **style)
                break


def _pixels(line: "Line2D") -> Any:
    """Where a line is: its points, and where it joins them every three pixels between them."""
    import numpy as np

    pixels = line.get_transform().transform(line.get_xydata())  # type: ignore[arg-type]
    if line.get_linestyle() == "None":
        return pixels
    parts = [np.linspace(a, b, 2 + int(math.dist(a, b) / 3)) for a, b in itertools.pairwise(pixels)]
    return np.concatenate([pixels, *parts])
