"""Every launch of our Triton kernels, compiled for GPUs that are not here: Triton brings NVIDIA's assembler along.

What the compiler makes of a program decides how fast it is, and part of that can be read without a GPU: 16-byte loads,
tensor cores, nothing kept in local memory, the number of instructions a weight.
"""

import inspect
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from quantize.decoding import fused
from quantize.kernels import KERNELS
from quantize.kernels import triton as ours
from quantize.kernels.block_packing import WordsLinear
from quantize.rounding import gptq
from tests.quantize.kernels.test_kernels import CPU, layer

triton = pytest.importorskip("triton", reason="no triton here")

HOPPER, AMPERE = 90, 80
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
ALIGNED = [["tt.divisibility", 16]]
SPILLED_BYTES = 16
"""Float32 sums may leave so much of a thread's registers to memory."""


@dataclass(frozen=True)
class Code:
    """A launch as the compiler made it: PTX, and the lines of the GPU's own instructions."""

    ptx: str
    sass: tuple[str, ...]

    def instructions_in_its_loop(self) -> int:
        """Those between the longest jump back and where it leads."""
        labels = {match[1]: at for at, line in enumerate(self.sass) if (match := re.match(r"\.(L_x_\d+):", line))}
        jumps = [(at, re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)) for at, line in enumerate(self.sass)]
        loops = [self.sass[labels[jump[1]] : at] for at, jump in jumps if jump and labels.get(jump[1], at) < at]
        return max(sum(bool(re.search(r"/\*[0-9a-f]{4}\*/", line)) for line in loop) for loop in loops)


Compile = Callable[[WordsLinear, int, int], Code]
"""(layer, tokens, compute capability) -> the one launch of a program in its forward pass."""


@pytest.fixture
def compile_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compile:
    """Runs a layer's forward pass with every launch of a program compiled in its place; the outputs hold no values."""
    from quantize.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_one(made: WordsLinear, tokens: int, capability: int) -> Code:
        found: list[Code] = []

        class Recorder:
            def __init__(self, program: Any) -> None:
                self.program = program

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **named: found.append(compiled(self.program, args, named, capability, tmp_path))

        with monkeypatch.context() as patch:
            for name in ("matvec_program", "tile_program", "dequantize_program"):
                patch.setattr(triton_kernels, name, Recorder(getattr(triton_kernels, name)))
            made(torch.empty((tokens, made.in_features), dtype=made.dtype))
        (code,) = found
        return code

    return compile_one


def compiled(program: Any, args: tuple[Any, ...], named: dict[str, Any], capability: int, folder: Path) -> Code:
    """A launch with these arguments, through NVIDIA's assembler."""
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
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0:
                attributes[(place,)] = ALIGNED
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "launch.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", str(cubin))
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack, usage
    assert int(stack[1]) <= SPILLED_BYTES
    return Code(made.asm["ptx"], tuple(tool("nvdisasm", "-c", str(cubin)).splitlines()))


def tool(name: str, *arguments: str) -> str:
    """What one of NVIDIA's tools prints; Triton's package holds them."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def prepared(name: str, dtype: torch.dtype, group_size: int = 128) -> WordsLinear:
    made = KERNELS[name].prepare(layer(64, 4096, group_size, "GEMM"), None, CPU, dtype)
    assert isinstance(made, WordsLinear)
    return made


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("warps", [1, 4])
def test_the_mat_vec_loads_16_bytes_at_a_time(
    warps: int, group_size: int, compile_launch: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "processors", lambda device: 132 if warps == 4 else 1)
    ptx = compile_launch(prepared("triton", torch.float16, group_size), 1, HOPPER).ptx
    assert f".reqntid {32 * warps}" in ptx
    assert ptx.count("ld.global.v4.b32") == ours.MATVEC_ROWS + 4  # the words of every row, the inputs of all
    assert ptx.count("ld.global.b8") == ours.MATVEC_ROWS * 128 // group_size  # as few zero points as there are
    assert "cvt.rn.f32.u32" not in ptx  # codes become floats in the `or` that cuts them out


@pytest.mark.parametrize(
    ("out_features", "in_features", "warps"),
    [
        (28672, 4096, 1),
        (6144, 4096, 2),
        (4096, 4096, 2),
        (4096, 14336, 2),
        (1024, 4096, 4),
        (64, 1152, 2),
        (64, 576, 1),
    ],
)
def test_a_mat_vec_fills_the_gpu_with_as_few_warps_a_row_as_it_can(
    out_features: int, in_features: int, warps: int
) -> None:
    programs = out_features // ours.MATVEC_ROWS
    assert ours.warps_a_program(programs, -(-in_features // 128) * 16, 132) == warps


def test_the_mat_vec_has_no_more_instructions_than_a_gpu_has_time_for(compile_launch: Compile) -> None:
    """An H100 reads 3 TB/s, 6e12 weights, and starts 132 * 4 * 32 instructions 1.7e9 times a second: 4.8 a weight."""
    code = compile_launch(prepared("triton", torch.float16), 1, HOPPER)
    assert code.instructions_in_its_loop() / (ours.MATVEC_ROWS * 32) < 4.8


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 6.5), (torch.bfloat16, 8.5)])
@pytest.mark.parametrize(("name", "tokens"), [("triton", 7), ("triton", 32), ("triton", 64), ("triton", 256)])
def test_tiles_run_on_hoppers_tensor_cores(
    name: str, tokens: int, dtype: torch.dtype, most: float, compile_launch: Compile
) -> None:
    code = compile_launch(prepared(name, dtype), tokens, HOPPER)
    assert "wgmma.mma_async" in code.ptx
    assert "cp.async.cg.shared.global" in code.ptx  # the next block is loaded while this one is multiplied
    weights_a_thread = ours.TILE_ROWS * 128 // 128
    assert code.instructions_in_its_loop() / weights_a_thread < most


def test_a_long_prompt_dequantizes_in_16_bytes_at_a_time(compile_launch: Compile) -> None:
    ptx = compile_launch(prepared("triton", torch.float16), 1000, HOPPER).ptx
    assert ptx.count("st.global.v4.b32") == ours.TILE_ROWS * 128 * 2 // 16 // 128  # a thread's share of the tile
    assert ptx.count("ld.global.v4.b32") == ours.TILE_ROWS * 128 // 2 // 16 // 128


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize(
    ("dtype", "group_size", "capability"), [(torch.float32, 32, HOPPER), (torch.bfloat16, 64, AMPERE)]
)
def test_other_dtypes_and_gpus_compile(
    dtype: torch.dtype, group_size: int, capability: int, tokens: int, compile_launch: Compile
) -> None:
    assert compile_launch(prepared("triton", dtype, group_size), tokens, capability).sass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_programs_of_a_decode_step_compile(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = dict[str, Code]()

    def compile_it(program: Any, grid: Any, operands: Any, numbers: Any, **options: Any) -> None:
        made[program.fn.__name__] = compiled(program, (*operands, *numbers), options | ours.FUSED, HOPPER, tmp_path)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused, "launch", compile_it)
    norm = SimpleNamespace(weight=torch.ones(4096, dtype=dtype), variance_epsilon=1e-5)
    fused.fused_norm(norm, torch.zeros((1, 1, 4096), dtype=dtype))
    q, k, angles = (torch.zeros((1, *shape), dtype=dtype) for shape in ((32, 1, 128), (8, 1, 128), (1, 128)))
    fused.fused_rotary(Mock(), q, k, angles, angles)
    fused.fused_write(k, k, torch.zeros(1, dtype=torch.int64), k, k)
    assert {name: "ld.global" in code.ptx for name, code in made.items()} == dict.fromkeys(
        ("norm_program", "rotary_program", "slot_program"), True
    )


def test_the_programs_that_choose_codes_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = list[Code]()

    def compile_it(program: Any, grid: Any, operands: Any, numbers: Any, **options: Any) -> None:
        made.append(compiled(program, (*operands, *numbers), options | ours.FUSED, HOPPER, tmp_path))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gptq, "launch", compile_it)
    monkeypatch.setattr(gptq, "no_programs_reason", lambda device: None)
    columns, square, numbers = torch.ones(64, 128), torch.ones(64, 64), torch.arange(64)
    for table in (torch.ones(1, 128), torch.ones(3, 16)):
        grid = gptq.Grid(64, torch.ones(1, 128), table, has_levels=len(table) == 3)
        gptq._feed_block(columns, columns, square, numbers, grid, columns, columns)
    gptq._descend(columns, columns, columns, square, columns[0], columns[0])
    assert ["fma.rn.f32" in code.ptx for code in made] == [True] * 3
