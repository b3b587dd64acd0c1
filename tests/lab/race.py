"""A race of AWQ quantizers in one run: the same model, the same calibration tokens, one process each.

`python -m tests.lab.race --out runs/race` appends a record of each to race.jsonl: seconds, peak memory, perplexity and
KL divergence. `python -m tests.lab.pages runs/race/race.jsonl` makes the table.
"""

import argparse
import sys
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.records.store import append
from bench.run.executor import run_module
from bench.worker.machine import fingerprint
from bench.worker.quality import kl_nats, predictions, quality
from quantize.calibration import (
    BUILTIN,
    PARAGRAPH,
    blocks_sha256,
    builtin_texts,
    listed_texts,
    text_from,
    token_blocks,
    unseen_paragraphs,
)
from quantize.errors import UserError
from quantize.int4.layouts import LAYOUTS
from quantize.model.pretrained import model_of, tokenizer_of
from quantize.quiet import quiet_libraries
from quantize.shell import guarded
from quantize.source import open_source
from tests.lab.quantizers import CONTENDERS, OURS
from tests.lab.records import RaceRecord, TextFacts

RACE_NAME = "race.jsonl"
OTHER = Path(__file__).with_name("other.toml")
LEAST_CHARACTERS = 8 * 512 * 8  # of the other text: twice what 8 blocks of 512 tokens take


def race(arguments: argparse.Namespace) -> None:
    """Run the contenders in turn, ours between the others, each evaluated on the same text; append their records."""
    names, out, group_size = arguments.contender or list(CONTENDERS), arguments.out, arguments.group_size
    if not arguments.timeout > 0:
        raise UserError("--timeout must be above 0 seconds")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise UserError(f"unknown contender {unknown[0]!r}; there are: {', '.join(CONTENDERS)}")
    with quiet_libraries():
        folder = open_source(arguments.source).folder
        reference, tokenizer = model_of(folder, dtype=torch.float32), tokenizer_of(folder)
    size = {"blocks": arguments.blocks, "block_tokens": arguments.block_tokens}
    blocks = token_blocks(text_from(BUILTIN, print), tokenizer, **size)
    judged = {"calibration": builtin_texts("evaluation"), "other": licence_texts()}
    texts = {kind: token_blocks(text, tokenizer, blocks=8, block_tokens=512) for kind, text in judged.items()}
    facts = {kind: TextFacts((text.shape[0], text.shape[1]), blocks_sha256(text)) for kind, text in texts.items()}
    shape = blocks.shape[0], blocks.shape[1]
    blank = RaceRecord("", "", folder.name, shape, blocks_sha256(blocks), facts, fingerprint("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    save_file({"blocks": blocks}, out / "blocks.safetensors")
    for name in turns(names, OURS):
        log = out / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        layers = log.with_suffix(".safetensors")
        task = [name, str(folder), str(out / "blocks.safetensors"), str(group_size), str(layers)]
        ended = run_module("tests.lab.quantizers", *task, timeout_s=arguments.timeout)
        log.write_text(ended.output)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        figures: dict[str, Any] = {"reason": ended.verdict()[1]}
        if ended.exit_code == 0:
            with quiet_libraries():
                figures = figures_of(layers, folder, group_size, reference, texts)
        record = replace(blank, when=when, contender=name, **figures)
        append(out / RACE_NAME, record)
        print(f"{name}: {record.reason or f'{record.seconds:.1f} s'}", flush=True)
    print(f"the table: python -m tests.lab.pages {out / RACE_NAME}")


def turns(names: Sequence[str], ours: Container[str]) -> list[str]:
    """Who runs when: ours first and again after each of the others, the machine may change; the table has medians."""
    own = [name for name in names if name in ours]
    others = [[name, *own] for name in names if name not in ours]
    return own + [name for turn in others for name in turn]


def licence_texts() -> list[str]:
    """English that is no documentation: the licences that OTHER names, each paragraph once, none of the calibration's.

    Other versions are taken as they are, and told in a line. Raises UserError where less than 8 x 512 tokens are left.
    """
    found, told = listed_texts(OTHER)
    seen: set[str] = set()
    for text in builtin_texts("calibration"):
        seen.update(" ".join(paragraph.split()) for paragraph in text.split(PARAGRAPH))
    texts = [PARAGRAPH.join(unseen_paragraphs(text, seen)) for texts in found.values() for text in texts]
    if sum(map(len, texts)) < LEAST_CHARACTERS:
        raise UserError(f"too little other text to race on ({told}): pip install -c constraints.txt -e '.[models]'")
    if told:
        print(f"the other text is not that of constraints.txt: {told}")
    return [text for text in texts if text]


def figures_of(
    layers: Path, folder: Path, group_size: int, reference: Any, texts: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The figures of a RaceRecord: what the contender says itself, and how the model with its layers does on each text.

    reference: the model of `folder`, as it is.
    """
    with safe_open(layers, framework="pt") as file:
        said = file.metadata()
    model = model_of(folder, dtype=torch.float32)
    put_layers(model, load_file(layers), group_size)
    return {
        "seconds": float(said["seconds"]),
        "peak_bytes": int(said["peak_bytes"]),
        "perplexity": {kind: quality(model, text).perplexity for kind, text in texts.items()},
        "divergence": {kind: float(divergences(reference, model, text).mean()) for kind, text in texts.items()},
    }


@torch.no_grad()
def divergences(reference: Any, model: Any, blocks: Tensor) -> Tensor:
    """KL(reference || model) of the next-token distributions in nats, float64 [blocks * (block_tokens - 1)].

    The two models are walked side by side, so that no logits of the whole text are kept.
    """
    parts = []
    for (expected, _), (logits, _) in zip(predictions(reference, blocks), predictions(model, blocks), strict=True):
        exact, other = (torch.log_softmax(one.double(), dim=-1) for one in (expected, logits))
        parts.append(kl_nats(exact, other))
    return torch.cat(parts)


@torch.no_grad()
def put_layers(model: Any, tensors: dict[str, Tensor], group_size: int) -> None:
    """Overwrite a dense model's weights with packed layers (GEMM layout) and the other tensors, dequantized exactly."""
    parameters = dict(model.named_parameters())
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        packed = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        weight = LAYOUTS["GEMM"].unpack(packed, packed["qweight"].shape[0], {"group_size": group_size}).weight
        parameters[f"{name}.weight"].copy_(weight.dequantize())
    for name in parameters.keys() & tensors.keys():
        parameters[name].copy_(tensors[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race; return its exit code."""
    cli = argparse.ArgumentParser(prog="race", description=__doc__)
    add = cli.add_argument
    add("--source", default="smollm2-135m")
    add("--out", type=Path, default=Path("runs/race"), help="folder for the results (default %(default)s)")
    add("--blocks", type=int, default=48)
    add("--block-tokens", type=int, default=256)
    add("--group-size", type=int, default=64)
    add("--contender", action="append", help="run only these (repeatable); default: all that can run")
    add("--timeout", type=float, default=3 * 3600.0, help="seconds for one contender (default %(default)g)")
    return guarded("race", lambda: race(cli.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
