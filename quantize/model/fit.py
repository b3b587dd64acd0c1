"""A source's files against the model that its config.json describes, by transformers' own loading, on shapes alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantize.errors import UserError
from quantize.kernels.base import dtype_name
from quantize.model.names import FileNames
from quantize.model.pretrained import empty_model, readable, refuse_misfit
from quantize.quiet import quiet_libraries
from quantize.weights import TensorReader


def fitting_model(folder: Path, weights: TensorReader, say: Callable[[str], object]) -> Any:
    """The transformers model of a folder, its weights on the meta device, once its files are known to fit it.

    Tied weights that differ in the files are not tied, which the user is told. Raises as `empty_model` and `check_fit`.
    """
    model = empty_model(folder)
    files = FileNames.of(model, weights.names())
    check_fit(folder, model, weights, files)
    for pair in model.all_tied_weights_keys.items():
        if not files.plain.keys() >= set(pair) or torch.equal(*(weights.get(files.plain[name]) for name in pair)):
            continue
        say(f"{pair[0]} differs from {pair[1]}, to which config.json ties it: both are kept, as transformers does")
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model = empty_model(folder, config=model.config)
    return model


def check_fit(folder: Path, model: Any, weights: TensorReader, files: FileNames) -> None:
    """Raise UserError, naming a tensor and what is wrong, where files and model do not fit each other.

    A parameter that no file holds, which would be random; a tensor that the model has no place for; another shape; a
    dtype that is no plain floating point. Renaming, conversion and tying are transformers' own: it loads the files'
    shapes, no values, into a model of the same class."""
    from transformers.initialization import no_init_weights

    parameters = dict(model.named_parameters())
    for name, home in files.homes.items():
        if not weights.dtype(name).is_floating_point and home in parameters:
            kind = dtype_name(weights.dtype(name))
            raise UserError(f"{folder}: weight {name} is of type {kind}: give the model in half precision")
    held, ties = {name: tuple(weights.shape(name)) for name in weights.names()}, model.all_tied_weights_keys
    whole = {name: tuple(tensor.shape) for name, tensor in files.known.items()}
    asked = {name: shape for name, shape in whole.items() if name in held or name not in ties}
    if held == asked and all(name == home for name, home in files.homes.items()):
        return  # every name and shape as transformers saves them
    on_cpu = {name for one in files.conversions.values() if one.converter.force_cpu for name, _ in one.sources}
    shapes = {
        name: torch.empty(shape, dtype=weights.dtype(name), device="cpu" if name in on_cpu else "meta")
        for name, shape in held.items()
    }
    with quiet_libraries(), readable(folder, "the weights"), no_init_weights():
        how = {"config": model.config, "state_dict": shapes, "device_map": {"": "meta"}, "dtype": torch.float32}
        how |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        _, found = type(model).from_pretrained(None, **how, use_safetensors=True)
    refuse_misfit(folder, found)
