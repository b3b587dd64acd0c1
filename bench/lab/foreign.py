"""What runs in another interpreter, one with optimum-benchmark: the sources of these functions, without the rest."""

import inspect
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.run.executor import run_process, worker_environment

TIMEOUT_S = 1800.0


def launched(request: dict[str, Any]) -> dict[str, Any]:
    """optimum-benchmark through its Python interface; everything not named here has its default.

    Its process launcher polls without a pause until the measuring process is done. With `asleep` the same call waits in
    the kernel; nothing else differs. launcher_cpu_s: processor seconds of this process, which only waits.
    """
    from multiprocessing.connection import Connection

    import optimum_benchmark as theirs  # type: ignore[import-not-found]

    if request["asleep"]:
        poll = Connection.poll
        Connection.poll = lambda self, timeout=0.2: poll(self, timeout)  # type: ignore[method-assign]
    new = request["new"]
    config = theirs.BenchmarkConfig(
        name="side_by_side",
        launcher=theirs.ProcessConfig(),
        backend=theirs.PyTorchConfig(
            model=request["model"], device="cpu", torch_dtype="float32", task="text-generation", seed=request["seed"]
        ),
        scenario=theirs.InferenceConfig(
            latency=True,
            memory=False,
            iterations=request["iterations"],
            duration=request["duration_s"],
            input_shapes={"batch_size": 1, "sequence_length": request["prompt"]},
            generate_kwargs={"max_new_tokens": new, "min_new_tokens": new},
        ),
    )
    before_s = time.process_time()
    report = theirs.Benchmark.launch(config).to_dict()
    latencies = {name: target["latency"] for name, target in report.items() if target["latency"]}
    return {"launcher_cpu_s": time.process_time() - before_s, "latency": latencies}


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Versions and threads of this interpreter, once it has imported what the contenders import."""
    import importlib
    import importlib.metadata
    import platform

    import torch

    for module in request["modules"]:
        importlib.import_module(module)
    names = ("torch", "transformers", "optimum-benchmark", "datasets", "accelerate", "tokenizers", "numpy")
    installed = {one.metadata["Name"].replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "libraries": {name: installed[name] for name in names if name in installed},
    }


Work = Callable[[dict[str, Any]], dict[str, Any]]
"""A function of this kind runs in another interpreter: what it uses it imports itself, or PROGRAM does."""

PROGRAM = """import json, sys, time
from pathlib import Path
from typing import Any

{source}
if __name__ == "__main__":
    request, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps({name}(json.loads(request.read_text())), default=float))
"""


def program_of(work: Work) -> str:
    """The text of a program that does this work, from a request file to a result file, without our packages."""
    return PROGRAM.format(source=inspect.getsource(work), name=work.__name__)


def run_inside(python: Path, work: Work, request: Mapping[str, Any]) -> tuple[float, dict[str, Any] | str]:
    """Do this work in a fresh process of that interpreter: its wall seconds, and its result or why there is none.

    The environment is our workers' (offline, quiet), but our packages are not on its path.
    """
    environment = {name: value for name, value in worker_environment(None).items() if name != "PYTHONPATH"}
    environment.update(LOG_TO_FILE="0", LOG_LEVEL="WARNING")
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        program, asked, result = (Path(folder) / name for name in ("program.py", "request.json", "result.json"))
        program.write_text(program_of(work), encoding="utf-8")
        asked.write_text(json.dumps(request), encoding="utf-8")
        start = time.perf_counter()
        command = [str(python), str(program), str(asked), str(result)]
        ended = run_process(command, timeout_s=TIMEOUT_S, environment=environment)
        wall_s = time.perf_counter() - start
        return wall_s, json.loads(result.read_text(encoding="utf-8")) if result.is_file() else ended.verdict()[1]
