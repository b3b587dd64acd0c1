"""Checkpoints as other makers write them, packed here by formulas of their own: one loop a code, no shared code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)


def words(codes: np.ndarray, order: tuple[int, ...]) -> Tensor:
    """uint [rows, 8 n] -> int32 [rows, n], code order[i] in bits 4 i to 4 i + 3."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for place, index in enumerate(order):
        packed |= codes[:, index::8].astype(np.uint32) << (4 * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def rounded(weight: np.ndarray, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[out, in] -> codes [out, in], scales float16 [out, groups], zero points [out, groups]."""
    grouped = weight.reshape(weight.shape[0], -1, group)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    if symmetric:
        reach = np.maximum(-low, high)
        scales, zeros = (reach / 7).astype(np.float16), np.full(low.shape, 8.0)
    else:
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, 15)
    steps = np.round(grouped / scales[..., None].astype(np.float32)) + zeros[..., None]
    return np.clip(steps, 0, 15).reshape(weight.shape), scales, zeros


Made = tuple[dict[str, Tensor], np.ndarray]
"""The tensors of one layer by what follows its name, and the weight that they stand for."""


def value(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: int) -> np.ndarray:
    steps = codes.reshape(codes.shape[0], -1, group) - zeros[..., None]
    found: np.ndarray = (steps * scales[..., None].astype(np.float32)).reshape(codes.shape)
    return found


def awq_gemm(weight: np.ndarray, group: int) -> Made:
    codes, scales, zeros = rounded(weight, group, symmetric=False)
    made = {"qweight": words(codes.T, AWQ_ORDER), "qzeros": words(zeros.T, AWQ_ORDER), "scales": half(scales.T)}
    return made, value(codes, scales, zeros, group)


def awq_symmetric(weight: np.ndarray, group: int) -> Made:
    """auto-round's, without zero points."""
    codes, scales, zeros = rounded(weight, group, symmetric=True)
    return {"qweight": words(codes.T, AWQ_ORDER), "scales": half(scales.T)}, value(codes, scales, zeros, group)


def gptq(weight: np.ndarray, group: int, *, stored_less: int = 1, act_order: bool = False) -> Made:
    rows, inputs = weight.shape
    order = np.random.default_rng(0).permutation(inputs) if act_order else np.arange(inputs)
    codes, scales, zeros = rounded(weight[:, order], group, symmetric=False)
    exact = np.empty_like(weight)
    exact[:, order] = value(codes, scales, zeros, group)
    plain, g_idx = np.empty_like(codes), np.empty(inputs, dtype=np.int32)
    plain[:, order], g_idx[order] = codes, np.arange(inputs) // group
    made = {
        "qweight": words(plain, PLAIN).t(), "qzeros": words(zeros.T - stored_less, PLAIN), "scales": half(scales.T),
        "g_idx": torch.from_numpy(g_idx), "bias": torch.zeros(rows, dtype=torch.float16),
    }  # fmt: skip
    return made, exact


def compressed(weight: np.ndarray, group: int, *, symmetric: bool = False) -> Made:
    codes, scales, zeros = rounded(weight, group, symmetric)
    made = {"weight_packed": words(codes, PLAIN), "weight_scale": torch.from_numpy(scales).bfloat16()}
    made["weight_shape"] = torch.tensor(weight.shape)
    if not symmetric:
        made["weight_zero_point"] = words(zeros.T, PLAIN).t()
    return made, value(codes, made["weight_scale"].float().numpy(), zeros, group)


def fp8(weight: np.ndarray, block: int) -> Made:
    """8-bit floats, a scale for each square of [block, block]."""
    tiled = torch.from_numpy(weight).view(len(weight) // block, block, -1, block)
    scales = tiled.abs().amax((1, 3)) / 448
    made = {"weight": (tiled / scales[:, None, :, None]).to(torch.float8_e4m3fn)}
    exact = (made["weight"].float() * scales[:, None, :, None]).reshape(weight.shape)
    return {"weight": made["weight"].reshape(weight.shape), "weight_scale_inv": scales}, exact.numpy()


def half(scales: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(scales.astype(np.float16)))


def ct_config(group: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def write(
    source: Path, out: Path, config: dict[str, Any], pack: Callable[[np.ndarray], Made], *, beside: str | None = None
) -> tuple[Path, Path]:
    """`source` with its layers packed, in out/foreign; the same weights in half precision, in out/dense.

    beside: the file of its own that the quantization is stated in, None for config.json.
    """
    folder, dense = out / "foreign", out / "dense"
    for target in (folder, dense):
        shutil.copytree(source, target)
    tensors, exact = load_file(source / "model.safetensors"), load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made, weight = pack(tensors.pop(name).float().numpy())
        tensors |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in made.items()}
        exact[name] = torch.from_numpy(weight).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(
        {name: one.float() for name, one in exact.items()}, dense / "model.safetensors", metadata={"format": "pt"}
    )
    plain = json.loads((source / "config.json").read_text())
    if beside:
        (folder / beside).write_text(json.dumps(config))
    else:
        (folder / "config.json").write_text(json.dumps({**plain, "quantization_config": config}))
    (dense / "config.json").write_text(json.dumps({**plain, "dtype": "float32"}))
    return folder, dense
