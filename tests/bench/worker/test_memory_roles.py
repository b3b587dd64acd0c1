"""Known sizes come back by role: a worker of its own loads a model that holds and uses so many bytes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records.environment import Environment
from bench.records.scenario import Scenario
from bench.records.stopping import PassRule
from bench.run.plan import target_of
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, Request, Settings
from quantize.checkpoint import Checkpoint

ROOT = Path(__file__).parents[3]
MB = 10**6
WEIGHTS, CACHE, ACTIVATIONS, BALLAST = 150 * MB, 120 * MB, 240 * MB, 300 * MB

WORKER = """
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
import json, torch
from bench.worker.options import BenchOptions
from bench.worker.request import Request
import quantize.loader
from bench.worker.worker import work

weights, cache, activations, ballast = map(int, sys.argv[2:6])

class Known(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(weights // 4), requires_grad=False)
        text = SimpleNamespace(vocab_size=7)
        self.config = SimpleNamespace(get_text_config=lambda: text, quantization_config=None)

    def forward(self, input_ids, use_cache, past_key_values=None):
        work_space = torch.ones(activations // 4)
        layer = SimpleNamespace(keys=torch.ones(cache // 8), values=torch.ones(cache // 8))
        del work_space
        logits = torch.zeros(*input_ids.shape, 7)
        return SimpleNamespace(logits=logits, past_key_values=past_key_values or SimpleNamespace(layers=[layer]))

held = []
def load(path, **arguments):
    held.append(torch.ones(ballast // 4))
    return SimpleNamespace(model=Known(), tokenizer=None, kernel=lambda tokens: "none", placement=None)

records = []
quantize.loader.load = load
work(Request.read(Path(sys.argv[1])), records.append)
memory = records[0].memory
roles = {name: getattr(memory, name) for name in ("activations_bytes", "rest_bytes")}
print(json.dumps({"status": records[0].reason, **asdict(memory), **roles}))
"""


@pytest.fixture
def measured(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> Callable[[int], dict[str, Any]]:
    checkpoint = make_checkpoint("fp16")
    target = target_of(checkpoint)
    options = BenchOptions(timeout_s=60.0, rule=PassRule(max_time_s=0.0))
    settings = Settings("cpu", {target.subject.baseline: "float32"}, Environment(), options)
    request = Request(settings, PlannedRun(target, 0, (Scenario("prefill", prompt_tokens=4, new_tokens=1),)))
    request.write(tmp_path / "request.json")

    def measure(ballast: int) -> dict[str, Any]:
        sizes = map(str, (WEIGHTS, CACHE, ACTIVATIONS, ballast))
        command = [sys.executable, "-c", WORKER, str(tmp_path / "request.json"), *sizes]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return dict(json.loads(ran.stdout))

    return measure


@pytest.mark.skipif(sys.platform != "linux", reason="resident set sizes come from Linux's /proc")
def test_each_role_comes_back_within_5_percent_and_weights_exactly(measured: Callable[[int], dict[str, Any]]) -> None:
    with_ballast, without = measured(BALLAST), measured(0)
    for memory in (with_ballast, without):
        assert memory["status"] is None
        assert memory["weights_bytes"] == WEIGHTS
        assert memory["kv_cache_bytes"] == CACHE
        assert memory["activations_bytes"] == pytest.approx(ACTIVATIONS, rel=0.05)
        assert memory["run_peak_bytes"] == pytest.approx(
            memory["rest_bytes"] + WEIGHTS + CACHE + memory["activations_bytes"]
        )
    assert with_ballast["rest_bytes"] - without["rest_bytes"] == pytest.approx(BALLAST, rel=0.05)
    assert with_ballast["load_peak_bytes"] - without["load_peak_bytes"] == pytest.approx(BALLAST, rel=0.05)
