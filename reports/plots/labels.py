"""Labels that lie over nothing: a place for each near its point."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

from reports.plots.style import MUTED, Axes

Point = tuple[float, float]

ANGLES = tuple(map(math.radians, (0, 30, -30, 60, -60, 90, -90, 150, -150, 120, -120, 180, 15, -15)))
"""From a point to its label, best first: a label is looked for at the right."""

DISTANCES_PX = (*range(7, 70, 6), *range(75, 900, 20))
LEADER_PX = 20  # from this far on a line leads from a label to its point


def place(axes: Axes, labels: Iterable[tuple[Point, str]]) -> None:
    """Write each text as near to its point as there is room: inside the axes, over no text, point and line.

    Points and lines are drawn already, and the figure is laid out for good. Where lines are in the way everywhere, they
    are written over, then other texts' leaders led over; where there is no room at all, a text is left out."""
    import numpy as np
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    room = axes.get_window_extent().padded(-2)
    taken = [text.get_window_extent().padded(2) for text in axes.texts]
    marks, drawn = _pixels(axes, joined=False), _pixels(axes, joined=True)
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "multialignment": "left"}
    for point, words in labels:
        trial = axes.annotate(words, point, (0, 0), **style)
        half, start = np.array(trial.get_window_extent().size) / 2, axes.transData.transform(point)
        trial.remove()
        for leniency, distance, angle in itertools.product(range(3), DISTANCES_PX, ANGLES):
            move = np.array([math.cos(angle), math.sin(angle)]) * (half + distance)
            box = Bbox([start + move - half, start + move + half])
            nearest = np.clip(start, box.min, box.max)
            leader = np.linspace(start, nearest, 40)
            if any(box.overlaps(one) or (leniency < 2 and one.count_contains(leader)) for one in taken):
                continue
            if np.any((box.min < room.min) | (room.max < box.max)) or box.padded(6).count_contains(marks):
                continue
            if leniency or not box.padded(4).count_contains(drawn):
                taken.append(box.padded(2))
                arrow = None
                if distance > LEADER_PX:
                    drawn = np.concatenate([drawn, leader])
                    arrow = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
                    arrow["relpos"] = tuple((nearest - box.min) / box.size)
                axes.annotate(words, point, tuple(move * 72 / figure.dpi), arrowprops=arrow, zorder=5, **style)
                break


def _pixels(axes: Axes, *, joined: bool) -> Any:
    """Where the single points are or, joined, where the lines are, every three pixels."""
    import numpy as np

    parts: list[Any] = [np.empty((0, 2))]
    for line in axes.lines:
        if (line.get_linestyle() != "None") == joined:
            pixels = line.get_transform().transform(line.get_xydata())
            parts += [pixels, *(np.linspace(a, b, 2 + int(math.dist(a, b) / 3)) for a, b in itertools.pairwise(pixels))]
    return np.concatenate(parts)
