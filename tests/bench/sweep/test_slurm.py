"""A sweep on a real Slurm of two nodes on this machine."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.records.store import read_records
from bench.run.plan import key_of
from bench.sweep.cell import contents_of
from bench.sweep.cli import main
from reports import report
from tests.bench.sweep.conftest import SMALL, break_weights
from tests.bench.sweep.slurm import cluster, missing, until

ROOT = Path(__file__).parents[3]
DEADLINE_S = 400.0
LACKS = [*missing(), *([] if find_spec("submitit") else ["submitit"])]


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKS), reason=f"a Slurm of one's own needs {', '.join(LACKS)} (nox -s slurm)")
def test_three_models_one_requeued_one_preempted_and_one_broken_come_out_as_locally(
    tiny_models: list[Path], tmp_path: Path
) -> None:
    requeued, broken, preempted = tiny_models
    break_weights(broken)
    out, here = tmp_path / "slurm", tmp_path / "local"
    models = list(map(str, tiny_models))
    with cluster(tmp_path / "cluster") as environment:

        def sweep(*words: str, to: Path = out) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-m", "quantable", "sweep", *words, "--out", str(to)]
            how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": DEADLINE_S}
            return subprocess.run(command, env=environment, check=False, **how)  # type: ignore[call-overload,no-any-return]

        begun = sweep(*models, "--on", "slurm", "--slurm", "mem=3G", *SMALL)
        assert begun.returncode == 0, begun.stderr
        assert "3 waiting" in begun.stdout
        for model, stop in ((requeued, ["scontrol", "requeue"]), (preempted, ["scancel", "--signal=USR2"])):
            records = out / model.name / "records.jsonl"  # the second as a cluster does that takes a node away
            until(lambda: records.is_file() and bool(read_records(records)), "a first record", DEADLINE_S)  # noqa: B023
            (job,) = {one["job"] for one in attempts(out / model.name)}
            subprocess.run([*stop, job], env=environment, check=True, timeout=DEADLINE_S)
        again = sweep("--on", "slurm", *SMALL)  # while they run: nothing is given to Slurm twice
        assert "running" in again.stdout or "waiting" in again.stdout
        until(lambda: not {"running", "waiting"} & set(counted(sweep("--status").stdout)), "the end", DEADLINE_S)
        ended, gpus = sweep("--status"), tmp_path / "gpus"
        sweep(models[0], "--on", "slurm", "--slurm", "mem=3G", *SMALL, "--device", "cuda", to=gpus)
        until(lambda: "1 failed" in sweep("--status", to=gpus).stdout, "no CUDA", DEADLINE_S)
        assert "CUDA" in sweep("--status", to=gpus).stdout
        asked = next((gpus / ".slurm").glob("*.sh")).read_text()
        assert "#SBATCH --gpus-per-node=1\n" in asked
        assert "#SBATCH --requeue\n" in asked
        refused = sweep(models[0], "--on", "slurm", "--slurm", "partition=none", to=tmp_path / "none")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "error: Slurm takes no job (" in refused.stderr
        assert "invalid partition" in refused.stderr
    assert ended.stdout.splitlines()[-1] == "2 done, 1 failed", ended.stdout
    assert "is damaged or cut short" in next(line for line in ended.stdout.splitlines() if line.startswith(broken.name))
    for model in (requeued, preempted):
        states = [one["state"] for one in sorted(attempts(out / model.name), key=lambda one: one["started"])]
        assert states == ["waiting", "running", "done"]
        ok = [key_of(record) for record in read_records(out / model.name / "records.jsonl") if record.status == "ok"]
        assert (len(ok), len(set(ok))) == (4, 4)
    assert main([*models, "--out", str(here), *SMALL]) == 1
    for model in (requeued, preempted):
        assert contents_of(out / model.name) == contents_of(here / model.name)
    for folder in (out, here):
        page = report(folder, format="md")
        assert page.count("AWQ GEMM") >= 4
        assert f"| {broken.name} " in page


def counted(status: str) -> list[str]:
    """The states that a status speaks of in its last line."""
    return [word.strip(",") for line in status.splitlines()[-1:] for word in line.split()]


def attempts(place: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (place / "attempts").glob("*.json")]
