"""Every architecture that transformers has, on a small random model: quantized, loaded, compared, timed.

python -m tests.architectures.trial --out architectures.jsonl [NAME ...]
"""

import argparse
import contextlib
import io
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import bench.cli
from bench.records.store import RECORDS_NAME, append, read_records
from bench.worker.machine import fingerprint
from quantize.building.build import NotAllMade, quantize
from quantize.building.job import BuildOptions
from quantize.building.stream import LayerStream
from quantize.calibration import builtin_texts
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError
from quantize.loader import load
from quantize.model.architecture import Architecture, architecture_of
from quantize.model.layer_calls import runnable
from quantize.model.pretrained import empty_model, model_of
from quantize.model.scales import ScaleGroup, apply_scales
from quantize.model.skeleton import Skeleton
from quantize.quiet import quiet_libraries
from quantize.rounding.options import AwqOptions
from quantize.shell import guarded
from quantize.variant import REFERENCE, VARIANTS
from quantize.weights import open_weights
from tests.architectures.tiny_models import NOT_BUILT, WRAPPERS, architectures, tiny_model
from tests.lab.records import ArchitectureRecord, VariantOutcome

BLOCKS, BLOCK_TOKENS = 16, 64
CPU = torch.device("cpu")
SPECIAL = ["<pad>", "<s>", "</s>"]
FOREIGN = "awq-gemm"
FAST, EXACT = "torch-cpu", "dequantize"
"""The kernel that is compared, and with which."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(prog="architectures", description=__doc__)
    cli.add_argument("names", nargs="*", metavar="NAME", help="transformers' model types (default: all)")
    cli.add_argument("--out", type=Path, required=True, help="a record file to append to")
    cli.add_argument("--variants", nargs="*", default=list(VARIANTS), help="default: all")
    cli.add_argument("--bench", action="store_true", help="time each checkpoint as well")
    cli.add_argument(
        "--foreign", metavar="PYTHON", help="of an environment with gptqmodel: load AWQ GEMM there as well"
    )
    return cli


def try_all(arguments: argparse.Namespace) -> None:
    """Try one after the other; what fails is a record too."""
    names = arguments.names or [*architectures(), *WRAPPERS]
    for number, name in enumerate(names, start=1):
        with tempfile.TemporaryDirectory() as folder:
            record = try_one(name, Path(folder), arguments.variants, arguments.foreign, timed=arguments.bench)
        append(arguments.out, record)
        found = [f"{variant} {_said(outcome)}" for variant, outcome in record.variants.items()]
        print(f"{number}/{len(names)} {name}: {record.reason or '; '.join(found)}", flush=True)


def _said(outcome: VariantOutcome) -> str:
    return outcome.reason or f"{outcome.error:.2g}"


def try_one(
    name: str, folder: Path, variants: Sequence[str], foreign: str | None = None, *, timed: bool
) -> ArchitectureRecord:
    """Make a model of this type in the folder, quantize it, and compare what comes out with it."""
    when, environment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), fingerprint("cpu")
    if name in NOT_BUILT:
        return ArchitectureRecord(when, name, "", 0, 0, (), None, {}, environment, NOT_BUILT[name])
    source = folder / name
    found: Moved | None = None
    reason: str | None = None
    try:
        with quiet_libraries():
            model = tiny_model(name).half()
            model.save_pretrained(source)
            write_tokenizer(source)
            expected = logits(model_of(source, dtype=torch.float32))
    except Exception as error:
        return ArchitectureRecord(when, name, "", 0, 0, (), None, {}, environment, _line(error))
    try:
        with quiet_libraries():
            found = scales_moved(source, expected)
    except Exception as error:
        reason = _line(error)
    outcomes = outcomes_of(source, folder / "out", variants, expected, foreign)
    if timed:
        outcomes = with_ratios(folder / "out", outcomes)
    kind = type(model).__name__
    facts = found or Moved(0, 0, (), None, None)
    return ArchitectureRecord(
        when, name, kind, facts.linears, facts.ungrouped, facts.groups, facts.error, outcomes, environment, reason,
        facts.reached,
    )  # fmt: skip


class Moved(NamedTuple):
    """What random scales through every group have shown; fields as ArchitectureRecord's."""

    linears: int
    ungrouped: int
    groups: tuple[str, ...]
    error: float | None
    reached: float | None


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of less than 512 tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        builtin_texts("calibration")[:8], vocab_size=470, show_progress=False, special_tokens=SPECIAL
    )
    pad, bos, eos = SPECIAL
    made = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    made.save_pretrained(folder)


def logits(model: Any) -> Tensor:
    """Of some tokens, float32."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=some_tokens(), use_cache=False).logits.float()
    return found


def some_tokens() -> Tensor:
    """Token ids, int64 [2, 48]."""
    return torch.arange(96).view(2, 48) * 7 % 470 + 3


def outcomes_of(
    source: Path, out: Path, variants: Sequence[str], expected: Tensor, foreign: str | None
) -> dict[str, VariantOutcome]:
    """Quantize, load, and compare; the checkpoint of FOREIGN in another engine too."""
    options = BuildOptions(blocks=BLOCKS, block_tokens=BLOCK_TOKENS, device="cpu")
    refused: dict[str, str] = {}
    with contextlib.redirect_stdout(io.StringIO()), quiet_libraries():
        try:
            made = quantize(str(source), variants, out, options=options)
        except NotAllMade as error:
            made, refused = error.made, error.refused
        except Exception as error:
            made, refused = [], dict.fromkeys(variants, _line(error))
        built = {one.checkpoint.manifest.variant: one.checkpoint for one in made}
        return {
            variant: _compared(built[variant], expected, foreign)
            if variant in built
            else VariantOutcome(reason=_line(UserError(refused[variant])))
            for variant in variants
        }


def _compared(checkpoint: Checkpoint, expected: Tensor, foreign: str | None) -> VariantOutcome:
    variant, share = checkpoint.variant, checkpoint.manifest.quantized_share
    try:
        found, exact, kernel_error = logits(load(checkpoint.path).model), None, None
        if variant.version:
            chosen: list[Tensor] = []
            with experts_kept(chosen):
                exact = logits(load(checkpoint.path, kernel=EXACT).model)
            with experts_kept(chosen):
                kernel_error = relative(logits(_on_kernel(checkpoint, FAST)), exact)
    except Exception as error:
        return VariantOutcome(share=share, reason=_line(error))
    if not bool(torch.isfinite(found).all()):
        return VariantOutcome(share=share, reason="its logits are no numbers")
    outcome = VariantOutcome(share, relative(found, expected), kernel_error)
    if foreign and variant.name == FOREIGN and exact is not None:
        return replace(outcome, **elsewhere(checkpoint.path, foreign, exact))
    return outcome


def _on_kernel(checkpoint: Checkpoint, kernel: str) -> Any:
    """The model on this kernel; on the default one where some layer has no sizes for it."""
    try:
        return load(checkpoint.path, kernel=kernel).model
    except UserError:
        return load(checkpoint.path).model


@contextlib.contextmanager
def experts_kept(chosen: list[Tensor]) -> Iterator[None]:
    """Inside, every top-k choice is written into the list; where it holds choices already, those are made again.

    A rounding error sends a token that stands between two experts to the other one: what is kept, differs no more.
    """
    ours, method, again = torch.topk, Tensor.topk, iter([*chosen])

    def topk(scores: Tensor, k: int, dim: int = -1, *options: Any, **named: Any) -> torch.return_types.topk:
        best = ours(scores, k, dim, *options, **named)
        indices = next(again, best.indices)
        chosen.append(best.indices)
        return torch.return_types.topk((scores.gather(dim, indices), indices))  # which some ask for `.indices`

    torch.topk = Tensor.topk = topk  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.topk, Tensor.topk = ours, method  # type: ignore[method-assign]


def elsewhere(checkpoint: Path, python: str, exact: Tensor) -> dict[str, Any]:
    """What another engine makes of it (tests.architectures.foreign): the fields of a VariantOutcome."""
    tokens, out = checkpoint.parent / "tokens.safetensors", checkpoint.parent / "logits.safetensors"
    save_file({"tokens": some_tokens()}, tokens)
    command = [python, str(Path(__file__).with_name("foreign.py")), str(checkpoint), str(tokens), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        words = [line for line in ran.stderr.splitlines() if line.strip()]
        return {"engine": "gptqmodel", "engine_reason": _line(UserError(words[-1] if words else "it died"))}
    with safe_open(out, framework="pt") as file:
        theirs, engine = file.get_tensor("logits"), file.metadata()["engine"]
    if not bool(torch.isfinite(theirs).all()):
        return {"engine": engine, "engine_reason": "its logits are no numbers"}
    return {"engine": engine, "engine_error": relative(theirs, exact)}


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def scales_moved(source: Path, expected: Tensor) -> Moved:
    """Where scales move in this model, and what random ones through all groups change.

    The scales are powers of two: others would change the last bit of a router's output, and with it the experts.
    """
    skeleton = Skeleton.of(empty_model(source), open_weights(source))
    quantized = runnable(skeleton, CPU).with_group_size()
    stream = LayerStream(skeleton, quantized, CPU)
    blocks = torch.arange(2 * BLOCK_TOKENS).view(2, BLOCK_TOKENS) * 11 % 470 + 5
    for _ in stream.quantized(blocks, AwqOptions(32, clip=False, refit=False)):
        pass
    skeleton = Skeleton.of(empty_model(source), open_weights(source))
    model = skeleton.model
    skeleton.fill(model, "", CPU)
    model.tie_weights()
    before = logits(model)
    assert relative(before, expected) < 1e-4, "taken apart, the model gives something else"
    grouped = 0
    torch.manual_seed(0)
    architecture = architecture_of(model)
    for index, layer in enumerate(architecture.layers):
        for group in stream.groups[stream.kinds[index]]:
            free = torch.tensor(group.free)
            apply_scales(layer, group, torch.where(free, 2.0 ** torch.randint(-2, 3, (len(free),)), 1))
            grouped += sum(isinstance(layer.get_submodule(one.name), nn.Linear) for one in group.consumers)
    linears = len(architecture.shapes())
    words = tuple(dict.fromkeys(line for groups in stream.groups.values() for line in in_words(groups)))
    error = relative(logits(model), before)
    return Moved(linears, linears - min(grouped, linears), words, error, reached(quantized))


def reached(architecture: Architecture) -> float:
    """The share of the decoder layers' weights, routers, gates and embeddings aside, that is quantized."""
    quantized = {name.removeprefix(f"{architecture.layers_name}.") for name, _, _ in architecture.shapes()}
    total = held = 0
    for name, parameter in architecture.layers.named_parameters():
        owner, _, leaf = name.rpartition(".")
        last = owner.rpartition(".")[2]
        chooses = "router" in owner or last == "gate" or last.endswith("_gate")
        chooses = chooses or isinstance(architecture.layers.get_submodule(owner), nn.Embedding)
        is_stack = parameter.dim() == 3 and min(parameter.shape) > 1 and "conv" not in owner
        if not chooses and (is_stack or (leaf == "weight" and parameter.dim() == 2)):
            total += parameter.numel()
            held += parameter.numel() if owner in quantized else 0
    return held / total


def in_words(groups: Sequence[ScaleGroup]) -> Iterator[str]:
    """Each group in a line; experts' numbers are left open."""
    for group in groups:
        readers = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", one.name) for one in group.consumers)
        yield f"{re.sub(r'[.][0-9]+[.]', '.*.', group.source)} -> {', '.join(readers)}"


def with_ratios(out: Path, outcomes: dict[str, VariantOutcome]) -> dict[str, VariantOutcome]:
    """The outcomes with what `bench` measured of a short prompt and four tokens: seconds over the reference's."""
    command = [str(out), "--device", "cpu", "--prompt", "32", "--new", "4", "--max-time", "1", "--no-quality"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        bench.cli.main(command)
    seconds: dict[str, list[float]] = {}
    for record in read_records(out / RECORDS_NAME):
        if record.latency is not None:
            seconds.setdefault(record.subject.variant, []).append(record.times["total"] or math.inf)
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    reference = median.get(REFERENCE.name)
    return {
        variant: replace(outcome, ratio=median[variant] / reference) if reference and variant in median else outcome
        for variant, outcome in outcomes.items()
    }


def _line(error: BaseException) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return re.sub(r"/\S*/", "", " ".join(text.split()))[:300]


def main(argv: Sequence[str] | None = None) -> int:
    """Try them; return the exit code."""
    return guarded("architectures", lambda: try_all(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
