"""A sweep on a Slurm cluster: a cell is a job of one array, by submitit; what is finished is a job's checkpoint."""

import contextlib
import io
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.run.executor import worker_environment
from bench.sweep.cell import Attempt, Cell
from quantize.errors import UserError

JOB_NAME, ANSWER_S = "quantable", 60.0


class CellJob:
    """What a job runs. Preempted or out of time, submitit queues it again, and it goes on where it was."""

    def __call__(self, out: str, name: str) -> None:
        from bench.sweep.worker import run_cell

        run_cell(Path(out), name)

    def checkpoint(self, out: str, name: str) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, out, name)


def submit(out: Path, cells: Sequence[Cell], minutes: int, gpu: bool, options: Mapping[str, str]) -> None:
    """Queue a job for each cell, and note its number. options: of sbatch, as submitit names them."""
    try:
        import submitit

        os.environ["PYTHONPATH"] = worker_environment(None).get("PYTHONPATH", "")  # which sbatch passes on
        given: dict[str, Any] = {f"slurm_{name}": value for name, value in options.items()}
        given |= {"slurm_additional_parameters": {"requeue": True}} | ({"gpus_per_node": 1} if gpu else {})
        executor = submitit.AutoExecutor(folder=out / ".slurm", cluster="slurm")
        executor.update_parameters(timeout_min=minutes, name=JOB_NAME, **given)
        before = time.time()  # a job may have begun, and failed, when this goes on
        with contextlib.redirect_stderr(io.StringIO()):  # sbatch's own words are in the error
            jobs = executor.map_array(CellJob(), [str(out)] * len(cells), [cell.name for cell in cells])
    except ModuleNotFoundError:
        raise UserError("--on slurm needs submitit: pip install 'quantable[slurm]'") from None
    except Exception as error:  # of many kinds: an option that there is not, a partition, a controller that is away
        said = " ".join(str(error).split())[:300]
        raise UserError(f"Slurm takes no job ({said}): change --slurm, or use --on local") from None
    for cell, job in zip(cells, jobs, strict=True):
        Attempt(cell.name, cell.key, "waiting", job=job.job_id, started=before).write(out)


def queue() -> dict[str, str]:
    """The state of each of this user's jobs that wait or run, by number, without any accounting."""
    command = ["squeue", "--me", "--array", "--noheader", "--name", JOB_NAME, "--format", "%i %T"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"squeue does not answer ({error}): ask where the cluster is") from None
    return dict(line.split() for line in ran.stdout.splitlines())
