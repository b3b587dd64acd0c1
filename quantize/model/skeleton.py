"""A model on the meta device whose matrices are nn.Linear layers, and where its tensors stand in files."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.apart import Cut, Part, take_apart
from quantize.model.architecture import towers
from quantize.model.names import FileNames, left_in_half, put
from quantize.weights import TensorReader, check_finite


@dataclass(frozen=True)
class Skeleton:
    """A transformers model taken apart, without its weights.

    model:   on the meta device; weights: the files.
    files:   which tensors of the files make which parameter, by the names of the model as transformers has it.
    parts:   where the parameters come from that transformers keeps in another form.
    stored:  parameter -> its name in files: of the tensor that holds it, else the one that a checkpoint gives it."""

    model: Any
    weights: TensorReader
    files: FileNames
    parts: dict[str, Part]
    stored: dict[str, str]
    _own_file: frozenset[str]
    _made_in: dict[str, str]
    _made: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _stacks: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, weights: TensorReader, names: Iterable[str] | None = None) -> "Skeleton":
        """Take this model apart, in place.

        names: what the files count as holding, all that they hold by default; a checkpoint's 4-bit layers count as the
        weights that they stand for."""
        before = model.state_dict()
        parts = take_apart(model)
        known, held = {**model.state_dict(), **before}, set(weights.names())
        files = FileNames.of(model, held if names is None else names, known)
        by_source: dict[str, dict[str, Cut]] = {}
        for name, part in parts.items():
            by_source.setdefault(part.parameter, {})[name] = part.cut
        stored, beside = dict[str, str](), dict[str, str]()
        for source, cuts in by_source.items():
            if source in cuts:
                continue
            if source in files.conversions:
                stored |= files.conversions[source].origins(cuts)
            stored |= {name: files.plain[name] for name in cuts if name in files.plain}
            if source in files.plain:  # a part of a stack stands beside that stack's own name
                home, inside = files.plain[source].rpartition(".")[0], len(source.rpartition(".")[0])
                beside |= {name: home + name[inside:] for name in cuts}
        own_file = frozenset(stored)
        back = FileNames.of(model, beside.values(), known).homes if beside else {}
        stored |= {name: file_name for name, file_name in beside.items() if back[file_name] == name}
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        stored = {name: stored.get(name) or files.plain.get(name) or name for name, _ in every}
        made_in = {
            name: home
            for home, conversion in files.conversions.items()
            if all(source in held for source, _ in conversion.sources)
            for name in conversion.parameters(weights)
        }
        return cls(model, weights, files, parts, stored, own_file, made_in)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold a parameter or buffer of the model taken apart."""
        return name in self._own_file or self._is_whole(self._source(name))

    def read(self, name: str) -> Tensor:
        """A parameter's tensor, in the dtype of the files. Raises KeyError where the files hold none."""
        if name in self._own_file:
            return self.weights.get(self.stored[name])
        source, part = self._source(name), self.parts.get(name)
        if part is None or part.parameter == name:
            return part.cut(self._whole(source)) if part else self._whole(source)
        if source not in self._stacks:
            if not all(other.rpartition(".")[0] == source.rpartition(".")[0] for other in self._stacks):
                self.forget_stacks()
            self._stacks[source] = self._whole(source)
        return part.cut(self._stacks[source])

    def _is_whole(self, name: str) -> bool:
        """Whether the files hold a parameter of the model as transformers has it."""
        return name in self.files.plain or name in self._made_in

    def _whole(self, name: str) -> Tensor:
        if name in self.files.plain:
            return self.weights.get(self.files.plain[name])
        home = self._made_in[name]
        if home not in self._made:
            self._made.clear()  # freed before the next is read
            self._made[home] = self.files.conversions[home].run(self.weights.get)
        return self._made[home][name]

    def _source(self, name: str) -> str:
        """The parameter, as transformers has it, whose tensor in the files a parameter is cut from."""
        source = self.parts[name].parameter if name in self.parts else name
        ties = () if self._is_whole(source) else self.model.all_tied_weights_keys.items()
        return next((target for target, tied in ties if tied == source and self._is_whole(target)), source)

    def forget_stacks(self) -> None:
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

        The towers get parameters that take no memory: a wrapper goes by the device of its first one."""
        inner = towers(self.model, layers)
        outside = tuple(f"{name}." for name in (layers, *inner))
        for name, module in self.model.named_modules():
            tied = f"{name}.weight" in self.model.all_tied_weights_keys
            head = module is self.model.get_output_embeddings() and not tied
            if not head and not f"{name}.".startswith(outside):
                self.fill(module, f"{name}." if name else "", device, recurse=False)
        for tower in map(self.model.get_submodule, inner):
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


def kept_names(skeleton: Skeleton, quantized: Collection[str]) -> tuple[str, ...]:
    """Names of what is left in half precision for config.json, in files and in transformers: engines go by either."""
    found: dict[str, None] = {}
    for module in left_in_half(skeleton.model, quantized):
        names = {name.removeprefix(module): at for name, at in skeleton.stored.items() if name.startswith(f"{module}.")}
        in_files = (file_name.removesuffix(leaf) for leaf, file_name in names.items() if file_name.endswith(leaf))
        found |= dict.fromkeys((next(in_files, module), module))
    return tuple(found)
