"""A bench that dies at any file operation loses no finished record and measures nothing twice.

One real kill -9, in the middle of a write, is in test_run.py.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.records.record import Record
from bench.records.scenario import SCENARIOS
from bench.records.stopping import RoundsRule
from bench.records.store import read_records
from bench.run.plan import key_of
from bench.run.probe import Machine
from bench.run.run import Instruments, measure, targets_in
from bench.worker.options import BenchOptions
from quantize.checkpoint import Checkpoint
from tests.dying import every_death

ROUNDS = 2


def test_a_bench_that_dies_at_any_operation_goes_on(
    make_checkpoint: Callable[..., Checkpoint],
    records_of: Callable[..., list[Record]],
    machine: Machine,
    tmp_path: Path,
) -> None:
    for variant in ("fp16", "awq-gemm", "bnb-4bit"):
        folder = make_checkpoint(variant).path.parent
    targets = targets_in(folder)
    options = BenchOptions(rounds=RoundsRule(least=ROUNDS, most=ROUNDS))
    instruments = Instruments(
        lambda device, threads: machine, lambda settings, path: records_of, check_models=lambda *_: None
    )
    path = tmp_path / "work" / "records.jsonl"
    deaths = 0
    for number in every_death(lambda: measure(targets, path, options, instruments=instruments)):
        deaths += 1
        before = read_records(path) if path.is_file() else []
        measure(targets, path, options, instruments=instruments)
        records = read_records(path)
        assert records[: len(before)] == before, f"operation {number}"
        latencies = Counter(key_of(record) for record in records if record.kind == "latency")
        assert len(latencies) == len(targets) * ROUNDS * len(SCENARIOS)
        assert set(latencies.values()) == {1}, f"operation {number}"
        judged = Counter(record.subject.name for record in records if record.kind == "quality")
        # The reference is judged again after a death that left what it expects unfinished; the others once.
        assert {name: count for name, count in judged.items() if name != "Tiny-fp16"} == {
            "Tiny-awq-gemm": 1,
            "Tiny-bnb-4bit": 1,
        }
        shutil.rmtree(path.parent)
    assert deaths > len(targets) * ROUNDS * len(SCENARIOS)
