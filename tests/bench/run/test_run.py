import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.records.comparison import widest_interval
from bench.records.environment import Environment
from bench.records.record import Latency, Record
from bench.records.scenario import SCENARIOS, Scenario
from bench.records.stopping import PassRule, RoundsRule, Rules
from bench.records.store import RECORDS_NAME, read_records
from bench.run import run as module
from bench.run.checks import compute_dtypes, set_aside
from bench.run.executor import Executor
from bench.run.plan import target_of
from bench.run.probe import Machine
from bench.run.run import Instruments, Outcome, bench, targets_in
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, Settings
from quantize.checkpoint import Checkpoint, Manifest, SourceFacts, open_checkpoint, seal
from quantize.errors import UserError
from quantize.files import only_writer
from quantize.progress import Progress
from tests.fake_clock import FakeClock

Make = Callable[..., Checkpoint]
MakeRecords = Callable[..., list[Record]]
BOTH = tuple(SCENARIOS.values())
VARIANTS = ("fp16", "awq-gemm", "awq-gemv", "bnb-4bit", "bnb-8bit")
ROOT = Path(__file__).parents[3]


class FakeExecutor:
    """Measures nothing: ok records, except where `failing` gives a status; notes what it was asked."""

    def __init__(self, records_of: MakeRecords) -> None:
        self.records_of = records_of
        self.ran: list[PlannedRun] = []
        self.failing: dict[str, str] = {}
        self.interrupt_at: int | None = None
        self.settings: Settings | None = None

    def for_settings(self, settings: Settings, path: Path) -> Executor:
        self.settings = settings
        return self

    def __call__(self, run: PlannedRun) -> list[Record]:
        if len(self.ran) == self.interrupt_at:
            raise KeyboardInterrupt
        self.ran.append(run)
        assert self.settings is not None
        dtype = self.settings.compute_dtypes[run.subject.baseline]
        status = self.failing.get(run.subject.name)
        if status is None:
            return self.records_of(run, dtype=dtype, device=self.settings.device)
        return self.records_of(run, status=status, reason="why", dtype=dtype, device=self.settings.device)

    @property
    def order(self) -> str:
        return "".join(run.subject.name for run in self.ran)


@pytest.fixture
def executor(records_of: MakeRecords) -> FakeExecutor:
    return FakeExecutor(records_of)


@pytest.fixture
def folder(make_checkpoint: Make) -> Path:
    """Five checkpoints, A to E; A is the reference."""
    for letter, variant in zip("ABCDE", VARIANTS, strict=True):
        checkpoint = make_checkpoint(variant, name=letter)
    return checkpoint.path.parent


@pytest.fixture
def measure(folder: Path, executor: FakeExecutor, machine: Machine) -> Callable[..., Outcome]:
    """`bench` of the five with the fake executor on a fake machine; `rounds` are exactly so many."""

    def run(*, rounds: int = 3, **arguments: Any) -> Outcome:
        own = {name: arguments.pop(name) for name in ("progress",) if name in arguments}
        path = arguments.pop("records", folder / RECORDS_NAME)
        probe_machine = arguments.pop("probe_machine", lambda device, threads: machine)
        options = BenchOptions(**{"rounds": RoundsRule(least=rounds, most=rounds)} | arguments)
        instruments = Instruments(probe_machine, executor.for_settings, check_models=lambda *_: None)
        return module.measure(targets_in(folder, options.kernel), path, options, instruments=instruments, **own)

    return run


def test_a_bench_measures_all_in_order_and_keeps_every_record(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path
) -> None:
    outcome = measure()
    assert executor.order == "ABCDEEDCBAABCDE"
    assert {run.scenarios for run in executor.ran} == {BOTH}
    assert outcome.path == folder / "records.jsonl"
    assert read_records(outcome.path) == list(outcome.records)
    assert (len(outcome.records), outcome.measured, outcome.failed, outcome.usable) == (35, 35, (), True)


def test_all_runs_share_device_dtype_threads_and_timeout(
    measure: Callable[..., Outcome], executor: FakeExecutor, machine: Machine
) -> None:
    measure(rounds=1, threads=3, timeout_s=7.0)
    settings = executor.settings
    assert settings is not None
    assert (settings.device, settings.compute_dtypes, settings.options.timeout_s, settings.options.threads) == (
        "cpu",
        {"Tiny": "float32"},
        7.0,
        3,
    )
    assert settings.environment == machine.environment
    assert (settings.options.rounds, settings.options.rule) == (RoundsRule(least=1, most=1), PassRule())
    measure(rounds=1, dtype="bfloat16")
    assert executor.settings is not None
    assert executor.settings.compute_dtypes == {"Tiny": "bfloat16"}


def test_records_elsewhere_scenarios_and_no_quality(
    measure: Callable[..., Outcome], executor: FakeExecutor, tmp_path: Path
) -> None:
    own = Scenario("own", 10, 2)
    outcome = measure(scenarios=(own,), rounds=1, quality=False, records=tmp_path / "elsewhere" / "r.jsonl")
    assert [run.works for run in executor.ran] == [(("latency", own),)] * 5
    assert len(read_records(tmp_path / "elsewhere" / "r.jsonl")) == outcome.measured == 5


def test_a_row_on_a_kernel_of_ones_choice_stands_beside_the_others(
    measure: Callable[..., Outcome], executor: FakeExecutor
) -> None:
    plain = measure(rounds=1, quality=False)
    executor.ran.clear()
    chosen = measure(rounds=1, quality=False, kernel="native")
    assert [run.subject.name for run in executor.ran] == ["B, native kernel", "C, native kernel"]
    assert [run.subject.kernel for run in executor.ran] == ["native"] * 2
    assert len(read_records(chosen.path)) == len(plain.records) + chosen.measured
    assert measure(rounds=1, quality=False, kernel="auto").measured == 0


def test_a_second_bench_measures_nothing(measure: Callable[..., Outcome], executor: FakeExecutor) -> None:
    first = measure()
    executor.ran.clear()
    second = measure()
    assert executor.ran == []
    assert (second.records, second.measured) == (first.records, 0)


def test_an_interrupted_bench_goes_on_where_it_was(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path
) -> None:
    executor.interrupt_at = 7
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert len(read_records(folder / "records.jsonl")) == 5 * 3 + 2 * 2
    executor.interrupt_at = None
    outcome = measure()
    assert executor.order == "ABCDEEDCBAABCDE"
    assert (len(outcome.records), outcome.measured) == (35, 35 - 19)


KILLED = """
import os, signal, sys
from pathlib import Path
from bench.records.environment import Environment
from bench.records.stopping import RoundsRule
from bench.run.executor import WorkerExecutor
from bench.run.probe import Machine
from bench.worker.options import BenchOptions
from bench.run.run import Instruments, measure, targets_in
from quantize.schema import from_json

def executor_for(settings, path):
    worker = WorkerExecutor(settings, command=(sys.executable, "-P", "-c", sys.argv[2]))
    runs = []
    def run(planned):
        if len(runs) == int(sys.argv[4]):
            with path.open("ab") as file:
                file.write(b'{"kind":"late')  # killed in the middle of a write
            os.kill(os.getpid(), signal.SIGKILL)
        runs.append(planned)
        return worker(planned)
    return run

machine = Machine("cpu", from_json(Environment, sys.argv[3], "argument"))
options = BenchOptions(rounds=RoundsRule(least=2, most=2))
instruments = Instruments(lambda device, threads: machine, executor_for, check_models=lambda *_: None)
folder = Path(sys.argv[1])
measure(targets_in(folder), folder / "records.jsonl", options, instruments=instruments)
"""
WORKER = """
import sys
from pathlib import Path
from bench.records.record import Latency, Quality
from bench.records.store import append
from bench.worker.request import Request

request = Request.read(Path(sys.argv[1]))
for work in request.run.works:
    latency = work[0] == "latency"
    quality = Quality(2.0, 1, "builtin evaluation", "0")
    figures = {"latency": Latency((1.0,), ((),), ())} if latency else {"quality": quality}
    record = request.record("ok", work, started_at="2026", wall_s=1.0, **figures)
    append(Path(sys.argv[2]), record)
"""


def test_kill_9_loses_no_finished_record(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path, machine: Machine
) -> None:
    arguments = [str(folder), WORKER, json.dumps(asdict(machine.environment)), "6"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = read_records(folder / "records.jsonl")
    assert [record.subject.name for record in before] == list("AAABBBCCCDDDEEEEE")
    outcome = measure(rounds=2)
    assert executor.order == "DCBA"
    after = read_records(folder / "records.jsonl")
    assert after[: len(before)] == before
    assert len(after) == len(outcome.records) == 25


def test_a_run_that_fails_is_a_record_and_the_rest_go_on(
    measure: Callable[..., Outcome], executor: FakeExecutor
) -> None:
    executor.failing = {"C": "oom", "D": "timeout"}
    outcome = measure(rounds=2)
    assert executor.order == "ABCDEEDCBA"
    assert [record.status for record in outcome.records if record.subject.name == "C"] == ["oom"] * 5
    assert len(outcome.failed) == 10
    assert outcome.usable


def test_what_failed_is_measured_again_and_the_later_record_counts(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path
) -> None:
    executor.failing = {"C": "oom"}
    measure(rounds=1)
    executor.failing = {}
    executor.ran.clear()
    outcome = measure(rounds=1)
    assert executor.order == "AC"  # what the reference expects is needed again
    assert outcome.failed == ()
    assert len(outcome.records) == 15
    assert len((folder / "records.jsonl").read_text().splitlines()) == 19


@pytest.mark.parametrize(("failing", "usable"), [("A", False), ("ABCDE", False), ("BCDE", True)])
def test_without_figures_of_the_reference_nothing_can_be_compared(
    measure: Callable[..., Outcome], executor: FakeExecutor, failing: str, usable: bool
) -> None:
    executor.failing = dict.fromkeys(failing, "error")
    assert measure(rounds=1).usable is usable


def test_fresh_sets_the_old_records_aside(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path
) -> None:
    first = measure(rounds=1)
    executor.ran.clear()
    assert measure(rounds=1, fresh=True).measured == 15
    assert executor.order == "ABCDE"
    assert read_records(folder / "records.1.jsonl") == list(first.records)


def test_set_aside_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    set_aside(path)
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        path.write_text(text)
        set_aside(path)
    assert not path.exists()
    assert [(tmp_path / f"records.{n}.jsonl").read_text() for n in (1, 2)] == ["one", "two"]


def test_progress_is_told_each_step(measure: Callable[..., Outcome]) -> None:
    told: list[str] = []
    measure(rounds=2, quality=False, progress=Progress(changed=lambda progress: told.append(progress.doing)))
    steps = list(dict.fromkeys(told))
    assert steps[:3] == ["looking at the models", "looking at the machine", "checking the files of A"]
    assert steps[7:] == [
        f"{name}, round {number} of 2" for number, names in ((1, "ABCDE"), (2, "EDCBA")) for name in names
    ]


def test_each_record_is_a_line_as_it_comes_and_tells_of_those_to_come(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path
) -> None:
    clock, lines, left = FakeClock(), list[str](), list[float]()
    executor.failing = {"B": "oom"}

    def row(line: str) -> None:
        clock.advance(1)  # what the fake records say that they took
        lines.append(line)

    def changed(progress: Progress) -> None:
        if seconds := progress.seconds():
            left.append(seconds[1])

    measure(rounds=1, progress=Progress(changed=changed, row=row, clock=clock.mark))
    assert lines[:5] == [
        f"bench: 5 checkpoints, into {folder / RECORDS_NAME}",
        "A  published  round 1: prefill 1 s, decode 100 ms",
        "A  chat  round 1: prefill 1 s, decode 100 ms",
        "A  quality: perplexity 15",
        "B  published  round 1: oom: why",
    ]
    assert len(lines) == 16
    assert left[0] > left[-1] == 0


# What the user gets to fix


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder: .*none"):
        bench(tmp_path / "none")


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no quantable checkpoint: make some with `quantize SOURCE"):
        bench(tmp_path)


def test_no_reference_of_one_base_model(make_checkpoint: Make) -> None:
    make_checkpoint("fp16", base_model="Alpha")
    folder = make_checkpoint("bnb-4bit", base_model="Beta").path.parent
    with pytest.raises(UserError) as caught:
        bench(folder)
    assert str(caught.value) == (
        f"{folder} holds no reference of Beta: make it with `quantize models/Beta --variant fp16 --out {folder}`"
    )


def test_a_tampered_checkpoint_is_not_measured(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path
) -> None:
    (folder / "B" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"B/model\.safetensors does not match its SHA-256"):
        measure()
    assert executor.ran == []
    assert not (folder / "records.jsonl").exists()


def test_records_of_another_machine_are_not_mixed_in(
    measure: Callable[..., Outcome], machine: Machine, executor: FakeExecutor
) -> None:
    measure(rounds=1)
    other = replace(machine, environment=replace(machine.environment, cpu="Model 2"))
    with pytest.raises(UserError, match=r"measured elsewhere \(cpu: Model 1 against Model 2\): use --fresh"):
        measure(rounds=1, probe_machine=lambda device, threads: other)
    assert measure(rounds=1, fresh=True, probe_machine=lambda device, threads: other).measured == 15


def test_records_of_another_device_do_not_matter(measure: Callable[..., Outcome]) -> None:
    measure(rounds=1)
    gpu = Machine("cuda", Environment(gpu="Card 9000"))
    assert measure(rounds=1, probe_machine=lambda device, threads: gpu).measured == 15


def test_a_checkpoint_made_again_under_the_same_name(measure: Callable[..., Outcome], folder: Path) -> None:
    measure(rounds=1)
    manifest = open_checkpoint(folder / "B").manifest
    (folder / "B" / "model.safetensors").write_bytes(b"others")
    seal(folder / "B", manifest)
    with pytest.raises(UserError, match=r"B is not what .*records\.jsonl has records of: use --fresh"):
        measure(rounds=1)


def test_a_records_file_that_is_none(measure: Callable[..., Outcome], folder: Path) -> None:
    (folder / "records.jsonl").write_text("hello\n")
    with pytest.raises(UserError, match="line 1 is no record"):
        measure()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"rounds": 0}, "rounds.least must be at least 1"),
        ({"timeout_s": 0}, "--timeout must be above 0"),
        ({"timeout_s": float("nan")}, "--timeout must be above 0"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; there are: float32, bfloat16, float16"),
        ({"device": "tpu"}, "unknown device 'tpu'; there are: auto, cpu, cuda"),
    ],
)
def test_arguments_out_of_range(measure: Callable[..., Outcome], argument: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(**argument)


def test_perplexities_on_two_texts_are_not_mixed(measure: Callable[..., Outcome], tmp_path: Path) -> None:
    measure(rounds=1)
    (tmp_path / "own.txt").write_text("some text of my own")
    with pytest.raises(UserError, match=r"on another text \(builtin evaluation, now own.txt, sha256 "):
        measure(rounds=1, quality_data=str(tmp_path / "own.txt"))
    with pytest.raises(UserError, match="no such text"):
        measure(rounds=1, quality_data=str(tmp_path / "none.txt"))


def test_rounds_go_on_while_ratios_are_noisy_and_there_is_time(
    folder: Path, machine: Machine, records_of: MakeRecords
) -> None:
    """A clock that stands still but for the runs; B takes 1.3 and 1.1 times A's time in turn, then always 1.2."""
    clock = FakeClock()
    rounds_run: list[int | None] = []

    def executor_for(settings: Settings, path: Path) -> Executor:
        def run(planned: PlannedRun) -> list[Record]:
            clock.advance(1.0)
            rounds_run.append(planned.round)
            noisy = planned.round is not None and planned.round < 4
            factor = (1.2 + (0.1 if (planned.round or 0) % 2 else -0.1)) if noisy else 1.2
            seconds = 1.0 if planned.is_reference else factor
            return [
                replace(record, latency=Latency((seconds,), ((),), ())) if record.latency else record
                for record in records_of(planned)
            ]

        return run

    def measured(rounds: RoundsRule, name: str) -> Outcome:
        rounds_run.clear()
        options = BenchOptions(rounds=rounds, quality=False, scenarios=BOTH[:1])
        instruments = Instruments(lambda device, threads: machine, executor_for, clock.mark, lambda *_: None)
        return module.measure(targets_in(folder), folder.parent / name, options, instruments=instruments)

    until_known = measured(RoundsRule(least=3, most=50, noise=0.1, max_time_s=1e6), "known.jsonl")
    assert until_known.stopped == "noise"
    assert 5 < until_known.rounds < 50
    assert (widest_interval(until_known.records) or 1.0) <= 0.1
    out_of_time = measured(RoundsRule(least=3, most=50, noise=0.001, max_time_s=27.0), "time.jsonl")
    assert (out_of_time.stopped, out_of_time.rounds) == ("time", 5)
    assert len(rounds_run) == 25
    at_most = measured(RoundsRule(least=3, most=4, noise=0.001, max_time_s=1e6), "most.jsonl")
    assert (at_most.stopped, at_most.rounds) == ("rounds", 4)


# The compute dtype


def test_on_a_cpu_the_dtype_is_the_probes_or_that_of_the_records_begun(
    make_checkpoint: Make, records_of: MakeRecords, machine: Machine
) -> None:
    from bench.run.plan import plan

    one = target_of(make_checkpoint("fp16"))
    begun = records_of(plan([one], BOTH, range(1))[0])
    fast = replace(machine, environment=replace(machine.environment, cpu_dtype="bfloat16"))
    assert compute_dtypes([one], fast, None, []) == {"Tiny": "bfloat16"}
    assert compute_dtypes([one], fast, None, begun) == {"Tiny": "float32"}
    assert compute_dtypes([one], fast, "float16", begun) == {"Tiny": "float16"}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ('{"dtype": "bfloat16"}', "bfloat16"),
        ('{"torch_dtype": "bfloat16"}', "bfloat16"),
        ('{"dtype": "float16"}', "float16"),
        ('{"dtype": "float32"}', "float16"),
        ("{}", "float16"),
    ],
)
def test_on_a_gpu_the_dtype_is_the_references_half_dtype(make_checkpoint: Make, config: str, dtype: str) -> None:
    checkpoint = make_checkpoint("fp16")
    (checkpoint.path / "config.json").write_text(config)
    assert compute_dtypes([target_of(checkpoint)], Machine("cuda", Environment()), None, []) == {"Tiny": dtype}


# The real thing


def seal_reference(source: Path, folder: Path, weights_bytes: int) -> None:
    folder.parent.mkdir()
    __import__("shutil").copytree(source, folder)
    manifest = Manifest(
        name=folder.name,
        base_model="tiny-llama",
        variant="fp16",
        q_group_size=None,
        source=SourceFacts("folder", "tiny-llama", None, None),
        calibration=None,
        options={},
        libraries={},
        seconds={},
        created="2026-01-01T00:00:00+00:00",
        weights_bytes=weights_bytes,
    )
    seal(folder, manifest)


def test_a_real_bench_of_a_tiny_model(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))  # where no earlier bench left anything
    folder = tmp_path / "models"
    seal_reference(tiny_llama, folder / "tiny-llama-FP16", 1000)
    options = BenchOptions(
        scenarios=(Scenario("own", 32, 5),),
        rounds=RoundsRule(least=1, most=1),
        device="cpu",
        threads=1,
        dtype="float32",
    )
    outcome = bench(folder, options)
    assert [(record.kind, record.status, record.reason) for record in outcome.records] == [
        ("latency", "ok", None),
        ("quality", "ok", None),
    ]
    latency, quality = outcome.records
    assert latency.latency is not None
    assert quality.quality is not None
    assert len(latency.latency.prefill_s) == len(latency.latency.decode_s) >= 2
    assert len(latency.latency.decode_s[0]) == 4
    assert latency.latency.stopped in ("noise", "time", "passes")
    assert latency.memory is not None
    assert latency.memory.kv_cache_bytes == latency.memory.kv_cache_formula_bytes == 2 * 2 * 2 * 32 * 36 * 4
    assert latency.prompt_sha256 is not None
    assert latency.plan is not None
    assert latency.plan == Rules(RoundsRule(least=1, most=1), PassRule())
    assert quality.quality.tokens == 12 * 511
    assert 200 < quality.quality.perplexity < 2000  # a random model over 512 tokens
    assert quality.quality.noise_floor is not None
    assert 0 <= quality.quality.noise_floor.mean < 1e-4
    assert latency.environment.torch_threads == 1
    assert latency.environment.libraries["transformers"]
    assert latency.kernels is not None
    assert outcome.usable
    assert read_records(outcome.path) == list(outcome.records)
    assert capfd.readouterr() == ("", "")
    assert str(tmp_path) not in outcome.path.read_text()
    assert sorted(path.name for path in folder.iterdir()) == [".records.jsonl.lock", "records.jsonl", "tiny-llama-FP16"]


def test_importing_bench_imports_no_torch() -> None:
    code = "import bench, bench.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ)).returncode == 0


def test_a_second_bench_is_told_who_is_at_work(
    measure: Callable[..., Outcome], executor: FakeExecutor, folder: Path
) -> None:
    with only_writer(folder / f".{RECORDS_NAME}.bench.lock", "busy"), pytest.raises(UserError, match="another `bench`"):
        measure(rounds=1)
    assert executor.order == ""
    assert measure(rounds=1).usable
