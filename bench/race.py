"""A race of AWQ quantizers in one run: the same model, the same calibration tokens, one process each.

`python -m bench.race --out runs/race` prints seconds, peak memory, perplexity and KL divergence of each, with ratios to
ours, and writes them to race.jsonl.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.environment import fingerprint
from quantize.cli import guarded
from quantize.errors import UserError


@dataclass(frozen=True)
class Entry:
    """How one contender did.

    seconds: of quantizing and packing, the loading of libraries not counted; peak_bytes: highest resident set size of
    its process; perplexity, divergence: on held-out text of the calibration's kind and of another; divergence is
    the mean KL(reference || contender) in nats a token. reason: why there are no figures.
    """

    contender: str
    seconds: float | None = None
    peak_bytes: int | None = None
    perplexity: dict[str, float] | None = None
    divergence: dict[str, float] | None = None
    reason: str | None = None


def parser() -> argparse.ArgumentParser:
    """The command line of the race."""
    p = argparse.ArgumentParser(prog="race", description=__doc__)
    p.add_argument("--source", default="smollm2-135m")
    p.add_argument("--out", type=Path, required=True, help="folder for the results")
    p.add_argument("--blocks", type=int, default=48)
    p.add_argument("--block-tokens", type=int, default=256)
    p.add_argument("--group-size", type=int, default=64)
    p.add_argument("--contender", action="append", help="run only these (repeatable); default: all that can run")
    p.add_argument(
        "--other", type=Path, help="a .txt file of another kind of text; default: the licences installed here"
    )
    return p


def race(arguments: argparse.Namespace) -> list[Entry]:
    """Run every contender in turn, then judge them all on the same text."""
    from bench.contenders import CONTENDERS, Request
    from quantize.quiet import quiet_libraries

    names = arguments.contender or list(CONTENDERS)
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise UserError(f"unknown contender {unknown[0]!r}; there are: {', '.join(CONTENDERS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        from bench.judge import Judge

        judge = Judge.prepare(arguments.source, arguments.blocks, arguments.block_tokens, arguments.other)
        blocks = judge.save_blocks(arguments.out / "blocks.safetensors")
    entries = []
    for name in names:
        stem = arguments.out / name.replace(", ", "-").replace(" ", "-")
        request = Request(str(judge.folder), str(blocks), f"{stem}.safetensors", arguments.group_size)
        entry = run_contender(name, asdict(request), stem)
        if entry.reason is None:
            with quiet_libraries():
                perplexity, divergence = judge.judge(Path(request.out), arguments.group_size)
            entry = Entry(name, entry.seconds, entry.peak_bytes, perplexity, divergence)
        entries.append(entry)
        append_entry(arguments.out / "race.jsonl", entry, judge.facts())
        print(line_of(entry, entries[0]), flush=True)
    return entries


def run_contender(name: str, request: dict[str, Any], stem: Path) -> Entry:
    """One contender in a process of its own; what it prints goes to a log file."""
    request_path = stem.with_suffix(".request.json")
    request_path.write_text(json.dumps(request))
    command = [sys.executable, "-m", "bench.contenders", name, str(request_path)]
    with stem.with_suffix(".log").open("w") as log:
        ran = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ran.returncode:
        lines = stem.with_suffix(".log").read_text().strip().splitlines() or [f"exit code {ran.returncode}"]
        return Entry(name, reason=lines[-1][:300])
    facts = json.loads(Path(request["out"]).with_suffix(".json").read_text())
    return Entry(name, facts["seconds"], facts["peak_bytes"])


def append_entry(path: Path, entry: Entry, facts: dict[str, Any]) -> None:
    """One JSON line: the entry, what was raced, the machine."""
    line = {"schema_version": 1, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **asdict(entry), **facts}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "environment": fingerprint("cpu")}) + "\n")


def line_of(entry: Entry, first: Entry) -> str:
    """One row for the screen, with ratios to the first contender."""
    if entry.reason is not None or entry.seconds is None or entry.perplexity is None or entry.divergence is None:
        return f"{entry.contender:22} could not run: {entry.reason}"
    ratio = entry.seconds / first.seconds if first.seconds else float("nan")
    quality = "  ".join(
        f"{kind}: ppl {entry.perplexity[kind]:8.3f} KLD {entry.divergence[kind]:.4f}"
        + (f" (x{entry.divergence[kind] / first.divergence[kind]:.2f})" if first.divergence else "")
        for kind in entry.divergence
    )
    return (
        f"{entry.contender:22} {entry.seconds:7.1f} s (x{ratio:.2f})  {(entry.peak_bytes or 0) / 1e9:.2f} GB  {quality}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race; return its exit code."""
    return guarded("race", lambda: race(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
