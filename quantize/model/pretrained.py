"""How transformers reads a folder here: never a model's own code, never a pickle, never a question to the user."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantize.errors import UserError
from quantize.process_memory import collector_paused

MOST_LAYERS = 10_000  # more are a damaged config, which would take for ever to build
WHOLE = "give the whole model, as its causal-LM class saves it"


def config_of(folder: Path) -> Any:
    """The transformers config of a folder. Raises UserError where transformers has no such model of its own."""
    from transformers import AutoConfig

    with readable(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not 0 < config.get_text_config().num_hidden_layers <= MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is not between 1 and {MOST_LAYERS}")
    return config


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder. Raises UserError for one that transformers cannot read."""
    from transformers import AutoTokenizer

    with readable(folder, "the tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def model_class(config: Any) -> Any:
    """The class that a config names where that generates text, else its type's causal LM; ValueError where none is."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for name in getattr(config, "architectures", None) or ():
        named: Any = getattr(transformers, str(name), None)
        ours = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        if ours and named.config_class is type(config) and named.can_generate():
            return named
    if (found := MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)) is None:
        raise ValueError(f"model type {config.model_type!r} has no causal language model")
    return found


def model_of(folder: Path, **how: Any) -> Any:
    """A folder's causal LM with its weights. how: dtype, device_map. Raises UserError for weights that do not fit."""
    config = config_of(folder)
    with readable(folder, "config.json"):
        kind = model_class(config)
    how |= {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = kind.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **how)
    refuse_misfit(folder, found)
    return model


def bring_to(model: Any, dtype: torch.dtype) -> None:
    """Give all parameters that are floats this dtype; what a checkpoint does not quantize comes in that of the file."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def refuse_misfit(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise UserError for what transformers found missing, left over or of another shape: its loading info."""
    if missing := sorted(found["missing_keys"]):
        why = "the folder holds another model than its config says, or a part of it"
        raise UserError(f"{folder}: the weights lack {_first(missing)}, which config.json asks for: {why}; {WHOLE}")
    if wrong := sorted((name, list(held), list(asked)) for name, held, asked in found["mismatched_keys"]):
        shapes = f"of shape {wrong[0][1]} where config.json asks for {wrong[0][2]}, as if it mixed files of two models"
        raise UserError(f"{folder} has {_first([one[0] for one in wrong])} {shapes}: download it again")
    if extra := sorted(found["unexpected_keys"]):
        why = "the folder holds another model, or an adapter that was not merged"
        raise UserError(f"{folder}: the model of config.json has no place for {_first(extra)}: {why}; {WHOLE}")


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@collector_paused()
def empty_model(folder: Path, *, config: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a folder's config.json, or of this config, its weights on the meta device.

    Buffers that no file holds (rotary frequencies) are real. Raises UserError as `config_of` does."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = config_of(folder) if config is None else config
    with readable(folder, "config.json"), no_init_weights(), init_empty_weights(include_buffers=False):
        return model_class(config)._from_config(config, dtype=dtype).eval()


@contextmanager
def readable(folder: Path, what: str) -> Iterator[None]:
    """What a library raises because of what a file says becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            reason = "its model is code of its own (auto_map), which is never run"
        advice = "give a causal language model that transformers has"
        raise UserError(f"{folder}: transformers cannot read {what} ({reason}): {advice}") from None
