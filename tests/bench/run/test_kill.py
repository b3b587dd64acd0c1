"""A bench that is killed at random moments loses no finished record and measures nothing twice."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.records.record import read_records
from bench.records.scenario import SCENARIOS
from bench.run.plan import key_of
from bench.run.probe import Machine
from quantize.checkpoint import Checkpoint

ROOT = Path(__file__).parents[3]
BENCH = """
import json, sys
from bench import bench
from bench.records.stopping import Rounds
from bench.run.executor import WorkerExecutor
from bench.run.probe import Machine
from bench.run.run import BenchOptions

def executor_for(settings, path):
    return WorkerExecutor(settings, command=(sys.executable, "-P", "-c", sys.argv[2]))

machine = Machine("cpu", json.loads(sys.argv[3]), "float32")
options = BenchOptions(rounds=Rounds(least=4, most=4))
bench(sys.argv[1], options, probe_machine=lambda device, threads: machine, executor_for=executor_for)
"""
WORKER = """
import sys, time
from pathlib import Path
from bench.records.record import Latency, Quality, append_record
from bench.worker.request import Request

request = Request.read(Path(sys.argv[1]))
for work in request.works:
    quality = Quality(2.0, 1, "builtin evaluation", "0")
    figures = {"latency": Latency((1.0,), ((),), ())} if work[0] == "latency" else {"quality": quality}
    append_record(Path(sys.argv[2]), request.record("ok", work, started_at="2026", wall_s=1.0, **figures))
    time.sleep(0.02)
"""
RECORDS = 5 * (4 * len(SCENARIOS) + 1)


def test_killed_ten_times_every_finished_record_is_there_once(
    make_checkpoint: Callable[..., Checkpoint], machine: Machine
) -> None:
    for variant in ("fp16", "awq-gemm", "awq-gemv", "bnb-4bit", "bnb-8bit"):
        folder = make_checkpoint(variant).path.parent
    path = folder / "records.jsonl"
    command = [sys.executable, "-c", BENCH, str(folder), WORKER, json.dumps(machine.environment)]
    generator = random.Random()
    before: list[str] = []
    killed = 0
    while killed < 10:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started = time.monotonic()
        while process.poll() is None and not (path.is_file() and len(path.read_bytes().splitlines()) > len(before)):
            assert time.monotonic() - started < 60, "no record came"
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        _, words = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), words.decode()
        killed += 1
        now = path.read_text().splitlines()
        assert now[: len(before)] == before
        assert len(read_records(path)) == len(now)
        before = now
        if process.returncode == 0:
            break
    measured_before = len(before)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    records = read_records(path)
    assert path.read_text().splitlines()[:measured_before] == before
    counts = Counter(key_of(record) for record in records if record.kind == "latency")
    assert len(counts) == RECORDS - 5
    assert set(counts.values()) == {1}
    # The reference is judged again after a kill that left its expectations unfinished; the others once.
    judged = Counter(record.subject.name for record in records if record.kind == "quality")
    assert len(judged) == 5
    assert all(count == 1 for name, count in judged.items() if name != "Tiny-fp16")
