"""Names of a transformers model's parameters and layers, by transformers' own rules."""

import re
from collections.abc import Iterable
from typing import Any

import torch

from quantize.errors import UserError
from quantize.quiet import quiet_libraries


def check_covered(model: Any, file_names: Iterable[str]) -> None:
    """Raise UserError, naming one, for parameters that no tensor of the files is loaded into or tied to.

    transformers would fill them with random numbers. Its own conversion mapping says which name in a file leads to
    which parameter; several may lead to one (experts of a mixture are stacked). model: its weights may be on the meta
    device.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    held = {rename_source_key(name, renamings, converters, prefix, known)[0] for name in file_names}
    held |= set(getattr(model, "all_tied_weights_keys", None) or ())
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    wanted = [name for name, _ in model.named_parameters() if name not in held]
    missing = [name for name in wanted if not any(re.search(pattern, name) for pattern in optional)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"the source's weights lack {missing[0]}{more}, which config.json asks for: the folder holds another model "
            "than its config says, or a part of it; give the whole model, as its causal-LM class saves it"
        )


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
    names = [name for name, kind in candidates.items() if kind is torch.nn.Linear]
    if Conv1D in candidates.values() or not names:
        raise UserError(f"bitsandbytes variants need nn.Linear layers, which {type(model).__name__} does not have")
    return names
