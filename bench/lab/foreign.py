"""What runs in another interpreter, one with optimum-benchmark: the sources of these functions, without the rest."""

import inspect
import itertools
import json
import subprocess
import sys
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

    from optimum_benchmark import (  # type: ignore[import-not-found]
        Benchmark,
        BenchmarkConfig,
        InferenceConfig,
        InlineConfig,
        ProcessConfig,
        PyTorchConfig,
    )

    if request.get("asleep"):
        poll = Connection.poll
        Connection.poll = lambda self, timeout=0.2: poll(self, timeout)  # type: ignore[method-assign]
    new = request["new"]
    config = BenchmarkConfig(
        name="side_by_side",
        launcher=InlineConfig() if request["launcher"] == "inline" else ProcessConfig(),
        backend=PyTorchConfig(
            model=request["model"], device="cpu", torch_dtype="float32", task="text-generation", seed=request["seed"]
        ),
        scenario=InferenceConfig(
            latency=True,
            memory=False,
            iterations=request["iterations"],
            duration=request["duration_s"],
            input_shapes={"batch_size": 1, "sequence_length": request["prompt"]},
            generate_kwargs={"max_new_tokens": new, "min_new_tokens": new},
        ),
    )
    before_s = time.process_time()
    report = Benchmark.launch(config).to_dict()
    latencies = {name: target["latency"] for name, target in report.items() if target["latency"]}
    return {"launcher_cpu_s": time.process_time() - before_s, "latency": latencies}


def bare(request: dict[str, Any]) -> dict[str, Any]:
    """`model.generate` as optimum-benchmark calls it, in this process, with nothing around it.

    busy: beside a process that keeps one core busy all along, as a launcher that polls does.
    """
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

    marks: list[float] = []

    class Mark(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            marks.append(time.perf_counter())
            return scores

    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).eval()
    drawn = torch.Generator().manual_seed(request["seed"])
    prompt = torch.randint(0, model.config.vocab_size, (1, request["prompt"]), generator=drawn)
    new, prefill_s, decode_s = request["new"], [], []
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if request.get("busy") else None
    try:
        for number in range(2 + request["iterations"]):
            marks.clear()
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    logits_processor=LogitsProcessorList([Mark()]),
                )
            if number >= 2:
                prefill_s.append(marks[0] - start)
                decode_s.append([end - begin for begin, end in itertools.pairwise(marks)])
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    return {"prefill_s": prefill_s, "decode_s": decode_s}


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


def answer(work: Callable[[dict[str, Any]], dict[str, Any]], paths: list[str]) -> None:
    """Do what the request file asks and write the result file."""
    request_path, result_path = paths
    result = work(json.loads(Path(request_path).read_text()))
    Path(result_path).write_text(json.dumps(result, default=float))


WORKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"launched": launched, "bare": bare, "facts": facts}


def script_of(work: str) -> str:
    """The text of a program that does one of WORKS and needs none of our packages."""
    imports = (
        "import itertools, json, subprocess, sys, time\nfrom pathlib import Path\nfrom typing import Any, Callable\n"
    )
    sources = "\n\n".join(inspect.getsource(function) for function in (WORKS[work], answer))
    return f"{imports}\n\n{sources}\n\nif __name__ == '__main__':\n    answer({work}, sys.argv[1:])\n"


def run_inside(python: Path | str, work: str, request: Mapping[str, Any]) -> tuple[float, dict[str, Any] | str]:
    """Run one of WORKS in a fresh process of that interpreter: its wall seconds, and its result or why there is none.

    The environment is our workers' (offline, quiet), but our packages are not on its path.
    """
    environment = {name: value for name, value in worker_environment(None).items() if name != "PYTHONPATH"}
    environment.update(LOG_TO_FILE="0", LOG_LEVEL="WARNING")
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        script, asked, result = (Path(folder) / name for name in ("script.py", "request.json", "result.json"))
        script.write_text(script_of(work), encoding="utf-8")
        asked.write_text(json.dumps(dict(request)), encoding="utf-8")
        start = time.perf_counter()
        ended = run_process(
            [str(python), str(script), str(asked), str(result)], timeout_s=TIMEOUT_S, environment=environment
        )
        wall_s = time.perf_counter() - start
        if result.is_file():
            return wall_s, json.loads(result.read_text(encoding="utf-8"))
    return wall_s, ended.verdict()[1]
