"""The ways to run a linear layer that `tests.lab.crossover` races: dense, every int4 kernel, bitsandbytes."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.int4.weight import round_to_nearest
from quantize.kernels import KERNELS, Kernel
from quantize.kernels.base import BOUNDS, dtype_name
from quantize.methods.bnb import bnb_linear, bnb_tensors
from quantize.rounding.options import BnbOptions
from quantize.variant import VARIANTS
from tests.lab.records import Style

INT8_BOUND = 2e-2
"""LLM.int8 rounds the activations too, to 127 steps of a row's largest magnitude m. That makes an error of
m / 127 / sqrt(12) against normal values of spread 1; m is 3.4 to 4.7 for rows of 4,096 and 14,336 values, so the error
is 0.8 to 1.1%, and twice that is allowed."""

DENSE_NAMES = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}


class CannotRun(Exception):  # noqa: N818 - it is an answer, not an error
    """A contender cannot run this layer here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """Where and in what the layers compute; group_size: of the weights in AWQ's format."""

    device: torch.device
    dtype: torch.dtype
    group_size: int


Built = tuple[nn.Module, Tensor]  # a linear layer ready to run, and the weight [out, in] that it stands for, in float32


@dataclass(frozen=True)
class Contender:
    """A way to run a linear layer.

    build:  (float32 weight [out, in] on the device, setting) -> the layer; raises CannotRun with the reason.
    kernel, bound: (tokens, setting) -> what runs, as tables name it; the relative error that its arithmetic may make.
    replayable: whether a CUDA graph can hold it: not where the host looks at values on the device.
    """

    name: str
    style: Style
    build: Callable[[Tensor, Setting], Built]
    kernel: Callable[[int, Setting], str]
    bound: Callable[[int, Setting], float]
    replayable: bool = True


def contenders(dtype: torch.dtype) -> list[Contender]:
    """All of them, the dense one first."""
    return [dense(dtype), *map(int4, KERNELS.values()), bnb("bnb-4bit"), bnb("bnb-8bit")]


def dense(dtype: torch.dtype) -> Contender:
    """torch's own matrix product in the compute dtype: what all others are compared with."""

    def build(weight: Tensor, setting: Setting) -> Built:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        return module, module.weight.float()

    kernel = f"torch ({dtype_name(dtype)})"
    return Contender(DENSE_NAMES[dtype], "dense", build, lambda tokens, setting: kernel, lambda t, s: BOUNDS[dtype])


def int4(kernel: Kernel) -> Contender:
    """One of the kernels for weights in AWQ's format, which are rounded to nearest here."""

    def build(weight: Tensor, setting: Setting) -> Built:
        rounded = round_to_nearest(weight, setting.group_size)
        if (reason := kernel.unsupported_reason(rounded, setting.device, setting.dtype)) is not None:
            raise CannotRun(reason)
        return kernel.prepare(rounded, None, setting.device, setting.dtype), rounded.dequantize()

    def bound(tokens: int, setting: Setting) -> float:
        return BOUNDS[kernel.compute_dtype(tokens, setting.dtype)]

    return Contender(kernel.name, kernel.style, build, lambda t, setting: kernel.describe(t, setting.dtype), bound)


def bnb(name: str) -> Contender:
    """bitsandbytes' own layer of this variant."""
    variant = VARIANTS[name]
    is_int8 = variant.w_bit == 8

    def build(weight: Tensor, setting: Setting) -> Built:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise CannotRun("needs the package bitsandbytes")
        from bitsandbytes import functional

        tensors = bnb_tensors("linear", weight.to(setting.dtype), variant, BnbOptions())
        module: Any = bnb_linear("linear", tensors, (weight.shape[0], weight.shape[1]), setting.device, setting.dtype)
        codes = tensors["linear.weight"]
        if is_int8:
            return module, codes.float() * (tensors["linear.SCB"].float() / 127).unsqueeze(1)
        return module, functional.dequantize_4bit(codes, module.weight.quant_state).float()

    def kernel(tokens: int, setting: Setting) -> str:
        return f"bitsandbytes {'int8' if is_int8 else BnbOptions().quant_type} ({dtype_name(setting.dtype)})"

    def bound(tokens: int, setting: Setting) -> float:
        """On a CPU bitsandbytes multiplies 4-bit weights in bfloat16 where that is fast, whatever the compute dtype."""
        on_cpu = setting.device.type == "cpu"
        return INT8_BOUND if is_int8 else BOUNDS[torch.bfloat16 if on_cpu else setting.dtype]

    return Contender(f"BnB.{variant.w_bit}", "bitsandbytes", build, kernel, bound, replayable=not is_int8)
