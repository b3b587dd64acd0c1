import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.records.environment import Environment
from bench.records.gpu_state import GpuExtremes, GpuState
from bench.records.record import Kernels, Record, TaskScore
from bench.records.scenario import Scenario
from bench.records.stopping import PassRule
from bench.records.store import read_records
from bench.run.plan import target_of
from bench.worker import worker
from bench.worker.gpu import Nvml
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, QualityRequest, Request, Settings
from bench.worker.worker import REASON_CHARACTERS, failure, main, work
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError

Make = Callable[..., Checkpoint]
SHORT = Scenario("short", prompt_tokens=8, new_tokens=4)
PREFILL = Scenario("prefill", prompt_tokens=16, new_tokens=1)


def request_for(checkpoint: Checkpoint, *scenarios: Scenario, **changed: Any) -> Request:
    """Latency in these scenarios, or quality without any. changed: fields of the settings, or of the run."""
    target = target_of(checkpoint)
    settings = Settings(
        "cpu",
        {target.subject.baseline: "float32"},
        Environment(cpu="Model 1"),
        BenchOptions(timeout_s=60.0, rule=PassRule(max_time_s=0.0)),
        quality=QualityRequest(blocks=2, block_tokens=64),
    )
    run = PlannedRun(target, 0, scenarios, quality=not scenarios)
    shared = {name: changed.pop(name) for name in list(changed) if hasattr(settings, name)}
    if "quality" in shared:
        changed["quality"] = True
    return Request(replace(settings, **shared), replace(run, **changed))


@pytest.fixture
def load_tiny(tiny_llama: Path) -> Callable[..., Any]:
    """A loader that gives the tiny model, whatever the checkpoint, and remembers what it was asked."""

    def load(path: str, *, device: str, compute_dtype: torch.dtype, kernel: str | None = None) -> Any:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=compute_dtype).eval()
        return SimpleNamespace(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(tiny_llama),
            kernel=lambda tokens: f"the way of {tokens}",
            placement=None,
        )

    return load


def records_from(request: Request, load: Callable[..., Any]) -> list[Record]:
    records: list[Record] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.loader.load", load)
        work(request, records.append)
    return records


def test_a_spread_model_says_how_and_how_large_it_is(make_checkpoint: Make, load_tiny: Callable[..., Any]) -> None:
    def load(path: str, **how: Any) -> Any:
        return SimpleNamespace(**{**vars(load_tiny(path, **how)), "placement": "half of it", "weights_bytes": 98765})

    (record,) = records_from(request_for(make_checkpoint("fp16"), SHORT), load)
    assert record.placement == "half of it"
    assert record.memory is not None
    assert (record.memory.weights_bytes, record.memory.decode_bytes) == (98765, None)
    (whole,) = records_from(request_for(make_checkpoint("fp16", name="whole"), SHORT), load_tiny)
    assert whole.placement is None
    assert whole.memory is not None
    assert whole.memory.decode_bytes


def test_every_scenario_becomes_a_record_with_all_its_samples(
    make_checkpoint: Make, load_tiny: Callable[..., Any]
) -> None:
    request = request_for(make_checkpoint("awq-gemm"), PREFILL, SHORT, round=2, position=9)
    prefill, short = records_from(request, load_tiny)
    assert (prefill.status, short.status) == ("ok", "ok")
    assert (prefill.scenario, short.scenario) == (PREFILL, SHORT)
    assert prefill.latency is not None
    assert short.latency is not None
    assert [len(prefill.latency.prefill_s), len(short.latency.prefill_s)] == [1, 1]
    assert [len(steps) for steps in prefill.latency.decode_s] == [0]
    assert [len(steps) for steps in short.latency.decode_s] == [3]
    assert 2 <= len(short.latency.warmup_s) <= PassRule().max_warmups
    assert short.latency.stopped == "time"
    assert short.kernels == Kernels("the way of 8", "the way of 1")
    assert (short.round, short.position, short.compute_dtype) == (2, 9, "float32")


def test_memory_is_told_by_role(make_checkpoint: Make, load_tiny: Callable[..., Any]) -> None:
    [record] = records_from(request_for(make_checkpoint("fp16"), SHORT), load_tiny)
    memory = record.memory
    assert memory is not None
    model = load_tiny("", device="cpu", compute_dtype=torch.float32).model
    buffers = {buffer.data_ptr(): buffer.nbytes for buffer in model.buffers()}
    assert memory.weights_bytes == sum(p.nbytes for p in model.parameters()) + sum(buffers.values())
    assert memory.decode_bytes == memory.weights_bytes  # the head is the embedding
    assert memory.source == "RSS"
    assert memory.baseline_bytes is not None
    assert memory.load_peak_bytes is not None
    assert memory.run_peak_bytes is not None
    assert memory.run_peak_bytes >= memory.baseline_bytes > memory.weights_bytes
    assert (memory.nvml_process_bytes, memory.nvml_device_bytes, record.device_state) == (None, None, None)


class FakeNvml(Nvml):
    """A card whose energy counter tells the how many-th look it is."""

    def __init__(self) -> None:
        self.looks = 0

    def state(self) -> GpuState:
        self.looks += 1
        return GpuState(energy_j=float(self.looks), process_bytes=10 * self.looks, sm_clock_mhz=1000 + self.looks)


def test_the_gpu_is_looked_at_before_between_and_after(
    make_checkpoint: Make, load_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = worker._load
    monkeypatch.setattr(worker, "_load", lambda request: replace(load(request), nvml=FakeNvml()))
    rule = PassRule(min_passes=3, max_passes=3, min_time_s=0.0, max_time_s=1e6, noise=0.0)
    [record] = records_from(request_for(make_checkpoint("fp16"), SHORT, options=BenchOptions(rule=rule)), load_tiny)
    assert record.memory is not None
    assert record.memory.nvml_process_bytes == 50
    assert record.device_state is not None
    assert record.device_state.energy_j == 4.0
    assert record.device_state.between == GpuExtremes(3, lowest_sm_clock_mhz=1002, highest_sm_clock_mhz=1004)


def test_tasks_are_a_record_of_their_own(
    make_checkpoint: Make, load_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(model: Any, tokenizer: Any, names: tuple[str, ...], **how: Any) -> tuple[TaskScore, ...]:
        assert how == {"folder": Path("own"), "limit": 7}
        return tuple(TaskScore(name, "acc", 0.5) for name in names)

    monkeypatch.setattr("bench.worker.tasks.evaluate", evaluate)
    asked = request_for(make_checkpoint("fp16"), SHORT, tasks=("anatomy",))
    asked = replace(asked, settings=replace(asked.settings, options=BenchOptions(task_folder="own", task_limit=7)))
    latency, tasks = records_from(asked, load_tiny)
    assert (latency.kind, tasks.kind, tasks.status) == ("latency", "tasks", "ok")
    assert tasks.tasks == (TaskScore("anatomy", "acc", 0.5),)


def test_what_a_model_says_of_its_quantization_is_plain_values() -> None:
    said = {"bits": 4, "skip": ["lm_head"], "type": "nf4"}
    for config in (said, SimpleNamespace(to_dict=lambda: said)):
        model = SimpleNamespace(config=SimpleNamespace(quantization_config=config))
        assert worker.quantization_of(model) == {"bits": 4, "type": "nf4"}
    assert worker.quantization_of(SimpleNamespace(config=SimpleNamespace())) is None


def test_quality_is_a_record_of_its_own(make_checkpoint: Make, load_tiny: Callable[..., Any]) -> None:
    [record] = records_from(request_for(make_checkpoint("fp16")), load_tiny)
    assert (record.kind, record.status, record.scenario) == ("quality", "ok", None)
    assert record.quality is not None
    assert record.quality.tokens == 2 * 63
    assert 100 < record.quality.perplexity < 2000  # a random model over 512 tokens


def test_others_are_compared_with_what_the_reference_expects(
    make_checkpoint: Make, load_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "quality": QualityRequest(blocks=3, block_tokens=64),
        "reference_logprobs": {"Tiny": str(tmp_path / "e" / "reference.npy")},
    }
    variant = request_for(make_checkpoint("bnb-4bit"), **asked)
    [alone] = records_from(variant, load_tiny)
    assert alone.quality is not None
    assert alone.quality.divergence is None
    [reference] = records_from(request_for(make_checkpoint("fp16"), **asked, is_reference=True), load_tiny)
    assert reference.quality is not None
    assert reference.quality.noise_floor is not None
    assert reference.quality.noise_floor.mean < 1e-5
    assert reference.quality.perplexity == pytest.approx(alone.quality.perplexity)

    def load_changed(path: str, **arguments: Any) -> Any:
        loaded = load_tiny(path, **arguments)
        torch.manual_seed(0)
        head = loaded.model.lm_head.weight.data
        head.add_(torch.randn_like(head), alpha=0.05)
        return loaded

    [same], [changed] = records_from(variant, load_tiny), records_from(variant, load_changed)
    assert same.quality is not None
    assert changed.quality is not None
    assert same.quality.divergence is not None
    assert changed.quality.divergence is not None
    assert same.quality.divergence.mean < 1e-5 < 0.01 < changed.quality.divergence.mean
    assert same.quality.divergence.flips == 0 < changed.quality.divergence.flips
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["reference.npy"]


def test_a_broken_model_is_called_that_in_words(make_checkpoint: Make, load_tiny: Callable[..., Any]) -> None:
    def load_broken(path: str, **arguments: Any) -> Any:
        loaded = load_tiny(path, **arguments)
        loaded.model.lm_head.weight.data.fill_(float("nan"))
        return loaded

    [record] = records_from(request_for(make_checkpoint("fp16")), load_broken)
    assert record.status == "broken"
    assert str(record.reason).startswith("its output is not finite")
    assert record.quality is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no kernel for this"), "unsupported"),
        (MemoryError(), "oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (ValueError("bad shape"), "error"),
        (OSError(errno.ENOENT, "No such file"), "error"),
    ],
)
def test_a_load_that_fails_is_a_record_for_every_scenario(make_checkpoint: Make, error: Exception, status: str) -> None:
    def load(path: str, **arguments: Any) -> Any:
        raise error

    records = records_from(request_for(make_checkpoint("fp16"), PREFILL, SHORT), load)
    assert [(record.status, record.scenario) for record in records] == [(status, PREFILL), (status, SHORT)]
    assert all(record.reason for record in records)


def test_torchs_own_failed_allocation_on_a_cpu_is_oom() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert failure(caught.value, "/models/A")[0] == "oom"


def test_one_scenario_that_fails_leaves_the_others(make_checkpoint: Make, load_tiny: Callable[..., Any]) -> None:
    too_long = Scenario("long", prompt_tokens=5000, new_tokens=1)
    records = records_from(request_for(make_checkpoint("fp16"), too_long, SHORT), load_tiny)
    assert [record.status for record in records] == ["unsupported", "ok"]
    assert records[0].reason == "needs 5000 positions, the model has 2048: use a smaller --prompt or --new"


def test_a_reason_is_one_short_line_without_folders() -> None:
    _, reason = failure(ValueError(f"\n  cannot read /home/me/models/A/x.bin\nmore\n{'y' * 900}"), "/home/me/models/A")
    assert reason == "ValueError: cannot read A/x.bin"
    assert failure(ValueError(), "/models/A")[1] == "ValueError: no message"
    assert len(failure(ValueError("y" * 900), "/models/A")[1]) == REASON_CHARACTERS


def test_the_process_reads_its_request_and_appends_its_records(
    tmp_path: Path, make_checkpoint: Make, load_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.loader.load", load_tiny)
    request_for(make_checkpoint("fp16"), SHORT).write(tmp_path / "request.json")
    assert main([str(tmp_path / "request.json"), str(tmp_path / "result.jsonl")]) == 0
    [record] = read_records(tmp_path / "result.jsonl")
    assert record.status == "ok"


ROOT = Path(__file__).parents[3]
CHILD = """
import signal, sys
from bench.worker.worker import die_with
die_with(int(sys.argv[1]))
print("ready", flush=True)
signal.pause()
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
print(child.stdout.readline().decode().strip())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux call")
def test_a_worker_ends_with_the_process_that_started_it() -> None:
    # The child holds the pipe of stderr open: this returns only when both are gone.
    ended = subprocess.run([sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert ended.stdout == "ready\n"


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux call")
def test_a_worker_whose_parent_is_gone_already_ends_at_once() -> None:
    nobody = str(os.getppid())
    ended = subprocess.run([sys.executable, "-c", CHILD, nobody], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (-9, "")
