"""The command `quantize`: parse, call, print."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.progress import Progress, progress_bar
from quantize.schema import to_data
from quantize.shell import Parser, called, command, reject, say
from quantize.variant import GROUP_SIZES, VARIANTS, variants_named

if TYPE_CHECKING:
    from quantize.building.job import BuiltCheckpoint
    from quantize.suite import QuantizeCall


def parser() -> Parser:
    p = Parser(
        prog=called("quantize"),
        description="Make 4-bit and 8-bit checkpoints of a causal language model, and the half-precision reference.",
        epilog="example: quantize smollm2-135m --variant all --out runs",
    )
    add = p.add_argument
    source = "org/name on the hub, a local folder, merge:RECIPE.yaml, or smollm2-135m (the embedded model)"
    add("source", nargs="?", help=source)
    suite = "biomistral, or a .toml file: make every checkpoint of that table, in place of source"
    add("--suite", metavar="NAME", help=suite)
    add("--merge", action="store_true", help="of a suite: make its merged models instead of downloading them")
    variants = f"one or more of {', '.join(VARIANTS)}, or all (the default)"
    add("--variant", action="append", metavar="NAME[,NAME]", help=variants)
    add("--out", type=Path, required=True, help="folder for the checkpoints, one subfolder each")
    add("--name", help="of the base model in the table and in the checkpoints' names (default: the source's own)")
    add("--revision", help="branch, tag or commit of a hub source")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default auto)")
    add("--force", action="store_true", help="make finished checkpoints again")
    add("--dry-run", action="store_true", help="only say what it takes in memory, disk and time")
    add("--spill", action="store_true", help="keep activations in files beside the output, not in memory")
    add("--quiet", action="store_true", help="no progress and no remarks: only what is made, and errors")
    add("--json", action="store_true", help="a JSON object a checkpoint; remarks go to standard error")
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
    add("--bnb-type", dest="quant_type", choices=("nf4", "fp4"), default="nf4", help="default nf4")
    add("--double-quant", action="store_true", help="quantize the scales too")
    return p


NOT_WITH_SUITE = ("source", "variant", "name", "revision", "group_size")  # what the suite says itself


def run(arguments: argparse.Namespace) -> None:
    """Do what the parsed command line asks for. Raises UserError for what the user can fix."""
    for call in calls_from(arguments):
        with progress_bar(f"quantize: reading {call.source}", quiet=arguments.quiet) as progress:
            make(call, arguments, progress)


def make(call: "QuantizeCall", arguments: argparse.Namespace, progress: Progress) -> None:
    """Make the checkpoints of one call, and say what they are."""
    from quantize.building.build import NotAllMade, quantize
    from quantize.building.job import BuildChoices

    choices = {name: value for name, value in vars(arguments).items() if name in BuildChoices.__annotations__}
    choices |= {"group_size": call.group_size, "revision": call.revision, "dry_run": arguments.dry_run}
    remark = partial(say, to=sys.stderr if arguments.json else None, quiet=arguments.quiet and not arguments.dry_run)
    failed: NotAllMade | None = None
    try:
        built = quantize(call.source, call.variants, arguments.out, progress=progress, say=remark, **choices)
    except NotAllMade as error:
        built, failed = error.made, error
    for item in built:
        manifest = item.checkpoint.manifest
        if call.base_model not in (None, manifest.base_model):
            differs = f"{call.source} makes checkpoints of {manifest.base_model}, the suite calls it {call.base_model}"
            raise UserError(f"{differs}: write base_model = {manifest.base_model!r} there")
        if arguments.json:
            print(json.dumps(facts_of(item)), flush=True)
        elif arguments.quiet or not item.kept:
            seconds = sum(manifest.seconds.values())
            say(f"{item.checkpoint.path}: {manifest.weights_bytes / 1e9:.3f} GB of weights, {seconds:.0f} s")
    if failed:
        raise failed


def facts_of(built: "BuiltCheckpoint") -> dict[str, Any]:
    """What `--json` prints of a checkpoint."""
    checkpoint, manifest = built.checkpoint, built.checkpoint.manifest
    hashes = {"content_sha256": checkpoint.content_sha256, "source_sha256": manifest.source.weights_sha256}
    sizes = {"weights_bytes": manifest.weights_bytes, "bytes": sum(one.bytes for one in manifest.files.values())}
    facts = {"path": str(checkpoint.path), "variant": manifest.variant, "kept": built.kept, **hashes, **sizes}
    return {**facts, "seconds": sum(manifest.seconds.values()), "files": to_data(manifest.files)}


def calls_from(arguments: argparse.Namespace) -> list["QuantizeCall"]:
    """What to make: the suite's checkpoints, or variants of the one source.

    Raises UserError for both, or none, and for an unknown variant: torch takes seconds to import, and comes after."""
    from quantize.suite import QuantizeCall, calls_of, suite_rows

    if arguments.suite is not None:
        reject(arguments, NOT_WITH_SUITE, "does not go with --suite, which says what to make: leave one of the two out")
        return calls_of(suite_rows(arguments.suite, merge=arguments.merge))
    reject(arguments, ("merge",), "is of a suite: name it with --suite, or a recipe as merge:RECIPE.yaml")
    if arguments.source is None:
        raise UserError("name the model to quantize: quantize SOURCE --out DIR")
    names = tuple(name for value in arguments.variant or ["all"] for name in value.split(",") if name)
    variants_named(names)
    return [QuantizeCall(None, arguments.source, arguments.revision, arguments.group_size, names)]


main = command(parser, run)
