"""A race of AWQ quantizers in one run: the same model, the same calibration tokens, one process each.

`python -m bench.lab.race --out runs/race` prints seconds, peak memory, perplexity and KL divergence of each, with
ratios to ours, and writes them to race.jsonl.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.records.environment import fingerprint
from quantize.cli import guarded
from quantize.errors import UserError

YARDSTICK = "autoawq, repaired"
"""Whom the table's ratios are to."""


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
    p.add_argument("--out", type=Path, default=Path("runs/race"), help="folder for the results (default %(default)s)")
    p.add_argument("--table", type=Path, metavar="FILE", help="print the table of a record file, and race nobody")
    p.add_argument("--blocks", type=int, default=48)
    p.add_argument("--block-tokens", type=int, default=256)
    p.add_argument("--group-size", type=int, default=64)
    p.add_argument("--contender", action="append", help="run only these (repeatable); default: all that can run")
    p.add_argument(
        "--keep", action="store_true", help="do not run who left layers in --out before, only judge them again"
    )
    p.add_argument(
        "--other", type=Path, help="a .txt file of another kind of text; default: the licences installed here"
    )
    return p


def race(arguments: argparse.Namespace) -> list[Entry]:
    """Run the contenders in turn, ours between the others, each judged on the same text."""
    from bench.lab.quantizers import CONTENDERS, OURS, Request
    from quantize.quiet import quiet_libraries

    names = arguments.contender or list(CONTENDERS)
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise UserError(f"unknown contender {unknown[0]!r}; there are: {', '.join(CONTENDERS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        from bench.lab.evaluate import Judge

        judge = Judge.prepare(arguments.source, arguments.blocks, arguments.block_tokens, arguments.other)
        blocks = arguments.out / "blocks.safetensors"
        if arguments.keep and blocks.is_file() and not judge.has_blocks(blocks):
            raise UserError(f"{arguments.out} was raced on other calibration tokens: leave --keep out")
        judge.save_blocks(blocks)
    entries: list[Entry] = []
    for name in names if arguments.keep else turns(names, OURS):
        stem = arguments.out / name.replace(", ", "-").replace(" ", "-")
        request = Request(str(judge.folder), str(blocks), f"{stem}.safetensors", arguments.group_size)
        kept = kept_entry(name, asdict(request), stem) if arguments.keep else None
        entry = kept or run_contender(name, asdict(request), stem)
        if entry.reason is None:
            with quiet_libraries():
                perplexity, divergence = judge.judge(Path(request.out), arguments.group_size)
            entry = Entry(name, entry.seconds, entry.peak_bytes, perplexity, divergence)
        entries.append(entry)
        append_entry(arguments.out / "race.jsonl", entry, judge.facts())
        print(line_of(entry, entries[0]), flush=True)
    return entries


def turns(names: Sequence[str], ours: Container[str]) -> list[str]:
    """Who runs when: ours first and again after each of the others, which take long enough for the machine to change.

    The table takes the medians.
    """
    own = [name for name in names if name in ours]
    others = [[name, *own] for name in names if name not in ours]
    return own + [name for turn in others for name in turn]


def run_contender(name: str, request: dict[str, Any], stem: Path) -> Entry:
    """One contender in a process of its own; what it prints goes to a log file."""
    request_path = stem.with_suffix(".request.json")
    request_path.write_text(json.dumps(request))
    command = [sys.executable, "-m", "bench.lab.quantizers", name, str(request_path)]
    with stem.with_suffix(".log").open("w") as log:
        ran = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ran.returncode:
        lines = stem.with_suffix(".log").read_text().strip().splitlines() or [f"exit code {ran.returncode}"]
        return Entry(name, reason=lines[-1][:300])
    facts = json.loads(Path(request["out"]).with_suffix(".json").read_text())
    return Entry(name, facts["seconds"], facts["peak_bytes"])


def kept_entry(name: str, request: dict[str, Any], stem: Path) -> Entry | None:
    """What this contender did before, asked the same; None where it left nothing. Its figures of quality are open."""
    try:
        before = json.loads(stem.with_suffix(".request.json").read_text())
        facts = json.loads(stem.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    same = before == request and Path(request["out"]).is_file()
    return Entry(name, facts["seconds"], facts["peak_bytes"]) if same else None


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


def markdown_table(path: Path) -> str:
    """The table of a race's record file: medians of what ran several times, ratios to the repaired autoawq.

    Raises UserError for a file that no race wrote.
    """
    entries = read_entries(path)
    yardstick = entries.get(YARDSTICK, [])
    kinds = list(next((one.divergence for found in entries.values() for one in found if one.divergence), {}))
    titles = ["Quantizer", "Seconds", "to AutoAWQ", "Peak RSS GB"]
    titles += [title for kind in kinds for title in (f"Perplexity ({kind})", f"KLD ({kind})", "to AutoAWQ")]
    rows = []
    for name, found in entries.items():
        good = [one for one in found if one.reason is None]
        if not good:
            rows.append([name, f"did not run: {found[-1].reason}", *[""] * (len(titles) - 2)])
            continue
        row = [name, f"{_median(good, lambda one: one.seconds):.0f}", _times(good, yardstick, lambda one: one.seconds)]
        peak = _median(good, lambda one: one.peak_bytes)
        row.append("—" if math.isnan(peak) else f"{peak / 1e9:.2f}")
        for kind in kinds:
            row.append(f"{_median(good, partial(_perplexity, kind)):,.2f}")
            divergence = partial(_divergence, kind)
            row += [f"{_median(good, divergence):.3f}", _times(good, yardstick, divergence)]
        rows.append(row)
    aligned = [":--", *["--:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, aligned, *rows)) + "\n"


def read_entries(path: Path) -> dict[str, list[Entry]]:
    """The entries of a race's record file by contender, in the order first run."""
    entries: dict[str, list[Entry]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            data = json.loads(line)
            entry = Entry(**{field: data[field] for field in Entry.__dataclass_fields__})
            entries.setdefault(entry.contender, []).append(entry)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no record file of a race ({error}): run the race first") from None
    return entries


def _divergence(kind: str, entry: Entry) -> float | None:
    return (entry.divergence or {}).get(kind)


def _perplexity(kind: str, entry: Entry) -> float | None:
    return (entry.perplexity or {}).get(kind)


def _median(entries: Sequence[Entry], value: Callable[[Entry], float | None]) -> float:
    told = [found for entry in entries if (found := value(entry)) is not None]
    return statistics.median(told) if told else float("nan")


def _times(entries: Sequence[Entry], yardstick: Sequence[Entry], value: Callable[[Entry], float | None]) -> str:
    return f"x{_median(entries, value) / _median(yardstick, value):.3g}" if yardstick else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race; return its exit code."""
    arguments = parser().parse_args(argv)
    if arguments.table is not None:
        return guarded("race", lambda: print(markdown_table(arguments.table), end=""))
    return guarded("race", lambda: race(arguments))


if __name__ == "__main__":
    sys.exit(main())
