"""Look at the machine once, in a process of its own: `bench` itself imports no torch and holds no GPU.

python -m bench.run.probe DEVICE RESULT.json        (DEVICE: cpu, cuda or auto)
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.records.environment import Environment
from bench.run.executor import run_module
from bench.worker.machine import copy_probe, cpu_compute_dtype, fingerprint, matmul_probe
from quantize.errors import UserError
from quantize.schema import from_json

NO_CUDA = 3  # the exit code of a probe that found none


@dataclass(frozen=True)
class Machine:
    """What every run of one `bench` is measured on: "cpu" or "cuda", and the fingerprint."""

    device: str
    environment: Environment


def probe(device: str, threads: int | None) -> Machine:
    """The machine as a worker with so many threads sees it. Raises UserError without torch, or the CUDA asked for."""
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        result = Path(folder) / "machine.json"
        ended = run_module("bench.run.probe", device, str(result), timeout_s=300.0, threads=threads)
        if result.is_file():
            return from_json(Machine, result.read_bytes(), str(result))
    if ended.exit_code == NO_CUDA:
        raise UserError("no CUDA device here: use --device cpu, or install the driver and a torch made for CUDA")
    if "No module named 'torch'" in ended.output:
        raise UserError("bench needs torch: install it with `pip install 'quantable[models]'`")
    raise RuntimeError(f"looking at the machine failed: {ended.verdict()[1]}\n{ended.output}")


def look(device: str) -> Machine | None:
    """What `probe` wants to know, found in this process; None for CUDA asked for and not there."""
    import torch

    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        return None
    chosen = "cuda" if cuda and device != "cpu" else "cpu"
    environment = replace(fingerprint(chosen), copy_bytes_per_s=copy_probe(chosen))
    if chosen == "cpu":
        seconds = matmul_probe()
        environment = replace(environment, matmul_probe_s=seconds, cpu_dtype=cpu_compute_dtype(seconds))
    return Machine(chosen, environment)


if __name__ == "__main__":
    if (found := look(sys.argv[1])) is None:
        sys.exit(NO_CUDA)
    Path(sys.argv[2]).write_text(json.dumps(asdict(found)), encoding="utf-8")
