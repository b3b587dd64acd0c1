"""bitsandbytes: 4-bit (nf4, fp4) and 8-bit (LLM.int8), one weight at a time, by bitsandbytes' functional interface."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.dummy import DummyWeights, fill
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Running
from quantize.methods.base import Choices, Kernels, LayerInputs, Method, Recipe, Tensors, half
from quantize.methods.quantized_run import QuantizedRun
from quantize.model.names import linear_layers
from quantize.model.pretrained import bring_to, config_of, model_of
from quantize.quiet import quiet_libraries
from quantize.rounding.correction import Some, Watched, correct_rows
from quantize.rounding.gptq import Grid, Target, gptq_round
from quantize.rounding.gram import SHRINKAGE, InputStats
from quantize.rounding.options import BnbOptions
from quantize.variant import Variant
from quantize.weights import check_finite

AVX512_ROWS = 32  # of a weight that bitsandbytes packs together for AVX-512, each a whole number of blocks
INT8_THRESHOLD = 6.0  # LLM.int8 multiplies larger input features in half precision: transformers' default


def bnb_tensors(name: str, weight: Tensor, variant: Variant, options: BnbOptions) -> Tensors:
    """The state-dict entries of one linear layer, as transformers reads them from a bitsandbytes checkpoint.

    name: in full, without ".weight"; weight: [out, in], float16, bfloat16 or float32; the entries are on its device.

    bnb-4bit: `.weight` (uint8 [out * in / 2, 1]), `.weight.absmax`, `.weight.quant_map`,
    `.weight.quant_state.bitsandbytes__*` and, with double quantization, `.weight.nested_*`.
    bnb-8bit: `.weight` (int8 [out, in], from float16), `.SCB` (float32 [out], the largest magnitude of each
    row), and `.weight_format` (0, row-major); a weight is `.weight * .SCB / 127`.

    Raises UserError when a weight is not finite, or for bnb-8bit not finite in float16."""
    check_finite(f"{name}.weight", weight)
    with quiet_libraries():
        if variant.w_bit == 4:
            return _in_4bit(name, weight, options)[0]
        from bitsandbytes import functional

        rounded = half(f"{name}.weight", weight, torch.float16).contiguous()
        codes, row_maxima, _ = functional.int8_vectorwise_quant(rounded)
        row_major = torch.tensor(0, dtype=torch.uint8, device=weight.device)
        return {f"{name}.weight": codes, f"{name}.SCB": row_maxima, f"{name}.weight_format": row_major}


def bnb_4bit_with_feedback(
    weights: Mapping[str, Tensor], stats: InputStats, options: BnbOptions, watched: Watched | None = None
) -> tuple[Tensors, dict[str, Tensor]]:
    """The bnb-4bit entries of linear layers that share one input, rounded with error feedback (arXiv 2210.17323), and
    the weights that they stand for, float32 by name.

    weights: [out_k, in] by full name, without ".weight"; stats, watched: as `round_rows` takes them. The blocks' scales
    are bitsandbytes' own; only which of the 16 values a weight becomes differs from bitsandbytes' nearest. Layers whose
    rows are no whole number of blocks are rounded to nearest."""
    for name, weight in weights.items():
        check_finite(f"{name}.weight", weight)
    with quiet_libraries():
        quantized = {name: _in_4bit(name, weight, options) for name, weight in weights.items()}
    entries = {key: tensor for own, _ in quantized.values() for key, tensor in own.items()}
    if len(stats.gram) % options.blocksize:
        return entries, {name: _dequantized(*own) for name, own in quantized.items()}
    scales = torch.cat([_block_scales(state, len(weights[name])) for name, (_, state) in quantized.items()])
    levels, order = entries[f"{next(iter(weights))}.weight.quant_map"].float().sort()
    midpoints = torch.cat([(levels[1:] + levels[:-1]) / 2, levels.new_tensor([torch.inf])])
    table, target = torch.stack([levels, order.float(), midpoints]), Target.of(stats.gram, SHRINKAGE)
    rows = torch.cat([weight.float() for weight in weights.values()])

    def attempt(which: Some, pull: Tensor | None) -> tuple[Tensor, ...]:
        grid = Grid(options.blocksize, scales[which].t().contiguous(), table, has_levels=True)
        return (gptq_round(rows[which], target, grid, pull).view(torch.uint8),)

    def values(parts: tuple[Tensor, ...], which: Some) -> Tensor:
        grouped = levels[order.argsort()][parts[0].long()].view(len(parts[0]), -1, options.blocksize)
        return (grouped * scales[which].unsqueeze(-1)).flatten(1)

    (codes,) = correct_rows(rows, stats, watched, attempt, values)
    sizes = [len(weight) for weight in weights.values()]
    for name, own in zip(weights, torch.split(codes, sizes), strict=True):
        pairs = own.view(-1, 2)
        entries[f"{name}.weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous()
    every = values((codes,), slice(None))
    return entries, dict(zip(weights, torch.split(every, sizes), strict=True))


def _in_4bit(name: str, weight: Tensor, options: BnbOptions) -> tuple[Tensors, Any]:
    """bitsandbytes' own rounding: the entries, the codes packed two a byte, and its QuantState."""
    from bitsandbytes import functional

    how = {"compress_statistics": options.double_quant, "quant_type": options.quant_type}
    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=options.blocksize, **how)
    beside = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {f"{name}.weight": packed, **beside}, state


def _dequantized(entries: Tensors, state: Any) -> Tensor:
    from bitsandbytes import functional

    (packed,) = (tensor for name, tensor in entries.items() if name.endswith(".weight"))
    values: Tensor = functional.dequantize_4bit(packed, state)
    return values.float()


def _block_scales(state: Any, rows: int) -> Tensor:
    """What bitsandbytes multiplies each block of a row with, read back: float32 [rows, in / blocksize]."""
    from bitsandbytes import functional

    scales: Tensor = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float().view(rows, -1).clamp(min=torch.finfo(torch.float32).tiny)


def bnb_quantization_config(variant: Variant, options: BnbOptions, kept: Sequence[str] = ()) -> dict[str, Any]:
    """What config.json says under `quantization_config`: transformers' own BitsAndBytesConfig, as JSON.

    kept: modules in half precision where transformers' own rule says otherwise. The block size is beside each weight.
    """
    with quiet_libraries():
        from transformers import BitsAndBytesConfig

        how: dict[str, Any] = {"llm_int8_skip_modules": list(kept) or None, "load_in_8bit": variant.w_bit == 8}
        if variant.w_bit == 4:
            how |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16}
            how |= {"bnb_4bit_quant_type": options.quant_type, "bnb_4bit_use_double_quant": options.double_quant}
        return dict(BitsAndBytesConfig(**how).to_dict())


def bnb_linear(
    name: str, tensors: Mapping[str, Tensor], shape: Sequence[int], device: torch.device, compute_dtype: torch.dtype
) -> Any:
    """bitsandbytes' own layer, without a bias, around what `bnb_tensors` gave for a weight of this shape, (out, in).

    The tensors are on the device; they become the layer's and are not copied."""
    from bitsandbytes import nn as bnb_nn

    layer: Any
    codes = tensors[f"{name}.weight"]
    sizes = {"input_features": shape[1], "output_features": shape[0], "bias": False, "device": "meta"}
    if (scales := tensors.get(f"{name}.SCB")) is not None:
        layer = bnb_nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=INT8_THRESHOLD)
        layer.weight = bnb_nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        layer = bnb_nn.Linear4bit(**sizes)
        beside = f"{name}.weight."
        stats = {key.removeprefix(beside): value for key, value in tensors.items() if key.startswith(beside)}
        layer.weight = bnb_nn.Params4bit.from_prequantized(codes, stats, device=device, module=layer)
        _compute_in(layer, compute_dtype)
    return layer


def _compute_in(layer: Any, dtype: torch.dtype) -> None:
    """A Linear4bit of bitsandbytes, whatever it is given; with no codes moved for AVX-512 where that would fail."""
    (rows, columns), size = layer.weight.quant_state.shape, layer.weight.quant_state.blocksize
    layer.compute_dtype, layer.compute_type_is_set = dtype, True
    if rows % AVX512_ROWS or columns % size:
        layer.support_avx512bf16_for_cpu = False


def _recipe(variant: Variant, choices: Choices) -> Recipe:
    settings = replace(choices.bnb, rounding=choices.rounding) if variant.w_bit == 4 else None
    quantization = bnb_quantization_config(variant, choices.bnb, choices.kept)
    return Recipe(variant, choices.half_dtype, quantization, None, choices.calibration, settings)


def _quantize_layer(name: str, weight: Tensor, recipe: Recipe) -> Tensors:
    return bnb_tensors(name, weight, recipe.variant, recipe.settings or BnbOptions())


def _from_inputs(seen: LayerInputs, run: QuantizedRun | None, recipe: Recipe) -> Tensors:
    """The bnb-4bit tensors of one decoder layer's linears, rounded with error feedback."""
    tensors: Tensors = {}
    for owner, stats in seen.stats.items():
        files = {name: seen.file_name(name) for name in seen.sharing(owner)}
        weights = {to: half(f"{to}.weight", seen.linears[name].weight.data, recipe.dtype) for name, to in files.items()}
        own, watched = (run and run.inputs(owner, list(weights.values()))) or (stats, None)
        entries, values = bnb_4bit_with_feedback(weights, own, recipe.settings, watched)
        tensors |= entries
        for name, file in files.items():
            if run:
                run.put(name, values[file])
    return tensors


def _load(folder: Path, how: Running) -> tuple[Any, Kernels]:
    from bitsandbytes.nn import Linear4bit

    model = model_of(folder, dtype=how.dtype, device_map=how.place.as_map())
    bring_to(model, how.dtype)
    for module in (one for one in model.modules() if isinstance(one, Linear4bit)):
        _compute_in(module, how.dtype)
    model.tie_weights()
    return model, _kernels(config_of(folder).quantization_config["bnb_4bit_quant_type"], how)


def _draw(model: Any, weights: DummyWeights, how: Running) -> Kernels:
    names = linear_layers(model)
    for name in names:
        shape, device = model.get_submodule(name).weight.shape, how.place.of(name)
        tensors = bnb_tensors(name, weights.get(f"{name}.weight").to(device), how.variant, BnbOptions())
        model.set_submodule(name, bnb_linear(name, tensors, shape, device, how.dtype))
    fill(model, weights, names, how)
    return _kernels(BnbOptions().quant_type, how)


def _kernels(quant_type: str, how: Running) -> Kernels:
    name = f"bitsandbytes {'int8' if how.variant.w_bit == 8 else quant_type} ({dtype_name(how.dtype)})"
    return lambda tokens: name


BNB_8BIT = Method("BnB.8", _recipe, _load, _draw, quantize_layer=_quantize_layer)
BNB_4BIT = replace(BNB_8BIT, name="BnB.4", needs_calibration=lambda one: one == "gptq", from_inputs=_from_inputs)
