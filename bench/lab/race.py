"""A race of AWQ quantizers in one run: the same model, the same calibration tokens, one process each.

`python -m bench.lab.race --out runs/race` appends a record of each to race.jsonl: seconds, peak memory, perplexity and
KL divergence. `report runs/race/race.jsonl` makes the table.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Container, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.lab.quantizers import CONTENDERS, OURS, Task
from bench.records.lab import RaceRecord, TextFacts
from bench.records.store import append
from bench.run.executor import run_module
from bench.worker.machine import fingerprint
from bench.worker.quality import divergences, quality
from quantize.calibration import PARAGRAPH, blocks_sha256, builtin_texts, text_from, token_blocks, unseen_paragraphs
from quantize.errors import UserError
from quantize.int4.packing import unpack_gemm
from quantize.model.pretrained import model_of, tokenizer_of
from quantize.quiet import quiet_libraries
from quantize.shell import guarded
from quantize.source import open_source

RACE_NAME = "race.jsonl"
TIMEOUT_S = 3 * 3600.0
"""For one contender."""

EVALUATION_BLOCKS = {"blocks": 8, "block_tokens": 512}
"""Of each text that the contenders are judged on."""


def parser() -> argparse.ArgumentParser:
    """The command line of the race."""
    p = argparse.ArgumentParser(prog="race", description=__doc__)
    p.add_argument("--source", default="smollm2-135m")
    p.add_argument("--out", type=Path, default=Path("runs/race"), help="folder for the results (default %(default)s)")
    p.add_argument("--blocks", type=int, default=48)
    p.add_argument("--block-tokens", type=int, default=256)
    p.add_argument("--group-size", type=int, default=64)
    p.add_argument("--contender", action="append", help="run only these (repeatable); default: all that can run")
    p.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for one contender (default %(default)g)")
    p.add_argument(
        "--keep", action="store_true", help="do not run who left layers in --out before, only evaluate them again"
    )
    p.add_argument(
        "--other", type=Path, help="a .txt file of another kind of text; default: the licences installed here"
    )
    return p


def race(arguments: argparse.Namespace) -> list[RaceRecord]:
    """Run the contenders in turn, ours between the others, each evaluated on the same text; append their records."""
    names = arguments.contender or list(CONTENDERS)
    if not arguments.timeout > 0:
        raise UserError("--timeout must be above 0 seconds")
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"unknown contender {name!r}; there are: {', '.join(CONTENDERS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        evaluation = Evaluation(arguments.source, arguments.blocks, arguments.block_tokens, arguments.other)
        blocks = arguments.out / "blocks.safetensors"
        if arguments.keep and blocks.is_file() and not torch.equal(load_file(blocks)["blocks"], evaluation.blocks):
            raise UserError(f"{arguments.out} was raced on other calibration tokens: leave --keep out")
        save_file({"blocks": evaluation.blocks}, blocks)
    records: list[RaceRecord] = []
    for name in names if arguments.keep else turns(names, OURS):
        stem = arguments.out / name.replace(", ", "-").replace(" ", "-")
        task = asdict(Task(str(evaluation.folder), str(blocks), f"{stem}.safetensors", arguments.group_size))
        done = (kept(task, stem) if arguments.keep else None) or run_contender(name, task, stem, arguments.timeout)
        record = replace(evaluation.record(name), **done)
        if record.reason is None:
            with quiet_libraries():
                record = replace(record, **evaluation.figures(Path(task["out"]), arguments.group_size))
        records.append(record)
        append(arguments.out / RACE_NAME, record)
        print(f"{name}: {record.reason or f'{record.seconds:.1f} s'}", flush=True)
    print(f"the table: report {arguments.out / RACE_NAME}")
    return records


def turns(names: Sequence[str], ours: Container[str]) -> list[str]:
    """Who runs when: ours first and again after each of the others, the machine may change; the table has medians."""
    own = [name for name in names if name in ours]
    others = [[name, *own] for name in names if name not in ours]
    return own + [name for turn in others for name in turn]


def run_contender(name: str, task: dict[str, Any], stem: Path, timeout_s: float) -> dict[str, Any]:
    """One contender in its own process: its seconds and peak_bytes, or why there are none; its words go to a log."""
    request_path = stem.with_suffix(".request.json")
    request_path.write_text(json.dumps(task))
    ended = run_module("bench.lab.quantizers", name, str(request_path), timeout_s=timeout_s)
    stem.with_suffix(".log").write_text(ended.output)
    return _quantized(stem) if ended.exit_code == 0 else {"reason": ended.verdict()[1]}


def kept(task: dict[str, Any], stem: Path) -> dict[str, Any] | None:
    """What a contender that was asked the same did before; None where it left nothing."""
    try:
        before = json.loads(stem.with_suffix(".request.json").read_text())
        return _quantized(stem) if before == task and Path(task["out"]).is_file() else None
    except (OSError, ValueError):
        return None


def _quantized(stem: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stem.with_suffix(".json").read_text())
    return found


def licence_texts() -> list[str]:
    """The licence files of the installed packages, each paragraph once: English that is no documentation."""
    files = [
        Path(str(file.locate()))
        for distribution in sorted(importlib.metadata.distributions(), key=lambda one: one.name.lower())
        for file in sorted(distribution.files or [], key=str)
        if file.suffix in ("", ".txt", ".md", ".rst") and "licens" in file.name.lower()
    ]
    seen: set[str] = set()
    found = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()]
    return [text for one in found if (text := PARAGRAPH.join(unseen_paragraphs(one, seen)))]


class Evaluation:
    """The reference model in float32, the calibration tokens that all contenders get, and the texts to evaluate on.

    folder:    the reference's.
    reference: the model.
    blocks:    calibration token ids, int64 [blocks, tokens].
    texts:     "calibration" (held-out text of the calibration's kind) and "other", token ids [blocks, tokens].
    """

    def __init__(self, source: str, blocks: int, block_tokens: int, other: Path | None) -> None:
        self.folder = open_source(source).folder
        self.reference = model_of(self.folder, dtype=torch.float32)
        tokenizer = tokenizer_of(self.folder)
        calibration = builtin_texts("calibration")
        self.blocks = token_blocks(calibration, tokenizer, blocks=blocks, block_tokens=block_tokens)
        other_texts = text_from(str(other)) if other is not None else licence_texts()
        texts = {"calibration": builtin_texts("evaluation"), "other": other_texts}
        self.texts = {kind: token_blocks(text, tokenizer, **EVALUATION_BLOCKS) for kind, text in texts.items()}

    def figures(self, layers: Path, group_size: int) -> dict[str, Any]:
        """`perplexity` and `divergence` (mean KL, nats a token) of the model with these layers, on each text."""
        model = model_of(self.folder, dtype=torch.float32)
        put_layers(model, load_file(layers), group_size)
        means = {kind: float(divergences(self.reference, model, text).mean()) for kind, text in self.texts.items()}
        return {
            "perplexity": {kind: quality(model, text).perplexity for kind, text in self.texts.items()},
            "divergence": means,
        }

    def record(self, contender: str) -> RaceRecord:
        """What is raced, without the contender's figures."""
        return RaceRecord(
            when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            contender=contender,
            model=self.folder.name,
            blocks=(self.blocks.shape[0], self.blocks.shape[1]),
            blocks_sha256=blocks_sha256(self.blocks),
            texts={kind: TextFacts((t.shape[0], t.shape[1]), blocks_sha256(t)) for kind, t in self.texts.items()},
            environment=fingerprint("cpu"),
        )


@torch.no_grad()
def put_layers(model: Any, tensors: dict[str, Tensor], group_size: int) -> None:
    """Overwrite a dense model's weights with packed layers (GEMM layout) and the other tensors, dequantized exactly."""
    parameters = dict(model.named_parameters())
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        packed = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        weight = unpack_gemm(packed, packed["qweight"].shape[0], group_size)
        parameters[f"{name}.weight"].copy_(weight.dequantize())
    for name, tensor in tensors.items():
        if name in parameters:
            parameters[name].copy_(tensor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race; return its exit code."""
    return guarded("race", lambda: race(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
