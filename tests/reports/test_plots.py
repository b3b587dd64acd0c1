"""The plots: no label over another, the same bytes twice, nothing of a name interpreted, and what stands in them."""

import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bench.records.record import Divergence, Memory, Record
from bench.records.store import read_records, write
from quantize.errors import UserError
from reports.api import draw_plots
from reports.notes import joined
from reports.plots import plots, svg_element
from reports.plots.rows import pareto, shares_of
from reports.plots.style import matplotlib_as_it_comes
from reports.results import Measurement, measurements
from tests.builder import CHAT, Builder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "reports" / "gallery" / "cpu-smollm2-135m"


def gallery(folder: str = ".") -> list[Record]:
    return read_records(GALLERY / folder / "records.jsonl")


def variants(records: Iterable[Record], losses: Iterable[float], **fields: Any) -> list[Record]:
    """Some rows more, like the gallery's AWQ GEMM, one with each of these divergences."""
    model = [record for record in records if record.subject.variant == "awq-gemm"]
    found = []
    for number, loss in enumerate(losses):
        for record in model:
            subject = replace(record.subject, name=f"row {number}", q_group_size=1000 + number, **fields)
            quality = record.quality and replace(record.quality, divergence=Divergence(loss, loss, loss, 0.1))
            found.append(replace(record, subject=subject, quality=quality))
    return found


def drawn_texts(figure: "Figure") -> list[tuple[str, Any]]:
    """Every text that drawing the figure draws, with its box in pixels."""
    from matplotlib.text import Text

    drawn: list[Text] = []
    original = Text.draw

    def draw_and_note(text: Text, *arguments: Any, **named: Any) -> None:
        if text.get_visible() and text.get_text().strip() and text not in drawn:
            drawn.append(text)
        original(text, *arguments, **named)

    with matplotlib_as_it_comes(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw_and_note)
        figure.canvas.draw()
        return [(text.get_text(), Text.get_window_extent(text)) for text in drawn]


def check_texts(figure: "Figure") -> list[str]:
    """No text lies over another, none is cut off."""
    texts = drawn_texts(figure)
    over = [(a, b) for (a, box), (b, other) in combinations(texts, 2) if box.padded(-0.5).overlaps(other.padded(-0.5))]
    assert over == []
    whole = figure.bbox.padded(1)
    assert [text for text, box in texts if not (whole.contains(*box.min) and whole.contains(*box.max))] == []
    return [text for text, _ in texts]


def measured(records: Iterable[Record]) -> Measurement:
    [found] = measurements(list(records))
    return found


def close(count: int) -> list[Record]:
    return [*gallery(), *variants(gallery(), [0.067 + 0.0005 * number for number in range(count)])]


CASES: dict[str, Callable[[], list[Record]]] = {
    "five rows": gallery,
    "broken": lambda: gallery("broken-by-autoawq"),
    "twice": lambda: gallery("same-twice"),
    "ten rows": lambda: [*gallery(), *variants(gallery(), (0.03, 0.05, 0.1, 0.2, 0.3))],
    "twelve close points": lambda: close(12),
    "an outlier": lambda: [*gallery(), *variants(gallery(), [9.0])],
    "long names": lambda: [*gallery(), *variants(gallery(), (0.05, 0.06), method="a long name " * 9)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory_bytes", [None, 900_000_000])
def test_no_text_lies_over_another(case: str, memory_bytes: int | None) -> None:
    memory_bytes = 24_000_000_000 if memory_bytes and case in ("twice", "long names") else memory_bytes
    found = measured(CASES[case]())
    figures, left_out = plots(found, memory_bytes=memory_bytes, context=memory_bytes and 4096)
    assert (list(figures), left_out) == (["loss", "time", "memory"], [])
    for name, figure in figures.items():
        shown = "\n".join(check_texts(figure))
        assert ("tokens/s" in shown) == (name == "loss")


@pytest.mark.parametrize("count", [1, 12])
def test_every_close_point_has_a_label(count: int) -> None:
    figures, _ = plots(measured(close(count)))
    shown = "\n".join(check_texts(figures["loss"]))
    assert all(f"group {1000 + number}" in shown for number in range(count))
    assert "BnB.4" in shown


def test_gemm_and_gemv_at_one_point_share_a_label() -> None:
    figures, _ = plots(measured(gallery()))
    assert "AWQ GEMM, GEMV, group 64\n42.3 to 42.6 tokens/s" in check_texts(figures["loss"])
    assert joined(["AWQ GEMM, group 64", "AWQ GEMV, group 64"]) == "AWQ GEMM, GEMV, group 64"
    assert joined(["BnB.4", "AWQ GEMV, group 64"], ",\n") == "BnB.4,\nAWQ GEMV, group 64"


def test_one_colour_a_method_in_every_plot() -> None:
    from matplotlib.colors import to_hex

    figures, _ = plots(measured(gallery()))
    points = {
        name: {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines if line.get_marker() != "None"}
        for name, figure in figures.items()
    }
    for name in ("loss", "time"):
        assert {"#0072b2", "#d55e00", "#009e73"} <= points[name]


def test_the_pareto_line_passes_over_what_is_bettered_and_what_is_broken() -> None:
    assert pareto([(3, 0), (1, 5), (2, 6), (1, 7), (2, 2), (2, 2)]) == [(1, 5), (2, 2), (3, 0)]
    figures, _ = plots(measured(gallery("broken-by-autoawq")))
    [point] = [line for line in figures["loss"].axes[0].lines if line.get_markerfacecolor() == "none"]
    dashed = [line for line in figures["loss"].axes[0].lines if line.get_marker() == "None"]
    assert float(np.asarray(point.get_ydata())[0]) > 9
    assert [np.asarray(line.get_xdata()).size for line in dashed] == [1]


def test_names_are_text_and_nothing_else() -> None:
    odd = r'$\frac{1}{0}$ <b id="x">' + "\x1b[31m\u202e"
    found = measured([*gallery(), *variants(gallery(), [0.05], method=odd)])
    for name, figure in plots(found)[0].items():
        page = svg_element(figure, name)
        ET.fromstring(page)
        assert "\x1b" not in page
        assert "\u202e" not in page
        assert "$\\frac{1}{0}$" in re.sub("<!--.*?-->", "", page, flags=re.DOTALL), "a comment has any text"


def test_a_pages_figures_share_no_id_and_take_its_colour() -> None:
    figures, _ = plots(measured(gallery()), memory_bytes=10**9)
    ids: list[str] = []
    for name, figure in figures.items():
        page = svg_element(figure, name)
        own = re.findall(r' id="([^"]+)"', page)
        ids += own
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(own)
        assert not re.search("#000000|<style|#ffffff", page)
        assert 'fill="currentColor"' in page
        assert page.startswith("<svg ")
        assert "AWQ" in "".join(ET.fromstring(page).itertext())
    assert len(ids) == len(set(ids))


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    import matplotlib

    names = ("loss", "time", "memory")
    (tmp_path / "two").mkdir()
    for folder in (tmp_path, tmp_path / "two"):
        write(folder / "records.jsonl", gallery())
    first, left_out = draw_plots(tmp_path)
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "svg.hashsalt": None}):
        second, _ = draw_plots(tmp_path / "two")
    assert [path.name for path in first] == [f"{name}.{form}" for name in names for form in ("png", "svg")]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert (dict(matplotlib.rcParams), left_out) == (before, [])
    for path in first:
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            data = path.read_bytes()
            assert data[:8] == b"\x89PNG\r\n\x1a\n"
            assert struct.unpack(">I", data[16:20]) == (1500,)
            assert data.endswith(b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))


def test_several_measurements_have_files_of_their_own(tmp_path: Path) -> None:
    records = Builder().five_rows() + Builder(device="cuda", compute_dtype="float16").five_rows()
    write(tmp_path / "records.jsonl", records)
    written, left_out = draw_plots(tmp_path)
    assert {path.name for path in written} >= {"loss.png", "loss-cuda-float16.png", "time-cuda-float16.svg"}
    assert left_out == []


def test_without_divergences_loss_is_of_perplexity_and_random_weights_have_none() -> None:
    records = Builder().five_rows()
    found = measured(records)
    axes = plots(found)[0]["loss"].axes[0]
    assert axes.get_ylabel() == "perplexity above the reference's, %"
    random = [replace(one, subject=replace(one.subject, dummy="x")) for one in records if one.kind == "latency"]
    figures, left_out = plots(measured(random))
    assert (list(figures), left_out) == (["time", "memory"], ["no plot of loss: random weights have no quality"])


def test_unsure_ratios_are_pale_and_a_failure_is_named(builder: Builder) -> None:
    records = builder.rounds({"fp16": 1.0, "awq-gemm": 2.0}) + builder.rounds({"fp16": 1.0, "bnb-8bit": 1.03})
    records.append(builder.failure("bnb-4bit", "oom", "no room"))
    [axes] = plots(measured(records))[0]["time"].axes
    alphas = {
        float(np.asarray(line.get_ydata())[0]): line.get_alpha() or 1.0
        for line in axes.lines
        if line.get_marker() == "o"
    }
    assert sorted(alphas.values()) == [0.35, 1.0]
    assert [text.get_text() for text in axes.texts] == ["x2.00", "oom", "x1.03"]


def test_the_peak_is_told_apart_and_the_cache_reckoned_for_a_context(builder: Builder) -> None:
    memory = Memory(
        weights_bytes=500, source="RSS", baseline_bytes=600, load_peak_bytes=None, run_peak_bytes=1000,
        kv_cache_bytes=300, kv_cache_formula_bytes=319,
    )  # fmt: skip
    record = builder.latency("fp16", CHAT, memory=memory)
    [timing] = measured([record]).results[0].timings.values()
    assert shares_of(timing) == {"weights": 500, "KV cache": 300, "activations": 100, "rest": 100}
    assert shares_of(timing, 319 * 2)["KV cache"] == 319 * 2  # 256 + 63 positions ran
    axes = plots(measured([record]), context=638)[0]["memory"]
    assert "It is at most" in "".join(text for text, _ in drawn_texts(axes))
    unknown = replace(timing, memory=replace(memory, kv_cache_bytes=None))
    assert shares_of(unknown) == {"not told apart": 1000}
    assert shares_of(unknown, 638) == {}
    negative = replace(timing, memory=replace(memory, baseline_bytes=400))
    assert shares_of(negative) == {"not told apart": 1000}
    with pytest.raises(UserError, match="at least 1"):
        plots(measured([record]), context=0)


def test_the_axis_is_logarithmic_where_figures_span_much() -> None:
    assert plots(measured(CASES["an outlier"]()))[0]["loss"].axes[0].get_yscale() == "symlog"
    assert plots(measured(gallery()))[0]["loss"].axes[0].get_yscale() == "linear"


def test_a_folder_with_records_and_one_without(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `bench` first"):
        draw_plots(tmp_path)
    write(tmp_path / "records.jsonl", gallery())
    written, left_out = draw_plots(tmp_path, "1GB", 2048)
    assert ({path.stem for path in written}, left_out) == ({"loss", "time", "memory"}, [])


def test_what_matplotlib_has_to_say_stays_off_the_screen(tmp_path: Path) -> None:
    """Without a folder for its caches it warns, and builds its list of fonts anew."""
    write(tmp_path / "records.jsonl", gallery())
    command = [sys.executable, "-m", "reports", str(tmp_path), "--plots"]
    environment = {**os.environ, "MPLCONFIGDIR": os.devnull}
    names = [f"{name}.{form}" for name in ("loss", "time", "memory") for form in ("png", "svg")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [f"wrote {tmp_path / name}" for name in names]
    assert done.returncode == 0


def test_a_plot_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    write(tmp_path / "records.jsonl", gallery())
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        draw_plots(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"records.jsonl", "loss.png"}
