"""A checkpoint as one GGUF file, which llama.cpp and what is built on it read: tensors, settings and tokenizer.

The package `gguf` has the format and the names of the tensors (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.errors import UserError
from quantize.int4.packing import Q4_1_PART
from quantize.model.pretrained import config_of, tokenizer_of
from quantize.weights import Entry, Weights, read_json

GGUF_NAME = "model.gguf"
NAMES_KEY, TURNED_KEY = "quantable.tensor_names", "quantable.turned_heads"
"""Our own entries: each tensor's name in the model's own files, and the heads whose rows are turned, 0 for none."""


@dataclass(frozen=True)
class Written:
    """How llama.cpp knows a model type.

    turned: whether it wants the two halves of each rotary head interleaved, in the rows of q_proj and k_proj.
    stretch: the kinds of rotary scaling that it computes; biases: the linear layers that may have one."""

    name: str
    turned: bool = False
    stretch: tuple[str, ...] = ("default", "linear")
    biases: tuple[str, ...] = ()


LLAMA = Written("llama", turned=True, stretch=("default", "linear", "llama3"), biases=("q", "k", "v", "o"))
ARCHITECTURES = {
    **{"llama": LLAMA, "mistral": LLAMA, "qwen2": Written("qwen2", biases=("q", "k", "v"))},
    "qwen3": Written("qwen3"),
}
"""By transformers' model type: those whose files are the same tensors under other names."""

LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRETOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA_WORDS % "{1,3}",): "llama-bpe",
    (LLAMA_WORDS % "",): "qwen2",
}
"""How a tokenizer cuts text into words, and what llama.cpp calls that; where it has no name for it, ids may differ."""


def check_gguf(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError for a model or tokenizer that this does not write. names: of the tensors in its files."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("awq-gguf needs a package: pip install gguf")
    config = config_of(folder).get_text_config()
    if (known := ARCHITECTURES.get(config.model_type)) is None:
        raise UserError(f"{config.model_type} is not written as GGUF, only {', '.join(ARCHITECTURES)}: use awq-gemm")
    kind = _rope(config)["rope_type"]
    asked = {
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"rotary scaling {kind}": kind not in known.stretch,
        "rotary embeddings on a part of each head": _rope(config).get("partial_rotary_factor", 1) != 1,
        "a sliding window in some layers": getattr(config, "use_sliding_window", False),
    }
    for wrong in (what for what, is_asked in asked.items() if is_asked):
        raise UserError(f"llama.cpp's {known.name} cannot compute {wrong}, which config.json asks for: use awq-gemm")
    if not (folder / "tokenizer.json").is_file() or read_json(folder / "tokenizer.json")["model"].get("type") != "BPE":
        raise UserError("only byte-pair tokenizers (tokenizer.json) are written as GGUF: use awq-gemm")
    _renamed(config, names)


def _rope(config: Any) -> Mapping[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def write_gguf(weights: Weights, path: Path, name: str, folder: Path) -> int:
    """Write these tensors as a GGUF file, one at a time; the bytes of all.

    Matrices are float16 or blocks of Q4_1, the rest is float32. name: of the model; folder: that has its config and
    tokenizer. Raises UserError for a tensor that the architecture has no name for."""
    import gguf

    config = config_of(folder).get_text_config()
    known = ARCHITECTURES[config.model_type]
    tensors = _renamed(config, weights.names())
    heads_of = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if known.turned else {}
    turned = [heads_of.get(own.split(".")[-2], 0) for own in tensors]
    writer = gguf.GGUFWriter(path, known.name)
    writer.add_name(name)
    _add_settings(writer, config)
    _add_tokenizer(writer, folder, config.vocab_size)
    writer.add_array(NAMES_KEY, list(tensors))
    writer.add_array(TURNED_KEY, turned)
    kinds, packs = gguf.LlamaFileType, any(own.endswith(f".{Q4_1_PART}") for own in tensors)
    writer.add_file_type(kinds.MOSTLY_Q4_1 if packs else kinds.MOSTLY_F16)
    factors, size = _rotary_factors(config), 0
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for own, theirs in tensors.items():
        shape, packed = weights.shape(own), own.endswith(f".{Q4_1_PART}")
        dtype = np.dtype(np.uint8 if packed else np.float16 if len(shape) > 1 else np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if packed else None
        writer.add_tensor_info(theirs, shape, dtype, math.prod(shape) * dtype.itemsize, raw_dtype=kind)
        size += math.prod(shape) * dtype.itemsize
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for own, heads in zip(tensors, turned, strict=True):
        tensor = weights.get(own)
        if tensor.is_floating_point():
            tensor = tensor.half() if tensor.dim() > 1 else tensor.float()
        writer.write_tensor_data((_interleaved(tensor, heads) if heads else tensor).numpy())
    writer.close()
    return size


def _renamed(config: Any, names: Iterable[str]) -> dict[str, str]:
    """What GGUF calls each of these tensors. Raises UserError for one that the architecture has no name for."""
    import gguf

    known, found = ARCHITECTURES[config.model_type], dict[str, str]()
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == known.name)
    theirs = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for own in names:
        module, _, leaf = own.rpartition(".")
        linear, name = module.rpartition(".")[2].removesuffix("_proj"), theirs.get_name(module)
        biased = leaf == "bias" and linear not in known.biases
        if name is None or biased or leaf not in ("weight", "bias", Q4_1_PART):
            raise UserError(f"llama.cpp's {known.name} has no place for {own}: use awq-gemm")
        found[own] = f"{name}.{'weight' if leaf == Q4_1_PART else leaf}"
    return found


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """[heads 2 n, ...]: the rows of each head's two halves in turn, as llama.cpp's rotary embedding pairs them."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _add_settings(writer: Any, config: Any) -> None:
    import gguf

    heads, rope = config.num_attention_heads, _rope(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None) or math.inf  # longer ones need a window that llama.cpp lacks here
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(int(min(config.max_position_embeddings, window)))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rotary_factors(config: Any) -> Any:
    """By what Llama 3.1 divides each rotary frequency, float32 [width / 2]; None for another scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return (plain / scaled).float().numpy()


def _add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """The tokens, how they merge, and how text is cut: as bytes (GPT-2's way) or as SentencePiece's characters."""
    import gguf

    tokenizer, stated = tokenizer_of(folder), read_json(folder / "tokenizer.json")
    model, added = stated["model"], tokenizer.added_tokens_decoder
    in_characters = model.get("byte_fallback", False)
    by_id = {at: token for token, at in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    types = []
    for at in range(vocabulary):
        token, kind = by_id.get(at), kinds.NORMAL
        if token is None:
            kind = kinds.UNUSED
        elif in_characters and at == tokenizer.unk_token_id:
            kind = kinds.UNKNOWN
        elif at in added:
            kind = kinds.CONTROL if added[at].special else kinds.USER_DEFINED
        elif in_characters and len(token) == 6 and token.startswith("<0x"):
            kind = kinds.BYTE
        types.append(kind)
    tokens = [by_id.get(at, f"[PAD{at}]") for at in range(vocabulary)]
    writer.add_tokenizer_model("llama" if in_characters else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if in_characters:  # which merges by score: the earlier of two merges goes first
        merged = ["".join(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
        rank = {token: -float(number) for number, token in reversed(list(enumerate(merged)))}
        writer.add_token_scores([rank.get(token, -float(len(merged))) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("\u2581"))  # a space, in SentencePiece
    else:
        writer.add_tokenizer_pre(_cutting(stated["pre_tokenizer"] or {}))
    ids = tokenizer("a")["input_ids"]
    special = gguf.SpecialVocab(folder, load_merges=not in_characters, n_vocab=vocabulary)
    special.add_special_token = {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)


def _cutting(stated: Mapping[str, Any]) -> str:
    """A value of PRETOKENIZERS, or "default" where there is none. stated: the tokenizer's `pre_tokenizer`."""
    parts: Sequence[Any] = stated.get("pretokenizers", [stated])
    steps = [part["pattern"].get("Regex") if part["type"] == "Split" else part["type"] for part in parts]
    if len(steps) > 1 and steps[-1] == "ByteLevel" and not parts[-1].get("use_regex"):
        steps.pop()
    return PRETOKENIZERS.get(tuple(steps), "default")


@dataclass(frozen=True)
class GgufWeights(Weights):
    """Tensors by the names of the model's own files, in its own order of rows. turned: the heads of those that are."""

    turned: Mapping[str, int] = field(default_factory=dict)

    def get(self, name: str) -> Tensor:
        rows, heads = super().get(name), self.turned[name]
        return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape) if heads else rows


def open_gguf(folder: Path) -> GgufWeights:
    """The tensors of a folder's model.gguf, blocks as uint8 [out, bytes]. Raises UserError for one not written here."""
    import gguf

    path = folder / GGUF_NAME
    try:
        reader = gguf.GGUFReader(path)
        names, turned = (reader.fields[key].contents() for key in (NAMES_KEY, TURNED_KEY))
        by_name = dict(zip(names, turned, strict=True))
        entries = {}
        for own, tensor in zip(names, [one for one in reader.tensors if one.name != "rope_freqs.weight"], strict=True):
            kind = {"Q4_1": "U8"}.get(tensor.tensor_type.name, tensor.tensor_type.name)
            entries[own] = Entry(path, kind, tuple(tensor.data.shape), int(tensor.data_offset), int(tensor.n_bytes))
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged, or not written by `quantize` ({error}): make it again") from None
    return GgufWeights((path,), entries, by_name)
