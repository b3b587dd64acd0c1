"""Every kernel against the dequantized weights in float32, on layers that came through either file layout."""

import pytest
import torch
from torch import Tensor

from quantize.awq.int4 import Int4Weight, round_to_nearest
from quantize.awq.packing import PACKERS, UNPACKERS
from quantize.kernels import KERNELS
from quantize.kernels.torch_cpu import LONG_PROMPT_TOKENS, unpack_int4pack

SHAPES = [(64, 128), (192, 576), (80, 256), (208, 384)]
TOKENS = [1, 7, 64, 1025]
CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def layer(out_features: int, in_features: int, group_size: int, layout: str) -> Int4Weight:
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = round_to_nearest(torch.randn((out_features, in_features), generator=generator) * 0.04, group_size)
    return UNPACKERS[layout](PACKERS[layout](weight), in_features, group_size)


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def applicable(shape: tuple[int, int], group_size: int) -> bool:
    return shape[1] % group_size == 0


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", sorted(PACKERS))
@pytest.mark.parametrize("name", ["torch-cpu", "dequantize"])
def test_cpu_kernels_against_the_reference(name: str, layout: str, group_size: int, tokens: int) -> None:
    kernel = KERNELS[name]
    for shape in SHAPES:
        if not applicable(shape, group_size):
            continue
        weight = layer(*shape, group_size, layout)
        assert kernel.why_not(weight, CPU, torch.float32) is None
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
        exact = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
        out = kernel.prepare(weight, bias, CPU, torch.float32)(x.unsqueeze(0))
        assert out.shape == (1, tokens, shape[0])
        assert out.dtype == torch.float32
        half = name == "torch-cpu" and tokens < LONG_PROMPT_TOKENS
        assert relative_error(out[0], exact) < BOUNDS[torch.bfloat16 if half else torch.float32]


def test_a_planted_fault_is_seen() -> None:
    weight = layer(64, 128, 64, "GEMM")
    swapped = Int4Weight(weight.codes.view(64, -1, 2).flip(-1).reshape(64, 128), weight.scales, weight.zeros)
    x = torch.randn(3, 128)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    for kernel in (KERNELS["torch-cpu"], KERNELS["dequantize"]):
        assert relative_error(kernel.prepare(swapped, None, CPU, torch.float32)(x), exact) > 0.5


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
    assert KERNELS["torch-cuda"].why_not(weight, CPU, torch.float32) == "runs on CUDA"
    assert KERNELS["autoawq-gemm"].why_not(weight, CPU, torch.float32) == "runs on CUDA"
    odd = Int4Weight(weight.codes[:24], weight.scales[:24], weight.zeros[:24])
    assert "sixteens" in str(KERNELS["torch-cpu"].why_not(odd, CPU, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("name", ["autoawq-gemm", "torch-cuda"])
def test_cuda_kernels_against_the_reference(name: str, group_size: int, tokens: int) -> None:
    kernel, cuda = KERNELS[name], torch.device("cuda")
    weight = layer(512, 1024, group_size, "GEMM")
    if reason := kernel.why_not(weight, cuda, torch.float16):
        pytest.skip(reason)
    x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(tokens))
    exact = x.double() @ weight.dequantize(torch.float64).t()
    out = kernel.prepare(weight, None, cuda, torch.float16)(x.to(cuda, torch.float16).unsqueeze(0))
    assert relative_error(out[0].cpu(), exact) < BOUNDS[torch.float16]
