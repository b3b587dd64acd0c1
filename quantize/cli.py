"""The command `quantize`: parse, call, print."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.process_memory import prefer_huge_pages
from quantize.progress import Progress, progress_bar
from quantize.shell import guarded
from quantize.suite import QuantizeCall, calls_of, suite_rows
from quantize.variant import GROUP_SIZES, VARIANTS


def parser() -> argparse.ArgumentParser:
    """The command line of `quantize`."""
    p = argparse.ArgumentParser(
        prog="quantize",
        description="Make 4-bit and 8-bit checkpoints of a causal language model, and the half-precision reference.",
        epilog="example: quantize smollm2-135m --variant all --out runs",
    )
    add = p.add_argument
    add("source", nargs="?", help="org/name on the hub, a local folder, or smollm2-135m (the embedded model)")
    suite = "biomistral, or a .toml file: make every checkpoint of that table, in place of source"
    add("--suite", metavar="NAME", help=suite)
    variants = f"one or more of {', '.join(VARIANTS)}, or all (the default)"
    add("--variant", action="append", metavar="NAME[,NAME]", help=variants)
    add("--out", type=Path, required=True, help="folder for the checkpoints, one subfolder each")
    add("--name", help="of the base model in the table and in the checkpoints' names (default: the source's own)")
    add("--revision", help="branch, tag or commit of a hub source")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default auto)")
    add("--force", action="store_true", help="make finished checkpoints again")
    add("--dry-run", action="store_true", help="only say what it takes in memory, disk and time")
    add("--spill", action="store_true", help="keep activations in files beside the output, not in memory")
    add = p.add_argument_group("AWQ and calibration").add_argument
    sizes = f"{', '.join(map(str, GROUP_SIZES))}; default: the largest that fits"
    add("--group-size", type=int, metavar="N", help=sizes)
    text = "builtin, a .txt, .json or .jsonl file, or hub:NAME[:split[:column]]"
    add("--calibration", default="builtin", metavar="TEXT", help=text)
    add("--blocks", type=int, default=48, help="blocks of calibration text (default 48)")
    add("--block-tokens", type=int, default=256, help="tokens a block (default 256)")
    rounding = "of AWQ and bnb-4bit: gptq feeds errors back on the calibration text (the default)"
    add("--rounding", choices=("gptq", "nearest"), default="gptq", help=rounding)
    add = p.add_argument_group("bitsandbytes 4-bit").add_argument
    add("--bnb-type", choices=("nf4", "fp4"), default="nf4", help="default nf4")
    add("--double-quant", action="store_true", help="quantize the scales too")
    return p


NOT_WITH_SUITE = ("source", "variant", "name", "revision", "group_size")
"""What the suite says itself."""


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Do what the parsed command line asks for. Raises UserError for what the user can fix."""
    for call in calls_from(arguments):
        with progress_bar(f"quantize: reading {call.source}") as progress:
            make(call, arguments, say, progress)


def make(call: QuantizeCall, arguments: argparse.Namespace, say: Callable[[str], None], progress: Progress) -> None:
    """Make the checkpoints of one call, and say how large they are."""
    from quantize.building.build import NotAllMade, quantize
    from quantize.building.job import BuildOptions
    from quantize.rounding.options import BnbOptions

    same = ("calibration", "blocks", "block_tokens", "rounding", "device", "force", "name", "spill")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in same}
    bnb = BnbOptions(arguments.bnb_type, arguments.double_quant)
    options = BuildOptions(call.group_size, revision=call.revision, bnb=bnb, **given)
    failed: NotAllMade | None = None
    asked: dict[str, Any] = {"options": options, "progress": progress, "say": say, "dry_run": arguments.dry_run}
    try:
        built = quantize(call.source, call.variants, arguments.out, **asked)
    except NotAllMade as error:
        built, failed = error.made, error
    for item in built:
        manifest = item.checkpoint.manifest
        if call.base_model not in (None, manifest.base_model):
            raise UserError(
                f"{call.source} makes checkpoints of {manifest.base_model}, the suite calls it {call.base_model}: "
                f"write base_model = {manifest.base_model!r} there"
            )
        if not item.kept:
            seconds = sum(manifest.seconds.values())
            say(f"{item.checkpoint.path}: {manifest.weights_bytes / 1e9:.3f} GB of weights, {seconds:.0f} s")
    if failed:
        raise failed


def calls_from(arguments: argparse.Namespace) -> list[QuantizeCall]:
    """What to make: the suite's checkpoints, or variants of the one source. Raises UserError for both, or none."""
    if arguments.suite is not None:
        for name in NOT_WITH_SUITE:
            if getattr(arguments, name) is not None:
                shown = name if name == "source" else f"--{name.replace('_', '-')}"
                raise UserError(f"{shown} does not go with --suite, which says what to make: leave one of the two out")
        return calls_of(suite_rows(arguments.suite))
    if arguments.source is None:
        raise UserError("name the model to quantize: quantize SOURCE --out DIR")
    names = tuple(name for value in arguments.variant or ["all"] for name in value.split(",") if name)
    return [QuantizeCall(None, arguments.source, arguments.revision, arguments.group_size, names)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, as `guarded` says."""
    prefer_huge_pages()
    return guarded("quantize", lambda: run(parser().parse_args(argv), print))
