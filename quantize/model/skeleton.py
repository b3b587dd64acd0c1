"""A model on the meta device whose matrices are nn.Linear layers, and where its tensors stand in files."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from quantize.model.apart import Part, take_apart
from quantize.model.names import FileNames, ModelTensors, origins
from quantize.weights import TensorReader


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
    _own_file: frozenset[str]
    _stacks: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, weights: TensorReader, names: Iterable[str] | None = None) -> "Skeleton":
        """Take this model apart, in place.

        names: what the files count as holding, all that they hold by default; a checkpoint's 4-bit layers count as the
        weights that they stand for.
        """
        known = set(model.state_dict())
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
                stored |= origins(model, files.conversions[source], cuts)
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
        return cls(model, files, parts, stored, weights, ModelTensors(model, files, weights), own_file)

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

    def forget_stacks(self) -> None:
        """Free the stacks that parts were cut out of."""
        self._stacks.clear()

    def to_store(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The name and the tensor by which a checkpoint holds a parameter: what `read` gave, the way back."""
        part = self.parts.get(name)
        return self.stored.get(name, name), part.cut(tensor) if part and part.parameter == name else tensor


def _beside(file_name: str, parameter: str, name: str) -> str:
    """The name of a part of a stack, beside that stack's own name in the files."""
    inside = name.removeprefix(parameter.rpartition(".")[0])
    return file_name.rpartition(".")[0] + inside


def file_name_of(stored: Mapping[str, str], module: str) -> str:
    """The name that files have for a module of the model: what the names of its tensors there begin with."""
    for name, file_name in stored.items():
        leaf = name.removeprefix(module)
        if name.startswith(f"{module}.") and file_name.endswith(leaf):
            return file_name.removesuffix(leaf)
    return module


def linear_names(model: nn.Module) -> list[str]:
    """The full names of a model's linear layers."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]
