"""A sweep on this machine: one process a GPU, each with the next cell; one alone without, as two would disturb."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.run.executor import ProcessResult, worker_environment
from bench.sweep.cell import Attempt, Cell, standing

POLL_S = 0.1
WORKER = ("-P", "-m", "bench.sweep.worker")


def devices(wanted: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES shall say to each process; wanted: "cpu", "cuda" or "auto"."""
    named = "" if wanted == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        named = ",".join(map(str, range(torch.cuda.device_count())))
    return [one for one in named.split(",") if one and one != "-1"] or [""]


def run_local(
    out: Path, cells: Sequence[Cell], places: Sequence[str], timeout_s: float, told: Callable[[Attempt], object]
) -> None:
    """Carry out these cells, one process for each of `places` at a time; told: how each stands when it ends."""
    waiting, running = list(cells), dict[str, tuple[Cell, "subprocess.Popen[bytes]", float]]()
    try:
        while waiting or running:
            for place in [one for one in places if one not in running][: len(waiting)]:
                cell = waiting.pop(0)
                running[place] = cell, _start(out, cell, place), time.monotonic() + timeout_s
            time.sleep(POLL_S)
            for place, (cell, process, deadline) in list(running.items()):
                late = time.monotonic() > deadline
                if process.poll() is not None or late:
                    del running[place]
                    if _kill(process):  # it could not say so itself
                        said = (out / cell.name / "sweep.log").read_text(encoding="utf-8", errors="replace")
                        ended = ProcessResult(None if late else process.returncode, said, timeout_s)
                        Attempt(cell.name, cell.key, "failed", ended.verdict()[1]).write(out)
                    told(standing(out, cell))
    finally:
        for _, process, _ in running.values():
            _kill(process)


def _start(out: Path, cell: Cell, place: str) -> "subprocess.Popen[bytes]":
    (out / cell.name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *WORKER, str(out), cell.name, str(os.getpid())]
    online = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}  # it may download, unlike a run of the bench
    environment = worker_environment(None) | online | {"CUDA_VISIBLE_DEVICES": place}
    with (out / cell.name / "sweep.log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _kill(process: "subprocess.Popen[bytes]") -> int:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
