"""What a quantization method has to offer: a row of METHODS, as a kernel is a row of KERNELS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.checkpoint import CalibrationFacts
from quantize.dummy import DummyWeights
from quantize.errors import UserError
from quantize.int4.weight import Int4Weight
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Running
from quantize.methods.quantized_run import QuantizedRun
from quantize.methods.routed import RoutedTokens
from quantize.rounding.gram import InputStats
from quantize.rounding.options import AwqOptions, BnbOptions, Rounding
from quantize.schema import to_data
from quantize.variant import Variant
from quantize.weights import check_finite, is_finite


@dataclass(frozen=True)
class Choices:
    """What a user chose, and what follows from the model.

    half_dtype:  of what is not quantized; rounding: of 4-bit codes.
    group_size:  of methods that store groups of codes.
    kept:        names in files of the modules with matrices that stay in half precision."""

    half_dtype: torch.dtype
    rounding: Rounding = "gptq"
    bnb: BnbOptions = field(default_factory=BnbOptions)
    group_size: int | None = None
    kept: tuple[str, ...] = ()
    calibration: CalibrationFacts | None = None


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made: what its manifest and its config.json will say, and what runs.

    dtype:        of the tensors that are not quantized.
    quantization: what config.json says under quantization_config, None for the reference.
    settings:     a dataclass of the choices that decide the bytes; the method works with this one object.
    quantized_share: of the decoder's matrices, None where nothing is quantized."""

    variant: Variant
    dtype: torch.dtype
    quantization: dict[str, Any] | None = None
    group_size: int | None = None
    calibration: CalibrationFacts | None = None
    settings: Any = None
    quantized_share: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The settings as the manifest states them."""
        return {} if self.settings is None else dict(to_data(self.settings))

    @property
    def search(self) -> AwqOptions | None:
        """The settings of a method that searches scales; None for the others."""
        return self.settings if isinstance(self.settings, AwqOptions) and self.settings.search else None


@dataclass(frozen=True)
class LayerInputs:
    """A decoder layer as it came, and what its linear layers see on the calibration text.

    layer:   the module, its weights in float32; prefix: of its names in the model.
    linears: those to quantize, by name inside the layer.
    owners:  linear -> which one's input it shares; those of experts are not there.
    stats:   owner -> statistics of that input.
    blocks:  what the experts saw, for each module of experts.
    stored:  parameter -> its name in files, by full names; its own where none is given.
    exact:   owner -> its input [tokens, in] of each batch; empty where nothing is to be compared with them."""

    layer: nn.Module
    prefix: str
    linears: dict[str, nn.Linear]
    owners: dict[str, str]
    stats: dict[str, InputStats]
    blocks: tuple[RoutedTokens, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    exact: dict[str, list[Tensor]] = field(default_factory=dict)

    def file_name(self, linear: str) -> str:
        """The name in files of a linear layer, without ".weight"."""
        full = f"{self.prefix}{linear}.weight"
        return self.stored.get(full, full).removesuffix(".weight")

    def sharing(self, owner: str) -> list[str]:
        return [name for name in self.linears if self.owners.get(name) == owner]

    def others(self) -> dict[str, Tensor]:
        """Every tensor of the layer that is no weight to quantize (biases are), by full name."""
        return {
            self.prefix + name: tensor
            for name, tensor in self.layer.state_dict().items()
            if name.removesuffix(".weight") not in self.linears
        }


Tensors = dict[str, Tensor]
Kernels = Callable[[int], str]  # tokens at once -> what runs the quantized layers


@dataclass(frozen=True)
class Method:
    """A way to quantize the linear layers of a model.

    name:              the table's column "Method", by which a Variant refers to it.
    recipe:            (variant, choices) -> how one checkpoint is made.
    load:              (folder of the checkpoint, how it runs) -> the model, and what runs its quantized layers.
    draw:              (empty model, random weights, how it runs) -> what runs them, the weights now in the model.
    quantize_layer:    (name, weight [out, in], recipe) -> the tensors of one linear layer, made without calibration;
                       None where nothing is quantized, or never so.
    needs_calibration: rounding -> whether the codes are chosen on calibration text.
    from_inputs:       (layer inputs, run, recipe) -> the tensors of a layer's linears, from their weights as they came
                       and what they see, by names in files; None where the method does not work so. run: the layer in
                       the model that this method quantizes, None where its inputs are the source model's.
    pack:              (weights by their names in files, recipe) -> their tensors; None where no search is.
    in_groups:         whether it stores groups of codes, whose size must divide every layer."""

    name: str
    recipe: Callable[[Variant, Choices], Recipe]
    load: Callable[[Path, Running], tuple[Any, Kernels]]
    draw: Callable[[Any, DummyWeights, Running], Kernels]
    quantize_layer: Callable[[str, Tensor, Recipe], Tensors] | None = None
    needs_calibration: Callable[[Rounding], bool] = lambda rounding: False
    from_inputs: Callable[[LayerInputs, QuantizedRun | None, Recipe], Tensors] | None = None
    pack: Callable[[Mapping[str, Int4Weight], Recipe], Tensors] | None = None
    in_groups: bool = False


def half(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in half precision, others as they are. Raises UserError when a value does not fit."""
    converted = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not is_finite(converted):
        check_finite(name, tensor)
        most = f"{float(tensor.abs().max()):.3g}, more than {dtype_name(dtype)} can"
        advice = "give a model that is in bfloat16 as a whole, or choose bnb-4bit, which keeps it"
        raise UserError(f"weight {name} holds {most}: {advice}")
    return converted
