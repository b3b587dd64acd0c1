"""Every kernel against the dequantized weights in float32, on layers that came through either file layout."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantize.int4.layouts import LAYOUTS
from quantize.int4.packing import PACKERS
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.kernels import KERNELS, autoawq
from quantize.kernels.base import BOUNDS, KernelFault, check_layer, relative_error
from quantize.kernels.torch_int4 import unpack_int4pack

SHAPES = [(64, 128), (192, 576), (80, 256), (208, 384)]
TOKENS = [1, 7, 64, 1025]
CPU = torch.device("cpu")
CPU_KERNELS = ["torch-cpu", "dequantize"]
CUDA_KERNELS = ["triton", "triton-gemv", "autoawq-gemm", "autoawq-gemv"]
INTERPRETED = Path(__file__).parent / "interpreted_triton.py"
ROOT = Path(__file__).parents[3]
INTERPRETED_STEPS = ROOT / "tests" / "quantize" / "decoding" / "interpreted_fused.py"
INTERPRETED_ROUNDING = ROOT / "tests" / "quantize" / "rounding" / "interpreted_programs.py"


def layer(out_features: int, in_features: int, group_size: int, layout: str) -> Int4Weight:
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = round_to_nearest(torch.randn((out_features, in_features), generator=generator) * 0.04, group_size)
    return LAYOUTS[layout].unpack(PACKERS[layout](weight), in_features, {"group_size": group_size}).weight


def applicable(shape: tuple[int, int], group_size: int) -> bool:
    return shape[1] % group_size == 0


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", sorted(PACKERS))
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_cpu_kernels_against_the_reference(name: str, layout: str, group_size: int, tokens: int) -> None:
    for shape in SHAPES:
        if applicable(shape, group_size):
            check_against_reference(name, layer(*shape, group_size, layout), tokens, CPU, torch.float32)


def check_against_reference(
    name: str, weight: Int4Weight, tokens: int, device: torch.device, dtype: torch.dtype
) -> None:
    kernel = KERNELS[name]
    out_features, in_features = weight.codes.shape
    assert kernel.unsupported_reason(weight, device, dtype) is None
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    out = kernel.prepare(weight, bias, device, dtype)(x.to(device).unsqueeze(0))
    assert out.shape == (1, tokens, out_features)
    assert out.dtype == dtype
    assert relative_error(out[0].cpu(), exact) < BOUNDS[kernel.compute_dtype(tokens, dtype)]


def swapped_nibbles(weight: Int4Weight) -> Int4Weight:
    pairs = weight.codes.view(weight.codes.shape[0], -1, 2)
    return Int4Weight(pairs.flip(-1).reshape(weight.codes.shape), weight.scales, weight.zeros)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_the_gate_catches_a_swapped_nibble_order(name: str) -> None:
    check_the_gate(name, layer(64, 128, 64, "GEMM"))


def check_the_gate(name: str, weight: Int4Weight, dtype: torch.dtype = torch.float32) -> None:
    kernel = KERNELS[name]
    check_layer(kernel, kernel.prepare(weight, None, CPU, dtype), weight, CPU, dtype)
    faulty = kernel.prepare(swapped_nibbles(weight), None, CPU, dtype)
    rows, columns = weight.codes.shape
    with pytest.raises(KernelFault, match=f"the kernel {name} is wrong by .* on a layer of {rows} x {columns}"):
        check_layer(kernel, faulty, weight, CPU, dtype)


INTERPRETED_PARTS = {
    "mat-vec": [str(INTERPRETED), "-k", "triton-gemv"],
    "tiles": [str(INTERPRETED), "-k", "not triton-gemv"],
    "decode step": [str(INTERPRETED_STEPS)],
    "rounding": [str(INTERPRETED_ROUNDING)],
}

Running = dict[str, tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture(scope="module")
def interpreters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """All parts at once, each in a process of its own and with its output in a file.

    Triton decides at its import whether to interpret.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = {}
    for part, arguments in INTERPRETED_PARTS.items():
        output = tmp_path_factory.mktemp("interpreted") / "output.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        with output.open("wb") as file:
            started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        running[part] = started, output
    yield running
    for started, _ in running.values():
        started.kill()
        started.wait()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
@pytest.mark.parametrize("part", INTERPRETED_PARTS)
def test_triton_kernels_in_the_interpreter(part: str, interpreters: Running) -> None:
    started, output = interpreters[part]
    code = started.wait()
    printed = output.read_text()[-3000:]
    assert code == 0, printed
    assert re.search(r"\b[1-9]\d* passed", printed), printed


def test_the_gate_catches_what_is_not_finite() -> None:
    weight, kernel = layer(64, 128, 64, "GEMM"), KERNELS["dequantize"]
    broken = Int4Weight(weight.codes, torch.full_like(weight.scales, torch.nan), weight.zeros)
    with pytest.raises(KernelFault, match="wrong by inf"):
        check_layer(kernel, kernel.prepare(broken, None, CPU, torch.float32), weight, CPU, torch.float32)


@pytest.mark.parametrize("out_features", [16, 48, 64, 80, 576, 1008])
def test_unpacking_torchs_int4_bytes(out_features: int) -> None:
    codes = torch.randint(0, 16, (out_features, 64), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    assert torch.equal(unpack_int4pack(packed, 64).t().to(torch.int32), codes)


def test_the_name_follows_the_number_of_tokens() -> None:
    describe = KERNELS["torch-cpu"].describe
    assert "int4" in describe(1, torch.float32)
    assert "dequantize" in describe(1024, torch.float32)


def test_kernels_say_why_they_cannot_run() -> None:
    weight = layer(64, 128, 64, "GEMM")
    assert KERNELS["autoawq-gemm"].unsupported_reason(weight, CPU, torch.float32) == "runs on CUDA"
    odd = Int4Weight(weight.codes[:24], weight.scales[:24], weight.zeros[:24])
    assert "sixteens" in str(KERNELS["torch-cpu"].unsupported_reason(odd, CPU, torch.float32))


def test_what_a_gpu_kernel_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, weight = torch.device("cuda"), layer(64, 576, 64, "GEMM")

    def reason(name: str, given: Int4Weight = weight) -> str | None:
        return KERNELS[name].unsupported_reason(given, cuda, torch.float16)

    assert "needs groups of 32, 64 or a multiple of 128" in str(
        reason("triton", round_to_nearest(torch.randn(64, 576), 96))
    )
    monkeypatch.setattr(autoawq, "compiled_kernels", lambda: False)
    assert reason("autoawq-gemv") == "needs the package autoawq-kernels"
    assert KERNELS["autoawq-gemm"].describe(1024, torch.float16) == "autoawq Triton dequantize + matmul (float16)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert reason("triton") == "needs the package triton"
    assert reason("autoawq-gemm") == "needs the package autoawq"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else name)
    assert reason("autoawq-gemm") == "needs the package autoawq-kernels or triton"
    monkeypatch.setattr(autoawq, "compiled_kernels", lambda: True)
    assert reason("autoawq-gemm") is None
    assert KERNELS["autoawq-gemv"].describe(9, torch.float16) == "autoawq compiled GEMV layout GEMM (float16)"


@pytest.mark.parametrize(
    ("name", "shape", "group_size", "why"),
    [
        ("autoawq-gemm", (512, 1024), 128, None),
        ("autoawq-gemm", (80, 256), 64, "needs output features in multiples of 64, the layer has 80"),
        ("autoawq-gemm", (64, 128), 128, "needs output features in multiples of 128, the layer has 64"),
        ("autoawq-gemv", (512, 1024), 128, None),
        ("autoawq-gemv", (80, 256), 64, "needs output features in multiples of 64, the layer has 80"),
        ("autoawq-gemv", (64, 256), 32, "needs groups of 64 or 128, the layer has 32"),
        ("autoawq-gemv", (64, 128), 64, "needs input features in multiples of 256, the layer has 128"),
    ],
)
def test_what_autoawqs_compiled_kernels_cannot_run_is_told(
    name: str, shape: tuple[int, int], group_size: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.kernels.autoawq.compiled_kernels", lambda: True)
    weight = layer(*shape, group_size, "GEMM")
    assert KERNELS[name].unsupported_reason(weight, torch.device("cuda"), torch.float16) == why


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", sorted(PACKERS))
@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_cuda_kernels_against_the_reference(name: str, layout: str, group_size: int, tokens: int) -> None:
    cuda = torch.device("cuda")
    for shape in [(512, 1024), *SHAPES]:
        weight = layer(*shape, group_size, layout) if applicable(shape, group_size) else None
        reason = "does not divide" if weight is None else KERNELS[name].unsupported_reason(weight, cuda, torch.float16)
        if weight is not None and reason is None:
            for _ in range(2):  # the second time our programs are launched without Triton's look at the arguments
                check_against_reference(name, weight, tokens, cuda, torch.float16)
        elif shape == (512, 1024):
            pytest.skip(str(reason))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_the_gate_catches_a_swapped_nibble_order_on_cuda(name: str) -> None:
    cuda, kernel, weight = torch.device("cuda"), KERNELS[name], layer(512, 1024, 128, "GEMM")
    if reason := kernel.unsupported_reason(weight, cuda, torch.float16):
        pytest.skip(reason)
    check_layer(kernel, kernel.prepare(weight, None, cuda, torch.float16), weight, cuda, torch.float16)
    with pytest.raises(KernelFault):
        check_layer(
            kernel, kernel.prepare(swapped_nibbles(weight), None, cuda, torch.float16), weight, cuda, torch.float16
        )
