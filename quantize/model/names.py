"""Names of a transformers model's parameters and layers, by transformers' own rules."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from quantize.errors import UserError
from quantize.quiet import quiet_libraries

LEAST_SHARE = 0.9


def parameters_by_file_name(model: Any, file_names: Iterable[str]) -> dict[str, str]:
    """File name -> the parameter or buffer of this transformers model that transformers would load it into.

    Several names in files may lead to one parameter (experts of a mixture are stacked). model: its weights may be on
    the meta device.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, known)[0] for name in file_names}


def quantized_share(model: Any, names: Iterable[str]) -> float:
    """The share of a model's matrices, embeddings and output head aside, that the linear layers `names` hold.

    Raises UserError for less than 90%.
    """
    outer = {id(model.get_output_embeddings())} | {id(m) for m in model.modules() if isinstance(m, nn.Embedding)}
    sizes = {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        for name, module in model.named_modules()
        if id(module) not in outer
    }
    share = float(sum(sizes[name] for name in names) / sum(sizes.values()))
    if share < LEAST_SHARE:
        raise UserError(
            f"only {share:.0%} of this model's matrices are linear layers that can be quantized, the others (experts "
            "of a mixture?) would stay in half precision: choose another model, or the variant fp16"
        )
    return share


def linear_layers(model: Any) -> list[str]:
    """The names of the linear layers that are quantized where nothing maps a model's scales, as bitsandbytes' are.

    They are those that transformers replaces when it loads one: every linear layer but the output head and what is
    tied to it. The model's weights may be on the meta device.

    Raises UserError for a model whose layers are no nn.Linear (GPT-2's Conv1D).
    """
    with quiet_libraries():
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        candidates = {name: type(m) for name, m in model.named_modules() if should_convert_module(name, kept)}
    names = [name for name, kind in candidates.items() if kind is nn.Linear]
    if Conv1D in candidates.values() or not names:
        raise UserError(f"bitsandbytes variants need nn.Linear layers, which {type(model).__name__} does not have")
    return names


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or a buffer of a model, or of a part of one, by its name there."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    kept = value if leaf in module._buffers else nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, kept)
