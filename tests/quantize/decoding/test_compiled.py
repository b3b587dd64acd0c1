"""A compiled decode step: the same tokens as eagerly, compiled once, and one line where it cannot be."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from bench.records.scenario import Scenario
from bench.worker.clock import Clock
from bench.worker.latency import measure_latency
from quantize.decoding.compiled import COMPILED, CompiledDecoder, check_device
from quantize.decoding.static import SLOTS_STEP, check_against_eager
from quantize.errors import UserError
from quantize.loader import load_dummy
from quantize.loading.int4_layers import HalfHead
from quantize.quiet import quiet_libraries
from tests.quantize.decoding.test_static import ONCE, check_same, loaded, prompt_of
from tests.quantize.loading.test_dummy_model import config

__all__ = ["config"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def inductors_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "inductor"


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return loaded(tiny_llama)


@needs_compiler
def test_a_compiled_step_decodes_what_eager_decoding_does_and_is_compiled_once(
    model: Any, capfd: pytest.CaptureFixture[str], inductors_files: Path
) -> None:
    decoder = CompiledDecoder(model, batch=2, positions=SLOTS_STEP)
    assert decoder.name == COMPILED
    assert decoder.compile_s is not None
    made = counters["stats"]["unique_graphs"]
    for tokens in (SLOTS_STEP - 9, 1, 20):
        check_same(decoder, model, prompt_of(model, tokens, batch=2, seed=tokens), 9)
    assert counters["stats"]["unique_graphs"] == made
    assert any(inductors_files.rglob("*.so"))
    assert capfd.readouterr() == ("", "")
    other = CompiledDecoder(model, batch=1, positions=2 * SLOTS_STEP)  # of another shape, in the same process
    check_same(other, model, prompt_of(model, SLOTS_STEP), 9)
    check_same(decoder, model, prompt_of(model, 20, batch=2), 9)


@needs_compiler
def test_int4_layers_and_the_half_precision_head_are_compiled_too(config: Path) -> None:
    loaded = load_dummy(str(config), "awq-gemm", kernel="torch-cpu")
    assert isinstance(loaded.model.get_output_embeddings(), HalfHead)
    prompt = prompt_of(loaded.model, 20)
    decoder = CompiledDecoder(loaded.model, batch=1, positions=30)
    check_against_eager(decoder, loaded.model, prompt, 9, torch.float32)
    found = measure_latency(loaded.model, Scenario("x", 20, 4, mode="compiled"), Clock(), ONCE).latency
    assert found.decode_mode == COMPILED
    assert found.compile_s is not None
    assert found.compile_s > 0


def test_without_a_compiler_it_is_refused_before_anything_is_made(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import exc

    def none(search: object) -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.cpp_compiler_search", none)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler: install g\+\+, or use --mode eager"):
        CompiledDecoder(model, batch=1, positions=30)


def test_on_a_gpu_the_other_mode_is_named() -> None:
    with pytest.raises(UserError, match="mode compiled is for a CPU: on a GPU use --mode graph"):
        check_device(torch.device("cuda"))


@needs_compiler
def test_a_step_that_does_not_compile_is_one_line_and_nothing_printed(
    model: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    outside = torch.compiler.disable(lambda module, inputs, output: output)  # type: ignore[no-untyped-call]
    hook = model.lm_head.register_forward_hook(outside)
    with quiet_libraries(), pytest.raises(UserError, match="a decode step cannot be compiled") as told:
        CompiledDecoder(model, batch=1, positions=30)
    hook.remove()
    assert str(told.value).endswith("use --mode eager")
    assert "\n" not in str(told.value)
    assert capfd.readouterr() == ("", "")
