"""Random weights in a real model's shape: memory and time depend on the shape alone, and need no download."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import UserError
from quantize.files import replace_file
from quantize.int4.weight import LEVELS, Int4Weight
from quantize.loading.device_map import Running
from quantize.model.names import put
from quantize.weights import read_json

DUMMY_PREFIX = "dummy:"
SHAPES = {path.stem: path for path in sorted((Path(__file__).parent / "shapes").glob("*.json"))}  # configs, by name
DUMMY_SEED = 0
WEIGHT_STD = 0.02  # standard deviation of the weights, transformers' usual initializer_range
DRAWN_TOGETHER = 2**20  # weights: they stay in a core's cache, and draws in multiples of 16 follow one another


def dummy_config(spec: str) -> tuple[str, dict[str, Any]]:
    """A name and the config that `spec` stands for: a name of SHAPES or a config.json. Raises UserError for neither."""
    path = SHAPES.get(spec, Path(spec))
    if not path.is_file():
        raise UserError(f"dummy:{spec} is no config.json and not one of {', '.join(SHAPES)}")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} does not say its model_type: give a model's config.json")
    config.pop("quantization_config", None)
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    return f"dummy-{name}", config


def write_dummy_folder(config: dict[str, Any], name: str, cache: Path) -> Path:
    """A folder in `cache` that holds this config.json and nothing else; the same one for the same config."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = cache / "dummy" / hashlib.sha256(text.encode()).hexdigest()[:16] / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.is_file():
        replace_file(path, text.encode())
    return folder


@dataclass(frozen=True)
class DummyWeights:
    """The tensors of a model's shape, each drawn when it is asked for: the same values for the same name and device.

    Matrices are normal with standard deviation 0.02, norm weights one, biases zero; all float16."""

    shapes: dict[str, tuple[int, ...]]
    device: torch.device

    def names(self) -> list[str]:
        return list(self.shapes)

    def get(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) < 2:
            fill = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, fill, dtype=torch.float16, device=self.device)
        drawn, generator = torch.empty(shape, dtype=torch.float16, device=self.device), generator_for(name, self.device)
        for part in torch.split(drawn.view(-1), DRAWN_TOGETHER):
            part.copy_(torch.randn(len(part), generator=generator, device=self.device).mul_(WEIGHT_STD))
        return drawn

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float16


def generator_for(name: str, device: torch.device) -> torch.Generator:
    """Draws the same numbers for the same name and device."""
    seed = int.from_bytes(hashlib.sha256(f"{DUMMY_SEED} {name}".encode()).digest()[:7], "little")
    return torch.Generator(device).manual_seed(seed)


def dummy_weights(model: Any, device: torch.device) -> DummyWeights:
    """Random weights for a transformers model whose own are on the meta device; tied ones are drawn once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return DummyWeights(shapes, device)


def random_int4(name: str, out_features: int, in_features: int, group_size: int, device: torch.device) -> Int4Weight:
    """A random weight as AWQ stores it; the same for the same name and device.

    Codes are even over 0 to 15 and zero points near the middle; the scales give the weights DummyWeights' deviation."""
    generator = generator_for(f"{name} int4", device)

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)

    groups = in_features // group_size
    codes = drawn(0, LEVELS + 1, out_features, in_features)
    zeros = drawn(LEVELS // 2, LEVELS // 2 + 2, out_features, groups)
    uneven = torch.rand((out_features, groups), generator=generator, device=device).add_(0.5)
    deviation = ((LEVELS + 1) ** 2 / 12) ** 0.5  # of an even draw
    return Int4Weight(codes, (uneven * (WEIGHT_STD / deviation)).half(), zeros)


def fill(model: Any, weights: DummyWeights, done: Sequence[str], how: Running) -> None:
    """Draw every parameter but the weights of the layers in `done`, in the compute dtype."""
    for name in weights.shapes.keys() - {f"{name}.weight" for name in done}:
        put(model, name, weights.get(name).to(how.place.of(name), how.dtype))
    model.tie_weights()


def dummy_blocks(vocabulary: int, blocks: int, block_tokens: int) -> torch.Tensor:
    """Random token ids in place of text, int64 [blocks, block_tokens]."""
    generator = torch.Generator().manual_seed(DUMMY_SEED)
    return torch.randint(0, vocabulary, (blocks, block_tokens), generator=generator)
