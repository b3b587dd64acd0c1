"""The weights of a model's folder: safetensors files, and what may lie beside them."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from quantize.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


def regular_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files directly in a model's folder that fit a pattern, sorted; raises UserError as `check_regular` does."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    for path in found:
        check_regular(path)
    return [path for path in found if path.is_file()]


def check_regular(path: Path) -> None:
    """Raise UserError for what is no regular file (a device, a pipe), or a link out of its folder.

    It may lead to the same repository in the hub's cache."""
    home, target = path.parent.resolve(), path.resolve()
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.is_symlink() and not any(target.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link out of its folder: put the file itself there")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UserError(f"{path} is no regular file: give the folder of a model, as transformers saves it")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises UserError, naming the file, for what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): fix its permissions, or download it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged (no JSON object): download it again")
    return data


QUANTIZED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""What states a quantization beside a config that does not, and the method whose file it is."""


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """What a folder states of its quantization, None for a model that is not quantized. It names its quant_method."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if given := part.get(key) if isinstance(part, dict) else None:
                stated = given if isinstance(given, dict) else {}
                return {**stated, "quant_method": str(stated.get("quant_method") or key)}
    for name, method in QUANTIZED_FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method, **read_json(folder / name)}
    return None


class TensorReader(Protocol):
    """Tensors by name, each read or drawn when it is asked for."""

    def names(self) -> list[str]: ...
    def get(self, name: str) -> torch.Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as safetensors names it, its shape, and which bytes it has."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder's safetensors files, these sorted by name; each is read when it is asked for."""

    files: tuple[Path, ...]
    _entries: Mapping[str, Entry]

    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def bytes(self) -> int:
        """Of all tensors, their files' headers left out."""
        return sum(entry.size for entry in self._entries.values())

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype of the file. Raises KeyError for an unknown name."""
        # Read, not mapped: a file that stays mapped counts as this process's memory, page after page.
        entry, dtype = self._entries[name], self.dtype(name)
        data = bytearray(entry.size)
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(data) != entry.size:
                raise UserError(f"{entry.path} was cut short while it was read: run again once nothing writes to it")
        return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it. Raises UserError for one that no plain model has."""
        dtype = self._entries[name].dtype
        if dtype not in DTYPES:
            raise UserError(f"weight {name} is of type {dtype}: give the model in half precision")
        return DTYPES[dtype]


def open_weights(folder: Path) -> Weights:
    """The weights of a model's folder: model.safetensors, or the files that its index names.

    Every file's header is checked against its size. Raises UserError, naming the file, when there are no safetensors, a
    file is cut short or damaged, or the index names a file or tensor that is not there."""
    single, index_path, index = folder / SINGLE_NAME, folder / INDEX_NAME, dict[str, str]()
    check_regular(single)
    if not single.is_file():
        if not index_path.is_file():
            raise UserError(_why_no_weights(folder))
        index = _read_index(index_path)
    paths = [folder / name for name in sorted(set(index.values()))] or [single]
    held = {path.name: _entries_in(path) for path in paths}
    for name, file_name in index.items():
        if name not in held[file_name]:
            raise UserError(f"{index_path} names {name}, which {file_name} does not hold: download the model again")
    entries = {name: found[name] for found in held.values() for name in sorted(found)}
    entries |= {name: held[file_name][name] for name, file_name in index.items()}
    if not entries:
        raise UserError(f"{paths[0]} holds no weights: download it again")
    return Weights(tuple(paths), entries)


def _entries_in(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, framework="pt"):  # which checks the header, and that it says how long the file is
            pass
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise UserError(f"{path} is a git-lfs pointer, no weights: run `git lfs pull` there") from None
        raise UserError(f"{path} is damaged or cut short ({error}): download it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}): fix its permissions, or download it again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Entry(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{path} is damaged (no weight_map): download it again")
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise UserError(f"{path} names {file!r}, which is no file of this folder: download the model again")
        check_regular(path.parent / file)
        if not (path.parent / file).is_file():
            raise UserError(f"{path.parent / file} is missing, but {INDEX_NAME} names it: download the model again")
    return index


def _why_no_weights(folder: Path) -> str:
    if any(folder.glob("*.safetensors")):
        return f"{folder} has safetensors, but no {SINGLE_NAME} and no {INDEX_NAME}: download the model again"
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        advice = "convert them to safetensors (transformers: save_pretrained)"
        return f"{folder} has its weights only as pickles, which can run code when they are read: {advice}"
    return f"{folder} has no weights as safetensors ({SINGLE_NAME}): download the model again, or convert it"


def is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float32).item()):
        return True  # NaN and Inf stay in a sum, which is one quick pass
    return bool(torch.isfinite(tensor).all())


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise UserError, naming the tensor, when it holds NaN or infinity."""
    if not is_finite(tensor):
        what = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        share = f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values"
        raise UserError(f"weight {name} holds {what} ({share}): the model is damaged, download it again")
