from pathlib import Path

import pytest
import torch

import bench.run.probe
from bench.run.executor import ProcessResult
from bench.run.probe import look, probe
from quantize.errors import UserError
from quantize.versions import version_of


def test_a_look_at_this_machine() -> None:
    machine = look("cpu")
    assert machine is not None
    assert machine.device == "cpu"
    assert machine.environment.cpu_dtype in ("float32", "bfloat16")
    assert set(machine.environment.matmul_probe_s or {}) == {"float32", "bfloat16"}
    assert (machine.environment.copy_bytes_per_s or 0) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    machine = look("auto")
    assert machine is not None
    assert machine.device == "cpu"
    with pytest.raises(UserError, match=r"no CUDA device here: use --device cpu, or install"):
        probe("cuda", None)


def test_the_process_sees_what_a_worker_will_see() -> None:
    machine = probe("cpu", 1)
    assert machine.environment.torch_threads == 1
    assert machine.environment.libraries["torch"] == version_of("torch")


def replace_process(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    def run_module(*command: str, timeout_s: float, threads: int | None) -> ProcessResult:
        assert not Path(command[-1]).exists()
        return ProcessResult(1, output, timeout_s)

    monkeypatch.setattr(bench.run.probe, "run_module", run_module)


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_process(monkeypatch, "ModuleNotFoundError: No module named 'torch'")
    with pytest.raises(UserError, match=r"bench needs torch: install it with `pip install 'quantable\[models\]'`"):
        probe("auto", None)


def test_any_other_failure_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_process(monkeypatch, "ImportError: libcudart.so.12")
    with pytest.raises(RuntimeError, match=r"libcudart\.so\.12"):
        probe("auto", None)
