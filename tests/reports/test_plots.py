"""The crossover's figure: valid files, the same twice, and what stands in them."""

import html
import itertools
import os
import random
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from bench.records.crossover import CROSSOVER_NAME, CrossoverEntry
from bench.records.store import write
from quantize.errors import UserError
from reports.plots import crossover_plots, height_at, relative_to_dense, spread

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """Every chunk of a PNG file, its checksum checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    place = 8
    while place < len(data):
        [length] = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind] = chunks.get(kind, b"") + body
        place += 12 + length
    assert kind == b"IEND"
    return chunks


def test_the_png_is_whole_and_not_blank(crossover: list[CrossoverEntry], tmp_path: Path) -> None:
    crossover_plots(crossover, tmp_path)
    chunks = png_chunks((tmp_path / "crossover.png").read_bytes())
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert (width, height) == (1500, 900)
    assert len(set(zlib.decompress(chunks[b"IDAT"]))) > 50


def svg_texts(path: Path) -> list[str]:
    """What matplotlib wrote as text: it draws letters as outlines and says in a comment what they spell."""
    text = path.read_text(encoding="utf-8")
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    return [html.unescape(found) for found in re.findall(r"<!-- (.*?) -->", text)]


def test_the_svg_names_every_line_the_ranges_and_the_crossings(crossover: list[CrossoverEntry], tmp_path: Path) -> None:
    crossover_plots(crossover, tmp_path)
    texts = svg_texts(tmp_path / "crossover.svg")
    assert {"FP16", "gemm", "gemv", "decode: batch", "prefill: prompt", "x1", "x0.5", "2,048"} <= set(texts)
    assert {"91", "4.0"} <= set(texts)
    assert not {"broken", "compiled"} & set(texts)
    assert any("mistral-7b's shape, float16 on GPU 9" in text for text in texts)


def test_the_same_record_gives_the_same_bytes(
    crossover: list[CrossoverEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = crossover_plots(crossover, tmp_path / "one")
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "svg.hashsalt": None}):
        second = crossover_plots(crossover, tmp_path / "two")
    assert [path.name for path in first] == ["crossover.png", "crossover.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert dict(matplotlib.rcParams) == before
    assert b"<dc:date>" not in first[1].read_bytes()


def test_what_matplotlib_has_to_say_stays_off_the_screen(crossover: list[CrossoverEntry], tmp_path: Path) -> None:
    """Without a folder for its caches it warns, and builds its list of fonts anew."""
    write(tmp_path / CROSSOVER_NAME, crossover)
    command = [sys.executable, "-m", "reports", str(tmp_path), "--plots"]
    environment = {**os.environ, "MPLCONFIGDIR": os.devnull}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [f"wrote {tmp_path / name}" for name in ("crossover.png", "crossover.svg")]
    assert done.returncode == 0


def test_other_figures_give_another_picture(crossover: list[CrossoverEntry], tmp_path: Path) -> None:
    slower = [
        replace(one, seconds=tuple(2 * value for value in one.seconds)) if one.contender == "gemm" else one
        for one in crossover
    ]
    before = [path.read_bytes() for path in crossover_plots(crossover, tmp_path)]
    assert not set(before) & {path.read_bytes() for path in crossover_plots(slower, tmp_path)}


def test_few_figures_are_drawn_too(crossover: list[CrossoverEntry], tmp_path: Path) -> None:
    """One number of tokens, prompts alone, and a contender without a figure where the dense product has one."""
    for counts in ({1}, {64, 128}, {1, 2048}):
        some = [one for one in crossover if one.tokens in counts and not (one.contender == "gemv" and one.tokens == 1)]
        crossover_plots(some, tmp_path)
        texts = svg_texts(tmp_path / "crossover.svg")
        assert ("decode: batch" in texts) == (1 in counts)
        assert ("prefill: prompt" in texts) == (max(counts) > 32)
        assert ("gemv" in texts) == (counts != {1})


def test_what_cannot_be_drawn_is_a_user_error(crossover: list[CrossoverEntry], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no figures of the dense product"):
        crossover_plots([one for one in crossover if one.contender != "FP16"], tmp_path)
    with pytest.raises(UserError, match="choose another place"):
        crossover_plots(crossover, tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


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


def test_labels_keep_apart_and_move_no_further_than_needed() -> None:
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([], 0.1) == []
    generator = random.Random(7)
    for _ in range(50):
        wanted = sorted(generator.random() for _ in range(9))
        found = spread(wanted, 0.04)
        assert all(high - low >= 0.04 - 1e-12 for low, high in itertools.pairwise(found))
        moved = sum((one - other) ** 2 for one, other in zip(wanted, found, strict=True))
        pushed = list(wanted)  # another arrangement that keeps apart: only ever upwards
        for place in range(1, len(pushed)):
            pushed[place] = max(pushed[place], pushed[place - 1] + 0.04)
        assert moved <= sum((one - other) ** 2 for one, other in zip(wanted, pushed, strict=True)) + 1e-12
