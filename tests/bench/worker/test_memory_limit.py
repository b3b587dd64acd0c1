"""A checkpoint that does not fit under the process's memory limit is an oom row; the others have their numbers."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.records.scenario import Scenario
from bench.records.stopping import RoundsRule
from bench.run.executor import Executor, WorkerExecutor
from bench.run.probe import Machine
from bench.run.run import Instruments, measure, targets_in
from bench.worker.options import BenchOptions
from bench.worker.request import Settings
from quantize.checkpoint import Checkpoint
from reports.pages import failure_table, published_table
from reports.results import measurements

LIMITED = """
import resource, sys
from types import SimpleNamespace

LIMIT = 2 * 10**9
resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
import torch
import quantize.loader
from bench.worker.worker import main

class Tiny(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, weights):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(weights // 4), requires_grad=False)
        text = SimpleNamespace(vocab_size=7)
        self.config = SimpleNamespace(get_text_config=lambda: text, quantization_config=None)

    def forward(self, input_ids, use_cache, past_key_values=None):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7), past_key_values=None)

def load(path, **arguments):
    model = Tiny(3 * 10**9 if path.endswith("bnb-8bit") else 10**6)
    return SimpleNamespace(model=model, tokenizer=None, kernel=lambda tokens: "none", placement=None)

quantize.loader.load = load
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA covers mapped memory on Linux")
def test_one_row_is_oom_and_the_others_have_numbers(
    make_checkpoint: Callable[..., Checkpoint], machine: Machine
) -> None:
    for variant in ("fp16", "awq-gemm", "bnb-8bit"):
        folder = make_checkpoint(variant).path.parent

    def executor_for(settings: Settings, path: Path) -> Executor:
        return WorkerExecutor(settings, command=(sys.executable, "-P", "-c", LIMITED))

    options = BenchOptions(
        scenarios=(Scenario("published", prompt_tokens=4, new_tokens=1),),
        rounds=RoundsRule(least=1, most=1),
        quality=False,
    )
    instruments = Instruments(lambda device, threads: machine, executor_for, check_models=lambda *_: None)
    outcome = measure(targets_in(folder), folder / "records.jsonl", options, instruments=instruments)
    assert outcome.usable
    assert [record.status for record in outcome.records] == ["ok"] * 2 + ["oom"]
    [found] = measurements(outcome.records)
    times = [row[6] for row in published_table(found).rows]
    assert all(isinstance(cell, float) for cell in times[:2])
    assert times[2] == "oom"
    [failed] = failure_table(found).texts()
    assert failed[:4] == ["BnB.8", "published", "1", "oom"]
    assert "allocate" in failed[4]
