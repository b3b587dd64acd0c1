"""What autoawq knows about model architectures: where the layers are and which scales may move where."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.variant import GROUP_SIZES
from quantize.versions import version_of


@dataclass(frozen=True)
class ScaleGroup:
    """Linear layers that share one input, and the module before them that can absorb their scales.

    All names are relative to the decoder layer; `previous` is a norm, a linear layer or an activation function.
    """

    previous: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """autoawq's map of one model type, applied to a transformers model."""

    layers: nn.ModuleList
    layers_name: str
    _awq_class: Any
    _config: Any

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of decoder layer `index` by their names inside it: the ones that get quantized."""
        found = {n: m for n, m in self.layers[index].named_modules() if isinstance(m, nn.Linear)}
        skipped = self.modules_to_not_convert or []
        return {name: module for name, module in found.items() if not any(key in name for key in skipped)}

    @property
    def modules_to_not_convert(self) -> list[str] | None:
        """What autoawq leaves unquantized in this architecture, as config.json names it."""
        return getattr(self._awq_class, "modules_to_not_convert", None)

    def scale_groups(self, index: int) -> list[ScaleGroup]:
        """autoawq's `get_layers_for_scaling` of decoder layer `index`, by names."""
        layer = self.layers[index]
        names = {module: name for name, module in layer.named_modules()}
        nothing: defaultdict[str, None] = defaultdict(lambda: None)  # the maps look inputs up only to hand them on
        groups = [
            ScaleGroup(names[group["prev_op"]], tuple(names[linear] for linear in group["layers"]))
            for group in self._awq_class.get_layers_for_scaling(layer, nothing, {})
        ]
        known = set(self.linears(index))
        return [group for group in groups if known.issuperset(group.linears) and self._preserves(layer, group)]

    def _preserves(self, layer: nn.Module, group: ScaleGroup) -> bool:
        """Whether moving scales into `previous` leaves the layer's function as it was.

        autoawq scales the last rows of a fused qkv projection for the output projection; with grouped queries
        there are fewer value rows than that.
        """
        previous = layer.get_submodule(group.previous)
        if isinstance(previous, nn.Linear) and "qkv" in group.previous:
            heads = getattr(self._config, "num_attention_heads", None)
            return bool(getattr(self._config, "num_key_value_heads", heads) == heads)
        return True


def architecture_of(model: Any) -> Architecture:
    """autoawq's map for this transformers model (weights may be on the meta device).

    Raises UserError when autoawq has no map for its model type, or one that does not fit this transformers.
    """
    with quiet_libraries():
        from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    model_type = model.config.model_type
    if model_type not in AWQ_CAUSAL_LM_MODEL_MAP:
        raise UserError(
            f"AWQ has no map for the architecture {model_type!r} "
            f"(it has: {', '.join(sorted(AWQ_CAUSAL_LM_MODEL_MAP))}): use the bnb-4bit or bnb-8bit variant"
        )
    awq_class = AWQ_CAUSAL_LM_MODEL_MAP[model_type]
    try:
        layers = awq_class.get_model_layers(model)
        name = next(name for name, module in model.named_modules() if module is layers)
        architecture = Architecture(layers, name, awq_class, model.config)
        architecture.scale_groups(0)
    except (AttributeError, KeyError, StopIteration, TypeError) as error:
        raise UserError(
            f"autoawq's map for {model_type!r} does not fit transformers {version_of('transformers')} ({error}): "
            "use the bnb-4bit or bnb-8bit variant"
        ) from None
    return architecture


@torch.no_grad()
def apply_scales(layer: nn.Module, group: ScaleGroup, scales: Tensor) -> None:
    """Multiply the group's input features by `scales` [in] and divide them out of what comes before, in place.

    The arithmetic is autoawq's; its own `apply_scale` would also move every module to another device and back.
    """
    with quiet_libraries():
        from awq.modules.act import ScaledActivation
        from awq.quantize.scale import allowed_act_fns, scale_fc_fcs, scale_gelu_fc, scale_ln_fcs
    previous = layer.get_submodule(group.previous)
    linears = [layer.get_submodule(name) for name in group.linears]
    if isinstance(previous, nn.Linear):
        scale_fc_fcs(previous, linears, scales)
    elif isinstance(previous, tuple(allowed_act_fns)):
        layer.set_submodule(group.previous, ScaledActivation(previous, scales))
        scale_gelu_fc(previous, linears[0], scales)
    else:
        scale_ln_fcs(previous, linears, scales)


def quantized_shapes(architecture: Architecture) -> list[tuple[str, int, int]]:
    """(full name, out features, in features) of every linear layer that gets quantized."""
    return [
        (f"{architecture.layers_name}.{index}.{name}", module.out_features, module.in_features)
        for index in range(len(architecture.layers))
        for name, module in architecture.linears(index).items()
    ]


def group_size_for(shapes: Sequence[tuple[str, int, int]], wanted: int | None = None) -> int:
    """The group size to use: `wanted`, or the largest of GROUP_SIZES that divides every layer's input features.

    Raises UserError when it divides not every layer, or when no size does, or a layer's output features are no
    multiple of eight (eight codes make one word of the file).
    """
    for name, out_features, _ in shapes:
        if out_features % 8:
            raise UserError(f"{name} has {out_features} output features, no multiple of 8: AWQ cannot pack it")
    sizes = ", ".join(map(str, GROUP_SIZES))
    fitting = [size for size in GROUP_SIZES if all(in_features % size == 0 for _, _, in_features in shapes)]
    if wanted is None:
        if not fitting:
            raise UserError(f"none of the group sizes {sizes} divides every layer: use a bnb variant")
        return fitting[0]
    if wanted not in GROUP_SIZES:
        raise UserError(f"group size {wanted} is none that AWQ kernels run: choose one of {sizes}")
    if wanted not in fitting:
        name, _, in_features = next(shape for shape in shapes if shape[2] % wanted)
        choice = f"choose {' or '.join(map(str, fitting))}" if fitting else "use a bnb variant"
        raise UserError(f"group size {wanted} does not divide the {in_features} input features of {name}: {choice}")
    return wanted
