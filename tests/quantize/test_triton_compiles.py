"""Every launch of our Triton kernels, compiled for GPUs that are not here: Triton brings NVIDIA's assembler along.

What the compiler makes of a program decides how fast it is, and part of that can be read without a GPU: 16-byte loads,
tensor cores, nothing kept in local memory.
"""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.kernels import KERNELS, triton_words
from quantize.kernels.words import WordsLinear
from tests.quantize.test_kernels import CPU, layer

triton = pytest.importorskip("triton", reason="no triton here")

HOPPER, AMPERE = 90, 80
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8"}
ALIGNED = [["tt.divisibility", 16]]
Compile = Callable[[WordsLinear, int, int], str]
"""(layer, tokens, compute capability) -> the PTX of its launches."""


@pytest.fixture
def compile_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compile:
    """Runs a layer's forward pass with every launch of a program compiled in its place; the outputs hold no values."""
    from quantize.kernels import triton_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")

    def compile_all(made: WordsLinear, tokens: int, capability: int) -> str:
        ptx = []

        class Recorder:
            def __init__(self, program: Any) -> None:
                self.program = program

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **named: ptx.append(compiled(self.program, args, named, capability))

        with monkeypatch.context() as patch:
            for name in ("matvec_program", "tile_program", "dequantize_program"):
                patch.setattr(triton_programs, name, Recorder(getattr(triton_programs, name)))
            made(torch.empty((tokens, made.in_features), dtype=made.dtype))
        assert ptx
        return "".join(ptx)

    return compile_all


def compiled(program: Any, args: tuple[Any, ...], named: dict[str, Any], capability: int) -> str:
    """The PTX of a launch with these arguments; its assembler ran as well."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = inspect.signature(program.fn).parameters
    options = {name: value for name, value in named.items() if name not in parameters}
    bound = inspect.signature(program.fn).bind(*args, **{k: v for k, v in named.items() if k in parameters}).arguments
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(bound.items()):
        if parameters[name].annotation is not inspect.Parameter.empty:
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = f"*{TYPES[value.dtype]}", ALIGNED
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = ALIGNED
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    ptx: str = made.asm["ptx"]
    assert stack_bytes(made.asm["cubin"]) <= 16
    return ptx


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps in local memory, because its registers do not suffice."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", told)
    assert found, told
    return int(found[1])


def prepared(name: str, dtype: torch.dtype, group_size: int = 128) -> WordsLinear:
    made = KERNELS[name].prepare(layer(64, 4096, group_size, "GEMM"), None, CPU, dtype)
    assert isinstance(made, WordsLinear)
    return made


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("warps", [1, 4])
def test_the_mat_vec_loads_16_bytes_at_a_time(
    warps: int, group_size: int, compile_launches: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_words, "processors", lambda device: 132 if warps == 4 else 1)
    ptx = compile_launches(prepared("triton", torch.float16, group_size), 1, HOPPER)
    assert f".reqntid {32 * warps}" in ptx
    assert ptx.count("ld.global.v4.b32") >= triton_words.MATVEC_ROWS + 4  # the words of every row, the inputs of all
    assert ptx.count("ld.global.b8") == triton_words.MATVEC_ROWS * 128 // group_size  # as few zero points as there are
    assert "cvt.rn.f32.u32" not in ptx  # codes become floats in the `or` that cuts them out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "tokens"), [("triton", 7), ("triton", 32), ("triton", 64), ("triton-tiles", 1000)])
def test_tiles_run_on_hoppers_tensor_cores(
    name: str, tokens: int, dtype: torch.dtype, compile_launches: Compile
) -> None:
    ptx = compile_launches(prepared(name, dtype), tokens, HOPPER)
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx  # the next block is loaded while this one is multiplied


def test_a_long_prompt_dequantizes_in_16_bytes_at_a_time(compile_launches: Compile) -> None:
    ptx = compile_launches(prepared("triton", torch.float16), 1000, HOPPER)
    assert ptx.count("st.global.v4.b32") == 4 * triton_words.COPY_ROWS
    assert ptx.count("ld.global.v4.b32") == triton_words.COPY_ROWS


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize(
    ("dtype", "group_size", "capability"), [(torch.float32, 32, HOPPER), (torch.bfloat16, 64, AMPERE)]
)
def test_other_dtypes_and_gpus_compile(
    dtype: torch.dtype, group_size: int, capability: int, tokens: int, compile_launches: Compile
) -> None:
    for name in ("triton", "triton-tiles"):
        compile_launches(prepared(name, dtype, group_size), tokens, capability)
