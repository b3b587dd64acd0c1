"""bitsandbytes checkpoints, made one weight at a time: 4-bit (nf4, fp4) and 8-bit (LLM.int8).

The tensors come from bitsandbytes' functional interface and go straight to disk. Saving a model is no way to
get them: on some CPUs a forward pass repacks its 4-bit weights in place, and what is saved afterwards is not
what was quantized.
"""

from collections.abc import Mapping
from typing import Any

import torch

from quantize.quiet import quiet_libraries
from quantize.rounding.gptq import gptq_round
from quantize.rounding.options import BnbOptions
from quantize.source import check_finite
from quantize.variant import Variant

INT8_THRESHOLD = 6.0
"""LLM.int8 multiplies input features with a larger magnitude in half precision: transformers' default."""


def bnb_tensors(name: str, weight: torch.Tensor, variant: Variant, options: BnbOptions) -> dict[str, torch.Tensor]:
    """The state-dict entries of one linear layer, as transformers reads them from a bitsandbytes checkpoint.

    name: the layer's full name, without ".weight". weight: [out, in], float16, bfloat16 or float32, on any
    device; the entries are on that device.

    bnb-4bit: `.weight` (uint8 [out * in / 2, 1]), `.weight.absmax`, `.weight.quant_map`,
    `.weight.quant_state.bitsandbytes__*` and, with double quantization, `.weight.nested_*`.
    bnb-8bit: `.weight` (int8 [out, in], from float16), `.SCB` (float32 [out], the largest magnitude of each
    row), and `.weight_format` (0, row-major); a weight is `.weight * .SCB / 127`.

    Raises UserError when a weight is not finite, or for bnb-8bit not finite in float16.
    """
    check_finite(f"{name}.weight", weight)
    with quiet_libraries():
        return _int8_tensors(name, weight) if variant.w_bit == 8 else _int4_tensors(name, weight, options)


def bnb_linear(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> torch.nn.Module:
    """bitsandbytes' own layer around what `bnb_tensors` gave for a weight of this shape, (out, in).

    tensors and bias [out] are on the device; the tensors become the layer's and are not copied.
    """
    from bitsandbytes import nn as bnb_nn

    out_features, in_features = shape
    quantized = tensors[f"{name}.weight"]
    layer: Any
    if (scales := tensors.get(f"{name}.SCB")) is not None:
        layer = bnb_nn.Linear8bitLt(
            in_features,
            out_features,
            bias=bias is not None,
            has_fp16_weights=False,
            threshold=INT8_THRESHOLD,
            device="meta",
        )
        layer.weight = bnb_nn.Int8Params(
            quantized, requires_grad=False, has_fp16_weights=False, CB=quantized, SCB=scales
        )
    else:
        layer = bnb_nn.Linear4bit(
            in_features, out_features, bias=bias is not None, compute_dtype=compute_dtype, device="meta"
        )
        beside = f"{name}.weight."
        stats = {key.removeprefix(beside): value for key, value in tensors.items() if key.startswith(beside)}
        layer.weight = bnb_nn.Params4bit.from_prequantized(quantized, stats, device=device, module=layer)
        layer.compute_type_is_set = True
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    made: torch.nn.Module = layer
    return made


def _int8_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from bitsandbytes import functional

    half = weight.to(torch.float16).contiguous()
    check_finite(f"{name}.weight, rounded to float16,", half)
    quantized, row_maxima, _ = functional.int8_vectorwise_quant(half)
    row_major = torch.tensor(0, dtype=torch.uint8, device=weight.device)
    return {f"{name}.weight": quantized, f"{name}.SCB": row_maxima, f"{name}.weight_format": row_major}


def _int4_tensors(name: str, weight: torch.Tensor, options: BnbOptions) -> dict[str, torch.Tensor]:
    return _int4_entries(name, *_quantize_4bit(weight, options))


def _quantize_4bit(weight: torch.Tensor, options: BnbOptions) -> tuple[torch.Tensor, Any]:
    """bitsandbytes' own: the packed codes, two a byte, and its QuantState."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        blocksize=options.blocksize,
        compress_statistics=options.double_quant,
        quant_type=options.quant_type,
    )
    return packed, state


def _int4_entries(name: str, packed: torch.Tensor, state: Any) -> dict[str, torch.Tensor]:
    entries = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {f"{name}.weight": packed, **entries}


def bnb_quantization_config(variant: Variant, options: BnbOptions) -> dict[str, Any]:
    """What config.json says under `quantization_config`: transformers' own BitsAndBytesConfig, as JSON.

    The block size is not in it: bitsandbytes keeps it beside each 4-bit weight.
    """
    with quiet_libraries():
        from transformers import BitsAndBytesConfig

        if variant.w_bit == 8:
            config = BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=options.quant_type,
                bnb_4bit_use_double_quant=options.double_quant,
                bnb_4bit_compute_dtype=torch.float16,
            )
        return dict(config.to_dict())


def bnb_4bit_with_feedback(
    weights: Mapping[str, torch.Tensor], gram: torch.Tensor, options: BnbOptions
) -> dict[str, torch.Tensor]:
    """The bnb-4bit entries of linear layers that share one input, rounded with error feedback (arXiv 2210.17323).

    weights: [out_k, in] by full name, without ".weight"; gram: float32 [in, in] of the input. The blocks' scales are
    bitsandbytes' own; only which of the 16 values a weight becomes differs from bitsandbytes' nearest. Layers whose
    rows are no whole number of blocks are rounded to nearest.
    """
    names = list(weights)
    for name in names:
        check_finite(f"{name}.weight", weights[name])
    with quiet_libraries():
        quantized = {name: _quantize_4bit(weights[name], options) for name in names}
        plain = {name: _int4_entries(name, *quantized[name]) for name in names}
    if gram.shape[0] % options.blocksize:
        return {key: tensor for tensors in plain.values() for key, tensor in tensors.items()}
    scales = torch.cat([_block_scales(quantized[name][1], weights[name].shape[0]) for name in names]).t().contiguous()
    codebook = plain[names[0]][f"{names[0]}.weight.quant_map"].float()
    levels, order = codebook.sort()
    midpoints = (levels[1:] + levels[:-1]) / 2

    def nearest(column: int, values: torch.Tensor, code: torch.Tensor, error: torch.Tensor) -> None:
        scale = scales[column // options.blocksize]
        rank = torch.bucketize(values / scale, midpoints)
        torch.addcmul(values, levels[rank], scale, value=-1, out=error)
        code.copy_(order[rank])

    rows = torch.cat([weights[name].float() for name in names])
    codes = gptq_round(rows, gram, nearest).view(torch.uint8)
    entries: dict[str, torch.Tensor] = {}
    for name, own in zip(names, torch.split(codes, [weights[name].shape[0] for name in names]), strict=True):
        pairs = own.view(-1, 2)
        packed = (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous()
        entries |= {**plain[name], f"{name}.weight": packed}
    return entries


def _block_scales(state: Any, rows: int) -> torch.Tensor:
    """What bitsandbytes multiplies each block of a row with, read back: float32 [rows, in / blocksize]."""
    from bitsandbytes import functional

    scales: torch.Tensor = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float().view(rows, -1).clamp(min=torch.finfo(torch.float32).tiny)
