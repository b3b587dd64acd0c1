"""Checkpoints that somebody else made, and plain half-precision folders: what they are, by what lies in them."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.checkpoint import Checkpoint, FileFacts, Manifest, SourceFacts, is_model, open_checkpoint
from quantize.errors import UserError
from quantize.files import sha256_of
from quantize.int4.layouts import format_of, group_size_of
from quantize.source import BESIDE_WEIGHTS, TOKENIZERS, folder_name
from quantize.variant import REFERENCE, Variant, known_variants
from quantize.weights import check_regular, open_weights, quantization_config, regular_files

AWQ_LAYOUTS = {"gemm": "awq-gemm", "gemv": "awq-gemv"}
GPTQ_FORMATS = ("gptq", "gptq_v2")


def variant_of(config: Mapping[str, Any] | None) -> Variant:
    """Which of known_variants() a checkpoint is, by what its config states; without a quantization the reference."""
    if config is None:
        return REFERENCE
    method, form, name = str(config.get("quant_method")).lower(), format_of(config), "foreign"
    bits = None if _of_several_bits(config) else config.get("bits", config.get("w_bit"))
    if method == "auto-round":
        packing = str(config.get("packing_format", ""))
        method, form = next(((kind, "") for kind in ("awq", "gptq") if kind in packing), (method, ""))
    if method == "awq" and bits == 4:
        name = AWQ_LAYOUTS.get(form or "gemm", name)
    elif method == "gptq" and bits == 4 and (form or "gptq") in GPTQ_FORMATS:
        name = "gptq"
    elif method == "compressed-tensors" and _packs_four_bits(config):
        name = "ct"
    elif method == "bitsandbytes":
        name = "bnb-4bit" if config.get("load_in_4bit") else "bnb-8bit"
    return known_variants()[name]


def _of_several_bits(config: Mapping[str, Any]) -> bool:
    """Whether some layers have other bits than most: gptqmodel and auto-round say so by a layer's name or pattern."""
    own = [one for key in ("dynamic", "extra_config") if isinstance(one := config.get(key), dict)]
    stated = {str(one.get("bits")) for layers in own for one in layers.values() if isinstance(one, dict)}
    return not stated <= {"None", str(config.get("bits")), "16", "32"}  # of 16 bits and more it is left as it was


def _packs_four_bits(config: Mapping[str, Any]) -> bool:
    groups = list((config.get("config_groups") or {}).values())
    kinds = {((one.get("weights") or {}).get("num_bits"), bool(one.get("input_activations"))) for one in groups}
    return config.get("format") == "pack-quantized" and kinds == {(4, False)}


def checkpoint_in(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, whoever made it; another maker's as it is loaded, its files not yet hashed.

    Raises UserError where there is none."""
    return foreign_checkpoint(folder) if is_model(folder) else open_checkpoint(folder)


def foreign_checkpoint(
    folder: Path, *, base_model: str | None = None, source: SourceFacts | None = None, hashed: bool = False
) -> Checkpoint:
    """A folder of another maker as a checkpoint. Its identity is the hash of its files: of config, weights, tokenizer.

    base_model, source: of the model it was made from, its own where it is half precision. Raises UserError for a folder
    without weights as safetensors, without tokenizer, or with files that are none."""
    check_regular(folder / "config.json")
    stated, weights = quantization_config(folder), open_weights(folder)
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json): copy that of its base model into it")
    paths = [*weights.files, *regular_files(folder, BESIDE_WEIGHTS)]
    facts = {path.name: FileFacts(path.stat().st_size, sha256_of(path) if hashed else "") for path in paths}
    variant, name = variant_of(stated), folder_name(folder.resolve())
    unknown: dict[str, Any] = {"calibration": None, "options": {}, "libraries": {}, "seconds": {}}
    manifest = Manifest(
        name=name,
        base_model=base_model or name,
        variant=variant.name,
        q_group_size=group_size_of(stated) if stated and variant.is_awq else None,
        source=source or SourceFacts("folder", str(folder), None, None),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weights_bytes=weights.bytes,
        files=facts,
        **unknown,
    )
    return Checkpoint(folder, manifest)


def base_in_card(folder: Path) -> str | None:
    """The one base model that the card of a checkpoint names, as a hub id."""
    from huggingface_hub import metadata_load

    try:
        named = (metadata_load(folder / "README.md") or {}).get("base_model")
    except Exception:  # whatever the card holds, if there is one, it names no model
        return None
    named = named if isinstance(named, list) else [named]
    return named[0] if len(named) == 1 and isinstance(named[0], str) else None
