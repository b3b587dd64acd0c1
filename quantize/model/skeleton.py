"""A model on the meta device whose matrices are nn.Linear layers, and where its tensors stand in files."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.apart import Part, take_apart
from quantize.model.architecture import towers
from quantize.model.names import Conversion, FileNames, ModelTensors, Shapes, left_in_half, origins, put
from quantize.weights import TensorReader, check_finite


@dataclass(frozen=True)
class Skeleton:
    """A transformers model taken apart, without its weights.

    model:   on the meta device.
    files:   which tensors of the files make which parameter, by the names of the model as transformers has it.
    parts:   where the parameters come from that transformers keeps in another form.
    stored:  parameter -> its name in files: of the tensor that holds it, else the one that a checkpoint gives it.
    weights: the files.
    """

    model: Any
    files: FileNames
    parts: dict[str, Part]
    stored: dict[str, str]
    weights: TensorReader
    _tensors: ModelTensors
    _shapes: Shapes
    _own_file: frozenset[str]
    _stacks: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, weights: TensorReader, names: Iterable[str] | None = None) -> "Skeleton":
        """Take this model apart, in place.

        names: what the files count as holding, all that they hold by default; a checkpoint's 4-bit layers count as the
        weights that they stand for.
        """
        known, shapes = set(model.state_dict()), Shapes(model)
        parts = take_apart(model)
        files = FileNames.of(model, weights.names() if names is None else names, known | parts.keys())
        by_source: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
        for name, part in parts.items():
            by_source.setdefault(part.parameter, {})[name] = part.cut
        stored: dict[str, str] = {}
        for source, cuts in by_source.items():
            if source in cuts:
                continue
            if source in files.conversions:
                stored |= origins(shapes, files.conversions[source], cuts)
            stored |= {name: files.plain[name] for name in cuts if name in files.plain}
        own_file = frozenset(stored)
        beside = {
            name: _beside(files.plain[source], source, name)
            for source, cuts in by_source.items()
            if source in files.plain and source not in cuts
            for name in cuts
        }
        back = FileNames.of(model, beside.values(), known | parts.keys()).homes if beside else {}
        stored |= {name: file_name for name, file_name in beside.items() if back[file_name] == name}
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        stored = {name: stored.get(name) or files.plain.get(name) or name for name, _ in every}
        return cls(model, files, parts, stored, weights, ModelTensors(shapes, files, weights), shapes, own_file)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold a parameter or buffer of the model taken apart."""
        return name in self._own_file or self._source(name) in self._tensors

    def read(self, name: str) -> Tensor:
        """A parameter's tensor, in the dtype of the files. Raises KeyError where the files hold none."""
        if name in self._own_file:
            return self.weights.get(self.stored[name])
        if name not in self.parts:
            return self._tensors.get(self._source(name))
        part = self.parts[name]
        if part.parameter == name:
            return part.cut(self._tensors.get(name))
        if part.parameter not in self._stacks:
            self._stacks[part.parameter] = self._tensors.get(part.parameter)
        return part.cut(self._stacks[part.parameter])

    def _source(self, name: str) -> str:
        """The parameter, as transformers has it, whose tensor in the files a parameter is cut from."""
        source = self.parts[name].parameter if name in self.parts else name
        if source not in self._tensors:
            ties = getattr(self.model, "all_tied_weights_keys", None) or {}
            return next((target for target, tied in ties.items() if tied == source and target in self._tensors), source)
        return source

    def converted(self, conversion: Conversion) -> dict[str, Tensor]:
        """What tensors of the files become together, by the names of the model as transformers has it."""
        return conversion.run(self._shapes, self.weights.get)

    def forget_stacks(self) -> None:
        """Free the stacks that parts were cut out of."""
        self._stacks.clear()

    def fill(self, module: nn.Module, prefix: str, device: torch.device, *, recurse: bool = True) -> None:
        """Put a module on the device: parameters as float32 copies of the files' tensors, buffers theirs or its own."""
        for name, buffer in list(module.named_buffers(recurse=recurse, remove_duplicate=False)):
            held = self.read(prefix + name) if prefix + name in self else buffer
            put(module, name, held.to(device, buffer.dtype))
        for name, _ in list(module.named_parameters(recurse=recurse)):
            full = prefix + name
            if full in self and full not in self.model.all_tied_weights_keys:
                tensor = self.read(full)
                check_finite(full, tensor)
                put(module, name, tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype))

    def fill_outer(self, layers: str, device: torch.device) -> None:
        """Fill what stands around the layers: all but these, towers that see or hear, and an untied output head.

        The towers get parameters that take no memory: a wrapper goes by the device of its first one.
        """
        outside = tuple(f"{name}." for name in (layers, *towers(self.model, layers)))
        for name, module in self.model.named_modules():
            tied = f"{name}.weight" in self.model.all_tied_weights_keys
            head = module is self.model.get_output_embeddings() and not tied
            if not head and not f"{name}.".startswith(outside):
                self.fill(module, f"{name}." if name else "", device, recurse=False)
        for name in towers(self.model, layers):
            tower = self.model.get_submodule(name)
            for key, parameter in list(tower.named_parameters()):
                put(tower, key, torch.zeros(1, dtype=parameter.dtype, device=device).expand(parameter.shape))

    def empty_outer(self, layers: str) -> None:
        """Free the parameters that `fill_outer` has filled."""
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(f"{layers}."):
                empty(module, recurse=False)
        self.model.tie_weights()

    def to_store(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The name and the tensor by which a checkpoint holds a parameter: what `read` gave, the way back."""
        part = self.parts.get(name)
        return self.stored.get(name, name), part.cut(tensor) if part and part.parameter == name else tensor


def empty(module: nn.Module, *, recurse: bool = True) -> None:
    """Free a module's parameters: they go to the meta device. Its buffers stay, since no file may hold them."""
    for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
        put(module, name, parameter.to("meta"))


def _beside(file_name: str, parameter: str, name: str) -> str:
    """The name of a part of a stack, beside that stack's own name in the files."""
    inside = name.removeprefix(parameter.rpartition(".")[0])
    return file_name.rpartition(".")[0] + inside


def kept_names(skeleton: Skeleton, quantized: Collection[str]) -> tuple[str, ...]:
    """What config.json names as left in half precision: by the names in files, and by transformers' where they differ.

    Some engines go by the one, some by the other.
    """
    left = left_in_half(skeleton.model, quantized)
    return tuple(dict.fromkeys(name for module in left for name in (_file_name(skeleton.stored, module), module)))


def _file_name(stored: Mapping[str, str], module: str) -> str:
    """The name that files have for a module of the model: what the names of its tensors there begin with."""
    for name, file_name in stored.items():
        leaf = name.removeprefix(module)
        if name.startswith(f"{module}.") and file_name.endswith(leaf):
            return file_name.removesuffix(leaf)
    return module


def linear_names(model: nn.Module) -> list[str]:
    """The full names of a model's linear layers."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]
