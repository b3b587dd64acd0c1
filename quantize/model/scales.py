"""Scales on their way from matrices into the module before them, which leaves a layer's function as it was."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

UNSEEN, OTHER = -1, -2  # input channels of a consumer that were zero throughout, and those that another module gives


@dataclass(frozen=True)
class Consumer:
    """A matrix that reads a source's output. channels: [in], the source's of each input feature, or UNSEEN or OTHER."""

    name: str
    channels: tuple[int, ...]

    def spread(self, values: Tensor) -> Tensor:
        """A value a channel of the source -> a value an input feature, 1 where none is known; [in]."""
        channels = torch.tensor(self.channels, device=values.device)
        return torch.where(channels >= 0, values[channels.clamp(min=0)], 1)


@dataclass(frozen=True)
class ScaleGroup:
    """Matrices that share one source, and the source that can absorb their scales; names inside the layer.

    source:    a norm, a linear layer, or an activation function.
    free:      [channels], which of the source's may be scaled.
    one_plus:  whether the source is a norm that multiplies by one plus its weight."""

    source: str
    free: tuple[bool, ...]
    consumers: tuple[Consumer, ...]
    one_plus: bool = False


def is_norm(module: nn.Module) -> bool:
    """A module with a weight a channel and nothing else but a bias a channel: norms, whatever they are called."""
    weight = module._parameters.get("weight")
    rest = [p for key, p in module._parameters.items() if p is not None and key != "weight"]
    return weight is not None and weight.dim() == 1 and all(p.shape == weight.shape for p in rest)


class ScaledActivation(nn.Module):
    """An activation function whose output is divided by scales [channels], as autoawq's checkpoints hold it."""

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.act(x) / self.scales
        return scaled


@torch.no_grad()
def apply_scales(layer: nn.Module, group: ScaleGroup, scales: Tensor) -> None:
    """Divide the source by `scales` [channels], 1 where not free, and make up for it in what reads it, all in place."""
    source: Any = layer.get_submodule(group.source)
    if type(source) is nn.Linear:
        source.weight.data = source.weight / scales.unsqueeze(1)
        if source.bias is not None:
            source.bias.data = source.bias / scales
    elif is_norm(source):
        for parameter in source.parameters(recurse=False):
            plus = float(group.one_plus and parameter is source.weight)
            parameter.data = (parameter + plus) / scales - plus
    else:
        layer.set_submodule(group.source, ScaledActivation(source, scales))
    for consumer in group.consumers:
        module: Any = layer.get_submodule(consumer.name)
        module.weight.data = module.weight * consumer.spread(scales)
