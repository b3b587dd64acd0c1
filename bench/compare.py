"""Two record files of the same checkpoints: what changed, and what of it is a regression. Imports no torch."""

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from bench.records.broken import broken_subjects, latest_quality
from bench.records.comparison import grouped, unique
from bench.records.environment import differing
from bench.records.ratio import Ratio, independent_ratio_of
from bench.records.record import PHASES, Record, latency_records
from bench.records.store import RECORDS_NAME, read_records
from quantize.errors import UserError
from quantize.shell import Parser, command, tell
from quantize.units import aligned, parse_share

MACHINE = ("cpu", "cpu_cores", "torch_threads", "gpu")
THRESHOLDS = {"speed": 0.05, "memory": 0.02, "ppl": 0.01, "kld": 0.1, "flips": 0.1, "share": 0.0, "kernel": None}
"""What --fail-on knows, and how much more (of the share: less) is a regression where it gives no number."""

SHOWN: dict[str, Callable[[Any], str]] = {  # memory is the run peak, share that of the quantized matrices
    "memory": lambda rounds: f"{max(rounds) / 1e9:.3f} GB",
    **{"ppl": "{:.2f}".format, "kld": "{:.4f}".format, "flips": "{:.1%}".format, "share": "{:.1%}".format},
}
ALIKE = {"latency": "prompt_sha256", "quality": "quality.text_sha256", "tasks": "kind"}  # what must be the same

APART = (
    "The second file's figures over the first's. They were measured apart, so times and memory are compared as "
    "independent series, and what the machine did in between is in the ratio."
)
FailOn = dict[str, float | None]


@dataclass(frozen=True)
class Change:
    """One figure of a checkpoint in both files.

    figure:        a phase, a key of SHOWN, "kernel", or "broken" (why, or "no"); all those that the second lacks.
    before, after: of times and memory every round's.
    regression:    why it is one; None where it is none, or nothing shall fail."""

    name: str
    scenario: str | None
    device: str
    dtype: str | None
    figure: str
    before: Any
    after: Any
    ratio: Ratio | None = None
    regression: str | None = None

    @property
    def line(self) -> str:
        shown = SHOWN.get(self.figure, str)
        parts = [] if self.figure in PHASES else [f"{shown(self.before)} to {shown(self.after)}"]
        if self.ratio:
            span = " ({:.2f} to {:.2f})".format(*self.ratio.interval) if self.ratio.interval else ""
            parts.append(f"x{self.ratio.value:.2f}{span}" + f", {self.ratio.verdict}" * (self.figure in PHASES))
        where = filter(None, (self.name, self.scenario, self.figure, self.device, self.dtype))
        return f"{', '.join(where)}: {'not in the second' if self.after is None else ', '.join(parts)}"


@dataclass(frozen=True)
class FileComparison:
    """Every figure of the first file beside the second's; notes: what else differs; judged: whether some shall fail."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    judged: bool

    @property
    def regressions(self) -> list[str]:
        """What shall fail, and does, in words."""
        return [f"regression: {one.line}; {one.regression}" for one in self.changes if one.regression]

    def lines(self) -> list[str]:
        shown = [one.line for one in self.changes if one.figure not in ("kernel", "broken") or one.before != one.after]
        bad = self.regressions
        return [*shown, *self.notes, *bad, *[f"{len(bad) or 'no'} regression{'s' * (len(bad) > 1)}"] * self.judged]


def parse_fail_on(text: str) -> FailOn:
    """What shall fail, with its threshold: "speed:5%,kernel". Raises UserError for what cannot."""
    wanted: FailOn = {}
    for key, _, share in (part.strip().partition(":") for part in text.split(",") if part.strip()):
        if key not in THRESHOLDS or (share and THRESHOLDS[key] is None):
            known = ", ".join(one if least is None else f"{one}:{least:.0%}" for one, least in THRESHOLDS.items())
            raise UserError(f"--fail-on does not know {key + _ + share!r}; there are: {known}")
        wanted[key] = parse_share(share) if share else THRESHOLDS[key]
    return wanted


def compare_files(
    before: Path | str, after: Path | str, *, fail_on: str | None = None, allow: Collection[str] = ()
) -> FileComparison:
    """Compare what `bench` left in two record files, or in the folders that hold them.

    fail_on: what is a regression (`parse_fail_on`); with it so is what the second lacks, or what is broken there alone.
    allow:   "libraries": judge although versions differ.

    Raises UserError for what was not measured alike or cannot be judged (other libraries or machines, few rounds)."""
    files = [unique(read_records(p / RECORDS_NAME if (p := Path(one)).is_dir() else p)) for one in (before, after)]
    wanted = None if fail_on is None else parse_fail_on(fail_on)
    _check_alike(files[0], files[1])
    first, second = ({one.device: one.environment for one in reversed(records)} for records in files)
    apart = {device: differing(first[device], second[device]) for device in first.keys() & second.keys()}
    pairs = [(device, name, *both) for device, found in apart.items() for name, both in found.items()]
    moved = {device: f"{name}: {old} against {new}" for device, name, old, new in pairs[::-1] if name in MACHINE}
    libraries = {name: (old, new) for _, name, old, new in pairs if name not in MACHINE}
    if wanted and "speed" in wanted and moved:
        raise UserError(f"speed on two machines cannot be judged ({min(moved.values())}): leave it out of --fail-on")
    if wanted is not None and libraries and "libraries" not in allow:
        found = ", ".join(f"{name} {old} against {new}" for name, (old, new) in libraries.items())
        raise UserError(f"library versions differ ({found}): --allow libraries judges all the same")
    changes = tuple(_changes(files[0], files[1], wanted, moved))
    if all(change.after is None for change in changes):
        raise UserError("the two files have no checkpoint and scenario in common: nothing to compare")
    table = {"library": ("first", "second"), **libraries} if libraries else {}
    notes = aligned([(name, str(old or "-"), str(new or "-")) for name, (old, new) in table.items()])
    notes += [f"Times on {device} are not compared: two machines ({why})." for device, why in moved.items()]
    return FileComparison(changes, (*notes, APART), wanted is not None)


def _figures(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(name, scenario, device, dtype) -> its figures; of times and memory a list over rounds, of quality the latest."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    series = grouped(latency_records(records), lambda r: (r.subject.name, r.scenario, r.device, r.compute_dtype))
    for row, runs in series.items():
        found[row] = {phase: [spent for run in runs if (spent := run.times[phase])] for phase in PHASES}
        found[row]["memory"] = [peak for run in runs if run.memory and (peak := run.memory.run_peak_bytes)]
        kernels = {f"{run.kernels.prefill} / {run.kernels.decode}" for run in runs if run.kernels}
        found[row]["kernel"] = " and ".join(sorted(kernels))
    for setting, group in grouped(records, lambda r: (r.device, r.compute_dtype)).items():
        reasons = {subject.name: why for subject, why in broken_subjects(group).items()}
        for name, runs in grouped(group, lambda r: r.subject.name).items():
            quality = latest_quality(runs)
            divergence = quality and quality.divergence
            figures = found[name, None, *setting] = {"ppl": quality and quality.perplexity}
            figures |= {"kld": divergence and divergence.mean, "flips": divergence and divergence.flips}
            figures |= {"share": runs[-1].quantized_share, "broken": reasons.get(name, "no")}
    return {row: {key: x for key, x in figures.items() if x not in (None, "", [])} for row, figures in found.items()}


def _changes(
    before: Sequence[Record], after: Sequence[Record], wanted: FailOn | None, moved: Collection[str]
) -> Iterator[Change]:
    """Row by row as the first file has them. moved: devices whose times are not compared."""
    second, judged = _figures(after), wanted is not None
    floors = [one.quality.noise_floor for one in before if one.quality and one.quality.noise_floor]
    floor = {"kld": max((f.mean for f in floors), default=0), "flips": max((f.flips for f in floors), default=0)}
    for row, old in _figures(before).items():
        (name, scenario, device, dtype), new = row, second.get(row, {})
        scenario = scenario and scenario.name
        for figure, was in old.items():
            if figure not in new or (figure in PHASES and device in moved):
                continue
            now, key = new[figure], "speed" if figure in ("prefill", "decode") else figure
            ratio = independent_ratio_of(now, was) if isinstance(was, list) else None
            why, more = None, (wanted or {}).get(key) or 0.0
            if judged and key == "broken":
                why = "it is newly broken" if was == "no" != now else None
            elif wanted and key in wanted:
                if ratio and not ratio.interval:
                    raise UserError(f"too few rounds of {name} to judge {key}: use bench --rounds 3, or leave it out")
                if ratio and ratio.interval:
                    bad = ratio.value > 1 + more and ratio.interval[0] > 1 + more * (key == "memory")
                elif key in ("kernel", "share"):
                    bad = was != now if key == "kernel" else now < was * (1 - more)
                else:
                    bad = now - was > max(more * was, floor.get(key, 0))
                why = f"the threshold is {100 * more:g}%" if bad else None
            yield Change(name, scenario, device, dtype, figure, was, now, ratio, why)
        if lacking := ", ".join(one for one in old if one not in new):
            yield Change(name, scenario, device, dtype, lacking, None, None, None, "it is missing" if judged else None)


def _check_alike(before: Sequence[Record], after: Sequence[Record]) -> None:
    """Raises UserError, naming the field, for two series that were not measured alike."""
    theirs = grouped((r for r in before if r.status == "ok"), lambda r: (r.kind, r.subject.name, r.scenario))
    for record in (one for one in after if one.status == "ok"):
        same = theirs.get((record.kind, record.subject.name, record.scenario), [])
        alike = [one for one in same if (one.device, one.compute_dtype) == (record.device, record.compute_dtype)]
        for field in ("subject.source_sha256", ALIKE[record.kind]) if alike else ("device", "compute_dtype"):
            old, new = (attrgetter(field)(one) for one in ([*alike, *same, record][0], record))
            if None not in (old, new) and old != new:
                what = f"{record.subject.name} was not measured alike in the two files"
                raise UserError(f"{what} ({field}: {old} against {new}): measure again")


def parser() -> Parser:
    about = "Compare what `bench` measured of the same checkpoints at two times; nothing is measured."
    code = "Exit code 1: a regression, a figure that B lacks, or a checkpoint that is broken in B alone."
    cli = Parser(prog="quantable compare", description=about, epilog=code)
    cli.add_argument("before", metavar="A", help="a record file, or the folder that was measured")
    cli.add_argument("after", metavar="B", help="the later one")
    what = f"what is a regression ({', '.join(THRESHOLDS)}), and by how much more: speed:5%%,memory:2%%,kernel"
    cli.add_argument("--fail-on", metavar="WHAT[:SHARE],...", help=what)
    cli.add_argument("--allow", choices=("libraries",), action="append", default=[], help="judge other versions too")
    cli.add_argument("--json", action="store_true", help="all of it as JSON")
    return cli


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 for a regression."""
    found = compare_files(**{name: given for name, given in vars(arguments).items() if name != "json"})
    tell(found, found.lines(), as_json=arguments.json)
    return 1 if found.regressions else 0


main = command(parser, run)
