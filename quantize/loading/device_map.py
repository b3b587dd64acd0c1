"""Where a model goes: the device a user names, or all there are by accelerate's device map; and its weights' bytes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from quantize.errors import UserError
from quantize.model.apart import take_apart
from quantize.model.architecture import architecture_of
from quantize.model.names import linear_layers
from quantize.variant import Variant

FITTING_SHARE = 0.95  # up to this share of a GPU's free memory a model's weights are tried on that GPU alone
SPREAD_SHARE = 0.85  # of a device's free memory, for a spread model's weights: cache and activations follow them
RAM = "cpu"
Memory = Mapping[int | str, int]  # free bytes of each GPU by its number, and of "cpu"


def torch_device(name: str) -> torch.device:
    """The torch device of this name; "auto" is CUDA where there is some. Raises UserError for others, or no CUDA."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no CUDA device here (torch.cuda.is_available() is False): use --device cpu")
    return torch.device(name)


@dataclass(frozen=True)
class Placement:
    """Where a model's modules go.

    main:          the device of the inputs and of everything that the map does not name.
    device_map:    accelerate's, module name -> device; empty for a model on one device.
    weights_bytes: of the whole model, None where it lies on one device.
    description:   how it is spread, for the record."""

    main: torch.device
    device_map: Mapping[str, torch.device] = field(default_factory=dict)
    weights_bytes: int | None = None
    description: str | None = None

    def of(self, name: str) -> torch.device:
        """The device of a module or tensor: that of the nearest module around it that the map names."""
        while name and name not in self.device_map:
            name = name.rpartition(".")[0]
        return self.device_map.get(name, self.main)

    def as_map(self) -> dict[str, torch.device]:
        """For transformers' `device_map`."""
        return dict(self.device_map) or {"": self.main}

    def dispatch(self, model: Any) -> None:
        """Have a spread model move its activations from device to device, and weights from RAM to where they run."""
        if self.device_map:
            from accelerate import dispatch_model

            dispatch_model(model, self.as_map(), main_device=self.main, force_hooks=True)


@dataclass(frozen=True)
class Running:
    """How a model is to run.

    variant:    the row of the table; place: where its modules go; dtype: what they compute in.
    kernel:     as quantize.load takes it.
    group_size: of groups of codes, None for none, or for the largest that fits."""

    variant: Variant
    place: Placement
    dtype: torch.dtype
    kernel: str | None = None
    group_size: int | None = None


def placement_for(
    model: Any, variant: Variant, device: torch.device, dtype: torch.dtype, *, free: Memory | None = None
) -> Placement:
    """Where a model of this variant goes: on the one device where it fits or where there is no GPU, else spread.

    model: with its weights on the meta device; dtype: of the weights that are not quantized. free: left out, what the
    machine has now. GPUs fill up first, from `device` on. Layers of the half-precision reference may also wait in RAM
    and be copied to the GPU for every pass; quantized ones run where they lie. Raises MemoryError where none fits."""
    if device.type != "cuda" and free is None:
        return Placement(device)
    from accelerate.utils import CustomDtype, compute_module_sizes, get_max_memory, infer_auto_device_map

    model.tie_weights()  # else a tied embedding would count twice
    there = dict(get_max_memory() if free is None else free)
    sizes = ((4, CustomDtype.INT4), (8, torch.int8))
    stored = next((small for bits, small in sizes if variant.w_bit and variant.w_bit <= bits), dtype)
    special = {f"{name}.weight": stored for name in _quantized(model, variant)}
    needed = int(compute_module_sizes(model, dtype=dtype, special_dtypes=special)[""])
    first = device.index or 0
    if needed <= FITTING_SHARE * there[first]:
        return Placement(device)
    room = {key: int(size * SPREAD_SHARE) for key, size in there.items()}
    gpus = [first, *sorted(key for key in room if isinstance(key, int) and key != first)]
    usable: dict[int | str, int] = {key: room[key] for key in gpus}
    if variant.w_bit is None:
        usable[RAM] = room[RAM]
    classes = list(getattr(model, "_no_split_modules", None) or ())
    found = infer_auto_device_map(
        model, max_memory=usable, no_split_module_classes=classes, dtype=dtype, special_dtypes=special
    )
    if not set(found.values()) <= set(usable):
        places = ", ".join(f"{_device(key)} {size / 1e9:.1f} GB" for key, size in usable.items())
        raise MemoryError(f"{needed / 1e9:.1f} GB of weights do not fit in what is free for them here: {places}")
    spread = Placement(device, {name: _device(key) for name, key in found.items()}, needed)
    layers = [name for name, module in model.named_modules() if type(module).__name__ in classes]
    counts = Counter(str(spread.of(name)) for name in layers)
    description = "decoder layers: " + ", ".join(f"{count} on {place}" for place, count in counts.items())
    return replace(spread, description=description.replace(f"on {RAM}", "in RAM"))


def _quantized(model: Any, variant: Variant) -> list[str]:
    if variant.w_bit is None:
        return []
    if variant.version is None:
        return linear_layers(model)
    take_apart(model)
    return [name for name, _, _ in architecture_of(model).shapes()]


def _device(key: int | str) -> torch.device:
    return torch.device("cuda", key) if isinstance(key, int) else torch.device(key)


def weights_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and bitsandbytes' scales beside them; a storage that several share counts once."""
    return _storage_bytes((*model.parameters(), *model.buffers()))


def decode_bytes(model: Any) -> int | None:
    """Bytes of weights and buffers that a decode step must read, each storage once: all but the input embedding, of
    which it takes one row, unless an output head is tied to it. None for a model that does not name its own."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    embedding = model.get_input_embeddings()
    read = set(model.modules()) - set(embedding.modules() if embedding is not None else ())
    return _storage_bytes(one for own in read for one in (*own.parameters(recurse=False), *own.buffers(recurse=False)))


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of these tensors, and of what bitsandbytes keeps beside them."""
    storages = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        holders = (tensor, state, getattr(state, "state2", None))
        beside = [getattr(holder, name, None) for holder in holders for name in ("SCB", "absmax", "code", "offset")]
        for part in (tensor, *beside):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                storages[(str(part.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
