"""Names in files and names of parameters, by transformers' own conversion mapping."""

import re
from collections.abc import Iterable
from typing import Any

from quantize.errors import UserError


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
    known = model.state_dict()
    prefix = model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, known)[0] for name in file_names}


def missing_parameters(model: Any, file_names: Iterable[str]) -> list[str]:
    """The model's parameters that no tensor of the files is loaded into and that nothing else is tied to."""
    held = set(parameters_by_file_name(model, file_names).values())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        name
        for name, _ in model.named_parameters()
        if name not in held | tied and not any(re.search(pattern, name) for pattern in optional)
    ]


def check_covered(model: Any, file_names: Iterable[str]) -> None:
    """Raise UserError, naming one, for parameters of the model that its files do not hold.

    transformers would fill them with random numbers.
    """
    missing = missing_parameters(model, file_names)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"the source's weights lack {missing[0]}{more}, which config.json asks for: the folder holds another model "
            "than its config says, or a part of it; give the whole model, as its causal-LM class saves it"
        )
