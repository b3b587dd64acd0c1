"""Carry out a planned run in a process of its own, and say what became of it. Imports no torch."""

import os
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.engines.protocol import UNSUPPORTED
from bench.records.record import Record, Status
from bench.records.store import read_records
from bench.worker.request import PlannedRun, Request, Settings
from bench.worker.worker import NO_MEMORY_WORDS, without_folder

Executor = Callable[[PlannedRun], list[Record]]  # carries out a run: a record for every scenario in it


@dataclass(frozen=True)
class WorkerExecutor:
    """Runs `python -m bench.worker.worker` for every run.

    command: what is started, the two file names are appended; log: where the worker's own words go when a run fails,
    None to drop them. Nothing the worker prints reaches the screen."""

    settings: Settings
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "bench.worker.worker")
    log: Path | None = None

    def __call__(self, run: PlannedRun) -> list[Record]:
        request = Request(self.settings, run, parent_pid=os.getpid())
        started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
            request_path, result_path = Path(folder) / "request.json", Path(folder) / "result.jsonl"
            self.write(request, request_path)
            options, command = self.settings.options, [*self.command, str(request_path), str(result_path)]
            ended = run_process(command, timeout_s=options.timeout_s, environment=self.environment())
            records = self.read(request, result_path, started_at) if result_path.is_file() else []
        wall_s = time.perf_counter() - start
        measured = {(record.kind, record.scenario) for record in records}
        status, said = ended.verdict()
        who = "" if run.subject.engine is None else f"{run.subject.engine}: "
        reason = who + without_folder(said, run.target.checkpoint)
        for work in (one for one in run.works if one not in measured):
            records.append(request.record(status, work, started_at=started_at, wall_s=wall_s, reason=reason))
        if self.log is not None and any(record.status != "ok" for record in records):
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"--- {run.subject.name}, {started_at}\n{ended.output}\n")
        return records

    def environment(self) -> dict[str, str]:
        return worker_environment(self.settings.options.threads)

    def write(self, request: Request, path: Path) -> None:
        request.write(path)

    def read(self, request: Request, path: Path, started_at: str) -> list[Record]:
        return read_records(path)


@dataclass(frozen=True)
class ProcessResult:
    """How a process ended: its exit code (minus the number of a signal), None after a time-out."""

    exit_code: int | None
    output: str
    timeout_s: float

    def verdict(self) -> tuple[Status, str]:
        """Status and reason for what the process left unmeasured."""
        if self.exit_code is None:
            return "timeout", f"took longer than {self.timeout_s:g} s (see --timeout)"
        if self.exit_code == -signal.SIGKILL:
            return "oom", "killed by the system, probably out of memory"
        if any(words in self.output.lower() for words in NO_MEMORY_WORDS):
            return "oom", "the process ran out of memory"
        if self.exit_code < 0:
            return "error", f"the process died of signal {-self.exit_code} ({signal.strsignal(-self.exit_code)})"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        last = lines[-1][:200] if lines else "it said nothing"
        if self.exit_code == UNSUPPORTED:
            return "unsupported", last
        return "error", f"the process ended with code {self.exit_code} and no record: {last}"


def run_process(command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str]) -> ProcessResult:
    """Run to the end or the time-out; whatever interrupts the waiting kills the process and its children."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    how: dict[str, Any] = {"env": environment, "text": True, "errors": "replace", "start_new_session": True}
    process = subprocess.Popen(command, **streams, **how)
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return ProcessResult(process.returncode, output, timeout_s)
    except subprocess.TimeoutExpired:
        return ProcessResult(None, _kill(process), timeout_s)
    finally:
        if process.poll() is None:
            _kill(process)


def run_module(module: str, *arguments: str, timeout_s: float, threads: int | None = None) -> ProcessResult:
    """`python -m MODULE ARGUMENTS`, in a worker's environment."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    return run_process(command, timeout_s=timeout_s, environment=worker_environment(threads))


def _kill(process: "subprocess.Popen[str]") -> str:
    """Kill the process with all its children, and return what it had printed."""
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    return output


def worker_environment(threads: int | None) -> dict[str, str]:
    """This process's environment, offline and quiet (checkpoints are complete), with the threads and our packages."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    if threads is not None:
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    root = Path(__file__).resolve().parents[2]
    if root not in {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}:
        paths = [str(root), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment
