"""A new variant is one row and one file: it is made, loaded, measured and reported like the others."""

from pathlib import Path

import pytest
import torch

import quantize
from bench.records.record import Record
from bench.records.stopping import PassRule, RoundsRule
from bench.run.executor import Executor
from bench.run.run import Instruments, measure, targets_in
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, Request, Settings
from bench.worker.worker import work
from quantize.building.job import BuildOptions
from quantize.loader import load_dummy
from quantize.methods import METHODS
from quantize.variant import VARIANTS
from reports.cli import main as report


def in_this_process(settings: Settings, path: Path) -> Executor:
    def carry_out(run: PlannedRun) -> list[Record]:
        records: list[Record] = []
        work(Request(settings, run), records.append)
        return records

    return carry_out


def test_one_row_and_one_file_are_a_variant(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.quantize.methods.toy import ROW, TOY

    monkeypatch.setitem(VARIANTS, ROW.name, ROW)
    monkeypatch.setitem(METHODS, TOY.name, TOY)

    made = quantize.quantize(
        str(tiny_llama), ["fp16", "toy-8bit"], tmp_path, options=BuildOptions(blocks=2, block_tokens=32, device="cpu")
    )
    assert [one.checkpoint.path.name for one in made] == ["tiny-llama-FP16", "tiny-llama-Toy"]

    reference, toy = (quantize.load(one.checkpoint.path) for one in made)
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        error = (toy.model(tokens).logits - reference.model(tokens).logits).abs().max()
    assert 0 < error < 0.1
    assert toy.weights_bytes < reference.weights_bytes
    assert load_dummy(str(tiny_llama / "config.json"), "toy-8bit").kernel(1) == "toy"

    options = BenchOptions(device="cpu", rounds=RoundsRule(1, 1), rule=PassRule(max_passes=3), threads=1, quality=False)
    instruments = Instruments(executor_for=in_this_process)
    outcome = measure(targets_in(tmp_path), tmp_path / "records.jsonl", options, instruments=instruments)
    assert {record.status for record in outcome.records} == {"ok"}

    assert report([str(tmp_path), "--table", "published"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "Toy" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["tiny-llama", "Toy", "", "8", ""]
    assert all(cells[5:7])  # its memory and its time
