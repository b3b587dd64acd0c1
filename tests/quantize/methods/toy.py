"""A method in one file: every weight a signed byte, with a scale for each output row."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.dummy import DummyWeights, fill
from quantize.loading.device_map import Running
from quantize.methods.base import Choices, Kernels, Method, Recipe
from quantize.model.pretrained import empty_model
from quantize.variant import Variant
from quantize.weights import open_weights

ROW = Variant("toy-8bit", "Toy", w_bit=8, published=False)


class ByteLinear(nn.Module):
    """A linear layer on bytes: codes [out, in] int8, scale [out, 1]."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype))


def recipe(variant: Variant, choices: Choices) -> Recipe:
    return Recipe(variant, choices.half_dtype)


def quantize_layer(name: str, weight: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
    return {f"{name}.codes": (weight / scale).round().to(torch.int8), f"{name}.scale": scale}


def load(folder: Path, how: Running) -> tuple[Any, Kernels]:
    model, weights = empty_model(folder), open_weights(folder)
    for name in weights.names():
        parent, _, leaf = name.rpartition(".")
        if leaf == "codes":
            layer = ByteLinear(weights.get(name), weights.get(f"{parent}.scale"))
            model.set_submodule(parent, layer.to(how.place.of(parent)))
        elif leaf != "scale":
            value = weights.get(name).to(how.place.of(name), how.dtype)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    return model, lambda tokens: "toy"


def draw(model: Any, weights: DummyWeights, how: Running) -> Kernels:
    fill(model, weights, [], how)
    return lambda tokens: "toy"


TOY = Method("Toy", recipe, load, draw, quantize_layer=quantize_layer)
