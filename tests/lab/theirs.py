"""optimum-benchmark, run in an interpreter that has it and none of our packages.

`python -P theirs.py REQUEST RESULT`: RESULT gets {"facts"} of the interpreter and, unless REQUEST is {}, what was
measured. -P, for beside this file there is another optimum_benchmark.
"""

import importlib.metadata
import json
import platform
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "optimum-benchmark", "datasets", "accelerate", "tokenizers", "numpy")


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """optimum-benchmark through its Python interface; everything not named here has its default.

    Its process launcher polls without a pause until the measuring process is done. With `asleep` the same call waits in
    the kernel; nothing else differs. launcher_cpu_s: processor seconds of this process, which only waits.
    """
    import optimum_benchmark as theirs  # type: ignore[import-not-found]

    if request["asleep"]:
        poll = Connection.poll
        Connection.poll = lambda self, timeout=0.2: poll(self, timeout)  # type: ignore[method-assign]
    model = {"model": request["model"], "seed": request["seed"], "device": "cpu", "torch_dtype": "float32"}
    work = {"latency": True, "memory": False, "iterations": request["iterations"], "duration": request["duration_s"]}
    work["input_shapes"] = {"batch_size": 1, "sequence_length": request["prompt"]}
    work["generate_kwargs"] = {"max_new_tokens": request["new"], "min_new_tokens": request["new"]}
    config = theirs.BenchmarkConfig(
        name="side_by_side",
        launcher=theirs.ProcessConfig(),
        backend=theirs.PyTorchConfig(task="text-generation", **model),
        scenario=theirs.InferenceConfig(**work),
    )
    before_s = time.process_time()
    report = theirs.Benchmark.launch(config).to_dict()
    latencies = {name: target["latency"] for name, target in report.items() if target["latency"]}
    return {"launcher_cpu_s": time.process_time() - before_s, "latency": latencies}


def facts() -> dict[str, Any]:
    """Versions and threads of this interpreter, once it has imported what is measured."""
    import optimum_benchmark.backends.pytorch.backend  # type: ignore[import-not-found]
    import optimum_benchmark.launchers.process.launcher  # type: ignore[import-not-found]
    import optimum_benchmark.scenarios.inference.scenario  # type: ignore[import-not-found] # noqa: F401
    import torch

    installed = {one.metadata["Name"].replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    found = {name: installed[name] for name in LIBRARIES if name in installed}
    return {"python": platform.python_version(), "torch_threads": torch.get_num_threads(), "libraries": found}


if __name__ == "__main__":
    asked, result = (Path(name) for name in sys.argv[1:])
    request = json.loads(asked.read_text())
    result.write_text(json.dumps(measured(request) if request else facts(), default=float))
