import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.records.environment import Environment
from bench.records.record import Record
from bench.records.scenario import SCENARIOS
from bench.run.executor import ProcessResult, WorkerExecutor, worker_environment
from bench.run.plan import plan, target_of
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, Settings
from quantize.checkpoint import Checkpoint

Make = Callable[..., Checkpoint]
MakeRecords = Callable[..., list[Record]]
BOTH = tuple(SCENARIOS.values())

SUCCEEDS = """
import sys
from pathlib import Path
from bench.records.record import Latency
from bench.records.store import append
from bench.worker.options import BenchOptions
from bench.worker.request import Request

request, result = Request.read(Path(sys.argv[1])), Path(sys.argv[2])
print("chatter of a library")
def succeed(scenario):
    latency = Latency((1.0,), ((),), ())
    append(
        result, request.record("ok", ("latency", scenario), started_at="2026", wall_s=1.0, latency=latency)
    )
"""
DIES = SUCCEEDS + "succeed(request.run.scenarios[0])\n"


@pytest.fixture
def settings() -> Settings:
    return Settings("cpu", {"Tiny": "float32"}, Environment(cpu="Model 1"), BenchOptions(timeout_s=600.0, threads=2))


@pytest.fixture
def run(make_checkpoint: Make) -> PlannedRun:
    return plan([target_of(make_checkpoint("fp16"))], BOTH, range(2), quality=False)[1]


def executor(settings: Settings, script: str, log: Path | None = None) -> WorkerExecutor:
    return WorkerExecutor(settings, command=(sys.executable, "-P", "-c", script), log=log)


def test_a_worker_gets_the_run_and_its_records_come_back(settings: Settings, run: PlannedRun) -> None:
    records = executor(settings, SUCCEEDS + "for one in request.run.scenarios: succeed(one)")(run)
    assert [(record.status, record.scenario) for record in records] == [("ok", BOTH[0]), ("ok", BOTH[1])]
    assert {record.subject for record in records} == {run.subject}
    assert {(record.round, record.position) for record in records} == {(1, 1)}
    assert {(record.device, record.compute_dtype) for record in records} == {("cpu", "float32")}
    assert records[0].environment == settings.environment


@pytest.mark.parametrize(
    ("ending", "status", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "oom", "killed by the system, probably out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "error", "the process died of signal 11"),
        ("sys.exit('std::bad_alloc')", "oom", "the process ran out of memory"),
        ("raise MemoryError", "oom", "the process ran out of memory"),
        ("raise ValueError('why')", "error", "the process ended with code 1 and no record: ValueError: why"),
    ],
)
def test_a_worker_that_dies_leaves_its_records_and_a_reason_for_the_rest(
    settings: Settings, run: PlannedRun, ending: str, status: str, reason: str
) -> None:
    finished, lost = executor(settings, DIES + ending)(run)
    assert (finished.status, finished.scenario) == ("ok", BOTH[0])
    assert (lost.status, lost.scenario) == (status, BOTH[1])
    assert str(lost.reason).startswith(reason)
    assert "\n" not in str(lost.reason)


def test_a_worker_that_takes_too_long_is_killed(settings: Settings, run: PlannedRun) -> None:
    impatient = Settings("cpu", settings.compute_dtypes, settings.environment, BenchOptions(timeout_s=0.5))
    records = executor(impatient, "import signal; signal.pause()")(run)
    assert [(record.status, record.reason) for record in records] == [
        ("timeout", "took longer than 0.5 s (see --timeout)")
    ] * 2
    assert all(record.wall_s >= 0.5 for record in records)


def test_a_quality_run_that_dies_is_one_record(settings: Settings, run: PlannedRun) -> None:
    quality = PlannedRun(run.target, 4, quality=True)
    [record] = executor(settings, "import os; os.kill(os.getpid(), 9)")(quality)
    assert (record.kind, record.status, record.scenario, record.round) == ("quality", "oom", None, None)


def test_an_interrupt_kills_the_worker(settings: Settings, run: PlannedRun, tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
os.kill(os.getppid(), signal.SIGINT)
signal.pause()
"""
    with pytest.raises(KeyboardInterrupt):
        executor(settings, script)(run)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_a_worker_says_goes_to_the_log_when_it_fails(
    settings: Settings, run: PlannedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "records.log"
    executor(settings, SUCCEEDS + "for one in request.run.scenarios: succeed(one)", log)(run)
    assert not log.exists()
    executor(settings, SUCCEEDS + "raise ValueError('why')", log)(run)
    text = log.read_text()
    assert "Tiny-fp16" in text
    assert "chatter of a library" in text
    assert "ValueError: why" in text
    assert capfd.readouterr() == ("", "")


def test_a_reason_holds_no_folder(settings: Settings, run: PlannedRun) -> None:
    assert run.target.checkpoint is not None
    file = f"{run.target.checkpoint}/x"
    records = executor(settings, f"import sys; sys.exit({file!r})")(run)
    assert {record.reason for record in records} == {"the process ended with code 1 and no record: Tiny-fp16/x"}


def test_an_exit_without_a_word() -> None:
    assert ProcessResult(3, "", 1.0).verdict() == (
        "error",
        "the process ended with code 3 and no record: it said nothing",
    )
    assert ProcessResult(-signal.SIGKILL, "", 1.0).verdict()[0] == "oom"


def test_workers_are_offline_and_have_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = worker_environment(3)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("3", "3")
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/somewhere"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in worker_environment(None)
