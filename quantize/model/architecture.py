"""Where a model's decoder layers are, and which linear layers in them get 4-bit weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quantize.errors import UserError
from quantize.model.apart import experts_of
from quantize.variant import GROUP_SIZES

PACKED_ROWS = 8  # codes that make one word of the file: output features are a multiple of it
NEGLIGIBLE_SHARE = 0.01  # of the weights; layers that hold less in all are kept rather than make every group smaller
Shape = tuple[str, int, int]  # a linear layer: full name, out features, in features


@dataclass(frozen=True)
class Architecture:
    """A model's decoder layers.

    layers_name: of their list in the model.
    kept:        full names of the linear layers inside them that stay in half precision.
    outputs:     what the model expects of a layer: 0 for a tensor, else how many in a tuple of which it is the first.
    group_size:  of groups of codes, None where there are none."""

    layers: nn.ModuleList
    layers_name: str
    kept: frozenset[str] = frozenset()
    outputs: int = 0
    group_size: int | None = None

    def prefix(self, index: int) -> str:
        return f"{self.layers_name}.{index}."

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of decoder layer `index` that get quantized, by their names inside it."""
        prefix = self.prefix(index)
        return {
            name: module
            for name, module in self.layers[index].named_modules()
            if type(module) is nn.Linear and prefix + name not in self.kept
        }

    def shapes(self) -> list[Shape]:
        return [
            (self.prefix(index) + name, module.out_features, module.in_features)
            for index in range(len(self.layers))
            for name, module in self.linears(index).items()
        ]

    def names(self) -> list[str]:
        """The full names of the linear layers that get quantized."""
        return [name for name, _, _ in self.shapes()]

    def with_group_size(self, wanted: int | None = None) -> "Architecture":
        """This with a group size, less the layers that it does not fit. Raises UserError as `group_size_for` does."""
        size = group_size_for(self.shapes(), wanted)
        unfit = {name for name, rows, columns in self.shapes() if rows % PACKED_ROWS or columns % size}
        return replace(self, kept=self.kept | unfit, group_size=size)


def architecture_of(model: Any) -> Architecture:
    """The decoder layers of a transformers model, taken apart (quantize.model.apart) or not; routers are kept.

    The weights may be on the meta device. Raises UserError where there is no list of layers."""
    lists = _lists_in(decoder_of(model))
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder layers: use a bnb variant")
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    fitting = [one for one in lists if len(one) == count] or lists
    layers = max(fitting, key=lambda one: sum(parameter.numel() for parameter in one.parameters()))
    name = next(name for name, module in model.named_modules() if module is layers)
    return Architecture(layers, name, frozenset(f"{name}.{router}" for router in _routers(layers)))


def decoder_of(model: Any) -> Any:
    """The language model without its output head, the part of a wrapper that generates text."""
    decoder = model.get_decoder()
    return decoder if _lists_in(decoder) else model.base_model  # some call their output head a decoder


def towers(model: Any, layers_name: str) -> list[str]:
    """Names of the models inside this one that do not hold the decoder layers: those that see or hear."""
    from transformers import PreTrainedModel

    inner = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    return [name for name in inner if not layers_name.startswith(f"{name}.")]


def _lists_in(module: nn.Module) -> list[nn.ModuleList]:
    return [one for one in module.modules() if isinstance(one, nn.ModuleList)]


def _routers(layers: nn.ModuleList) -> list[str]:
    """Linear layers that choose experts, or say how much one shared expert counts."""
    experts = {name: len(experts_of(module)) for name, module in layers.named_modules()}
    blocks = {name.rpartition(".")[0]: count for name, count in experts.items() if count}

    def routes(name: str, out_features: int) -> bool:
        own = [count for block, count in blocks.items() if name.startswith(f"{block}." if block else "")]
        chooses = any(leaf == "gate" or leaf.endswith("_gate") for leaf in name.split("."))
        return out_features == 1 or "router" in name or (chooses and out_features in own)

    return [name for name, one in layers.named_modules() if type(one) is nn.Linear and routes(name, one.out_features)]


def group_size_for(shapes: Sequence[Shape], wanted: int | None = None) -> int:
    """`wanted`, or the largest of GROUP_SIZES that divides the input features of every layer, few small ones aside.

    Raises UserError when it does not, or when no size does, or where output features are no multiple of eight."""

    def lost(layers: Sequence[Shape]) -> bool:
        held, all_held = (sum(rows * columns for _, rows, columns in own) for own in (layers, shapes))
        return held > NEGLIGIBLE_SHARE * all_held

    unpacked = [shape for shape in shapes if shape[1] % PACKED_ROWS]
    if lost(unpacked):
        name, out_features, _ = unpacked[0]
        raise UserError(f"{name} has {out_features} output features, no multiple of 8: AWQ cannot pack it")
    sizes = ", ".join(map(str, GROUP_SIZES))
    unfit = {size: [one for one in shapes if one[1] % PACKED_ROWS == 0 and one[2] % size] for size in GROUP_SIZES}
    fitting = [size for size in GROUP_SIZES if not lost(unfit[size])]
    if wanted in fitting or (wanted is None and fitting):
        return wanted or fitting[0]
    if wanted is None:
        raise UserError(f"none of the group sizes {sizes} divides every layer: use a bnb variant")
    if wanted not in GROUP_SIZES:
        raise UserError(f"group size {wanted} is none that AWQ kernels run: choose one of {sizes}")
    name, _, in_features = unfit[wanted][0]
    choice = f"choose {' or '.join(map(str, fitting))}" if fitting else "use a bnb variant"
    raise UserError(f"group size {wanted} does not divide the {in_features} input features of {name}: {choice}")
