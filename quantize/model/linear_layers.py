"""Which linear layers of a transformers model are quantized where nothing maps its scales."""

from typing import Any

import torch

from quantize.errors import UserError
from quantize.quiet import quiet_libraries


def linear_layers(model: Any) -> list[str]:
    """The names of the linear layers of a transformers model that are quantized, bitsandbytes' among others.

    They are those that transformers replaces when it loads one: every linear layer but the output head and
    what is tied to it. The model's weights may be on the meta device.

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
