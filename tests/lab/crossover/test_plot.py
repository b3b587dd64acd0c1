"""The crossover's plot."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from quantize.errors import UserError
from reports.plots.style import file_bytes, matplotlib_as_it_comes
from tests.lab.crossover.plot import crossover_figure, height_at, relative_to_dense
from tests.lab.records import CrossoverEntry, read_lab

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib")

from tests.reports.test_plots import GALLERY, check_texts


def figure_of(entries: Sequence[CrossoverEntry]) -> "Figure":
    with matplotlib_as_it_comes():
        return crossover_figure(entries)


def test_the_crossover_names_every_line_the_ranges_and_the_crossings(crossover: list[CrossoverEntry]) -> None:
    figure = figure_of(crossover)
    texts = check_texts(figure)
    assert {"FP16", "gemm", "gemv", "decode: batch", "prefill: prompt", "x1", "x0.5", "2,048", "91", "4.0"} <= set(
        texts
    )
    assert not {"broken", "compiled"} & set(texts)
    assert any("mistral-7b's shape, float16 on GPU 9" in text for text in texts)
    check_texts(figure_of(read_lab(GALLERY / "crossover" / "crossover.jsonl", CrossoverEntry)))


@pytest.mark.parametrize("counts", [{1}, {64, 128}, {1, 2048}])
def test_few_figures_of_a_crossover_are_drawn_too(crossover: list[CrossoverEntry], counts: set[int]) -> None:
    """One number of tokens, prompts alone, and a contender without a figure where the dense product has one."""
    some = [one for one in crossover if one.tokens in counts and not (one.contender == "gemv" and one.tokens == 1)]
    texts = check_texts(figure_of(some))
    assert ("decode: batch" in texts) == (1 in counts)
    assert ("prefill: prompt" in texts) == (max(counts) > 32)
    assert ("gemv" in texts) == (counts != {1})


def test_other_figures_give_another_picture(crossover: list[CrossoverEntry]) -> None:
    slower = [
        replace(one, seconds=tuple(2 * s for s in one.seconds)) if one.contender == "gemm" else one for one in crossover
    ]
    pictures = [file_bytes(figure_of(entries), "svg") for entries in (crossover, slower)]
    assert pictures[0] != pictures[1]


def test_times_are_relative_to_the_dense_product(crossover: list[CrossoverEntry]) -> None:
    relative = relative_to_dense(crossover)
    assert list(relative) == ["FP16", "gemm", "gemv"]
    assert set(relative["FP16"].values()) == {1.0}
    assert relative["gemm"] == pytest.approx(
        {**dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 0.5), **dict.fromkeys((128, 256, 512, 1024, 2048), 2.0)}
    )
    assert relative["gemv"][2048] == pytest.approx(64.0)


def test_a_height_between_two_figures_is_straight_in_log_log() -> None:
    series = {1: 4.0, 4: 1.0, 16: 1.0}
    assert height_at(series, 2) == pytest.approx(2.0)
    assert [height_at(series, tokens) for tokens in series] == pytest.approx(list(series.values()))
    assert height_at({8: 3.0}, 8) == pytest.approx(3.0)


def test_without_the_dense_product_there_is_no_figure(crossover: list[CrossoverEntry]) -> None:
    with pytest.raises(UserError, match="no figures of the dense product"):
        figure_of([one for one in crossover if one.contender != "FP16"])


def test_one_colour_a_method_as_in_the_reports_plots() -> None:
    from matplotlib.colors import to_hex

    figure = figure_of(read_lab(GALLERY / "crossover" / "crossover.jsonl", CrossoverEntry))
    colours = {to_hex(line.get_color()) for line in figure.axes[0].lines if line.get_marker() != "None"}
    assert {"#d55e00", "#009e73"} <= colours


def test_the_same_entries_give_the_same_bytes(crossover: list[CrossoverEntry]) -> None:
    for form in ("png", "svg"):
        assert file_bytes(figure_of(crossover), form) == file_bytes(figure_of(crossover), form)
