"""Which tensors of a folder's files make which parameter of a transformers model, by transformers' own rules."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.model.architecture import architecture_of, decoder_of, towers
from quantize.quiet import quiet_libraries
from quantize.weights import TensorReader

LEAST_SHARE = 0.9
Pieces = Iterator[tuple[str, Tensor, bool]]  # name in files, tensor, whether it is a linear layer's, to be quantized


@dataclass(frozen=True)
class Conversion:
    """Tensors of files that transformers makes parameters of together: experts stacked, fused projections split.

    home:      the first parameter that they become.
    sources:   (file name, transformers' pattern that it fits), in transformers' order.
    converter: transformers' WeightConverter.
    model:     what it asks of the model: its config and its parameters' shapes."""

    home: str
    sources: list[tuple[str, str]]
    converter: Any
    model: Any

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameter -> tensor. read: a file name -> its tensor."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.collected_tensors[pattern].append(lambda name=name: read(name))
        made = converter.convert(self.home, model=self.model, config=self.model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def parameters(self, weights: TensorReader) -> list[str]:
        """The names of what `run` makes of these weights, of which it reads none."""
        return list(self.run(lambda name: torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta")))

    def origins(self, cuts: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, str]:
        """Part of the home -> the one file name that holds just that part; parts of several are left out.

        cuts: how each part, a matrix, is cut out of the parameter. Proven by converting marked tensors, [1, 2] each, in
        the place of those in the files."""
        marks = {name: torch.tensor([[2.0 * n, 2.0 * n + 1]]) for n, (name, _) in enumerate(self.sources)}
        try:
            made = self.run(marks.__getitem__)[self.home]
            found = {part: cut(made) for part, cut in cuts.items()}
        except (RuntimeError, ValueError, IndexError, KeyError):
            return {}
        held = {tuple(mark[0].tolist()): name for name, mark in marks.items()}
        keys = {part: tuple(tensor[0].tolist()) for part, tensor in found.items() if tensor.shape == (1, 2)}
        return {part: held[key] for part, key in keys.items() if key in held}


@dataclass(frozen=True)
class FileNames:
    """Tensors of files by the parameters that they make, as transformers finds when it loads.

    homes:       file name -> the parameter or buffer that transformers would load it into, the first of several.
    plain:       parameter -> the file name that holds it as it is.
    conversions: of the others, by their first parameter.
    known:       the model's tensors, as transformers has it and as it was taken apart; their shapes count."""

    homes: dict[str, str]
    plain: dict[str, str]
    conversions: dict[str, Conversion]
    known: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Any, file_names: Iterable[str], known: Mapping[str, Tensor] | None = None) -> "FileNames":
        """model: its weights may be on the meta device; known: where it was changed since it was built."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(model)
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        known, prefix = model.state_dict() if known is None else known, model.base_model_prefix
        asked = SimpleNamespace(config=model.config, get_parameter=known.__getitem__)
        names = cls({}, {}, {}, known)
        for name in sorted(file_names, key=dot_natural_key):
            home, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if home not in known and name in known:
                home, pattern = rename_source_key(name, [], [], prefix, known)
            names.homes[name] = home
            if pattern is None:
                names.plain[home] = name
                continue
            conversion = names.conversions.setdefault(home, Conversion(home, [], by_pattern[pattern], asked))
            conversion.sources.append((name, pattern))
        return names

    def pieces(self, weights: TensorReader, linears: Collection[str], within: str = "") -> Pieces:
        """Every tensor as the files have it; those that make linear layers together, as the model has them.

        linears: names of linear layers to quantize; within: what the names of the parameters begin with."""
        to_quantize, split = {f"{name}.weight" for name in linears}, set[str]()
        for home, conversion in self.conversions.items():
            if home.startswith(within) and not to_quantize.isdisjoint(conversion.parameters(weights)):
                split.update(name for name, _ in conversion.sources)
                yield from ((name, one, name in to_quantize) for name, one in conversion.run(weights.get).items())
        for name in weights.names():
            home = self.homes[name]
            if home.startswith(within) and name not in split:
                yield name, weights.get(name), home in to_quantize and self.plain.get(home) == name


def quantized_share(model: Any, names: Collection[str], variant: str) -> float:
    """The share of a language model's matrices that the linear layers `names` hold.

    Embeddings, the output head, and what a wrapper has beside its language model (towers, projectors) do not count.
    Raises UserError, naming the variant, for less than 90%."""
    inside, head = _language_modules(model), model.get_output_embeddings()
    sizes = {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        for name, module in model.named_modules()
        if module in inside and module is not head and not isinstance(module, nn.Embedding)
    }
    share = float(sum(sizes.get(name, 0) for name in names) / max(1, sum(sizes.values())))
    if share < LEAST_SHARE:
        instead = "use awq-gemm" if variant.startswith("bnb") else "choose another model, or the variant fp16"
        others = "the others (experts of a mixture?) would stay in half precision"
        raise UserError(f"only {share:.0%} of this model's matrices can be quantized so, {others}: {instead}")
    return share


def _language_modules(model: Any) -> set[nn.Module]:
    """The modules of the language model, without towers that some have inside it."""
    try:
        inner = towers(model, architecture_of(model).layers_name)
    except UserError:  # it has no list of layers
        return set(model.modules())
    within = {part for name in inner for part in model.get_submodule(name).modules()}
    return set(decoder_of(model).modules()) - within


def left_in_half(model: Any, quantized: Collection[str]) -> list[str]:
    """Full names of the modules with matrices that are not among `quantized`, output head and embeddings aside.

    Where nothing inside a module is quantized (a vision tower), it is named as a whole. Full names, since some engines
    take them for parts of names: "gate" would hit every gate_proj."""
    head, found = model.get_output_embeddings(), dict[str, None]()
    around = {name[:place] for name in quantized for place, letter in enumerate(name) if letter == "."} | {""}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding) or module is head:
            continue
        if name not in quantized:
            while (parent := name.rpartition(".")[0]) not in around:
                name = parent
            found[name] = None
    return list(found)


def kept_by_bnb(model: Any, quantized: Collection[str]) -> tuple[str, ...]:
    """What config.json has to name as left in half precision; nothing where transformers' own rule says the same."""
    kinds = {name: set(map(type, model.get_submodule(name).modules())) for name in left_in_half(model, quantized)}
    left, head = [name for name, inside in kinds.items() if nn.Linear in inside], model.get_output_embeddings()
    return (*left, *(name for name, module in model.named_modules() if module is head)) if left else ()


def linear_layers(model: Any) -> list[str]:
    """The names of the linear layers that bitsandbytes quantizes: those that transformers replaces when it loads one.

    That is every linear layer but the output head and what is tied to it, and of a wrapper those of its language model.
    The weights may be on the meta device. Raises UserError for a model whose layers are no nn.Linear (GPT-2's Conv1D).
    """
    with quiet_libraries():
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        inside = _language_modules(model)
        candidates = {
            name: type(module)
            for name, module in model.named_modules()
            if module in inside and should_convert_module(name, kept)
        }
    names = [name for name, kind in candidates.items() if kind is nn.Linear]
    if Conv1D in candidates.values() or not names:
        raise UserError(f"bitsandbytes variants need nn.Linear layers, which {type(model).__name__} does not have")
    return names


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or a buffer of a model, or of a part of one, by its name there."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, value if leaf in module._buffers else nn.Parameter(value, requires_grad=False))
