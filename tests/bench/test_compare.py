"""`quantable compare`: a planted regression is found, an unchanged rerun is not."""

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.compare import compare_files, main
from bench.records.record import Divergence, Kernels, Quality, Record
from bench.records.scenario import SCENARIOS
from bench.records.store import read_records, write
from quantize.errors import UserError

if TYPE_CHECKING:
    from tests.builder import Builder

GALLERY = Path(__file__).parents[2] / "reports" / "gallery" / "cpu-smollm2-135m"
ALL = "speed:5%,memory:2%,ppl:1%,kld:10%,flips,share,kernel"
Plant = Callable[[Record], Record]


def slower(factor: float) -> Plant:
    def plant(record: Record) -> Record:
        if record.latency is None:
            return record
        steps = tuple(tuple(factor * one for one in steps) for steps in record.latency.decode_s)
        return replace(record, latency=replace(record.latency, decode_s=steps))

    return plant


def quality(**changes: float) -> Plant:
    """Perplexity or figures of the divergence times so much."""

    def plant(record: Record) -> Record:
        if record.quality is None or record.quality.divergence is None:
            return record
        figures: Quality | Divergence = record.quality if "perplexity" in changes else record.quality.divergence
        changed = replace(figures, **{name: getattr(figures, name) * factor for name, factor in changes.items()})
        whole = changed if isinstance(changed, Quality) else replace(record.quality, divergence=changed)
        return replace(record, quality=whole)

    return plant


def memory(record: Record) -> Record:
    if record.memory is None or record.memory.run_peak_bytes is None:
        return record
    return replace(record, memory=replace(record.memory, run_peak_bytes=int(1.1 * record.memory.run_peak_bytes)))


def kernel(record: Record) -> Record:
    awq = record.kernels and record.subject.version
    return replace(record, kernels=Kernels("dequantize", "dequantize")) if awq else record


PLANTED: dict[str, tuple[Plant, str]] = {
    "perplexity x1.05": (quality(perplexity=1.05), ", ppl, "),
    "divergence x1.2": (quality(mean=1.2), ", kld, "),
    "flips x1.3": (quality(flips=1.3), ", flips, "),
    "decode x1.1": (slower(1.1), ", decode, "),
    "memory x1.1": (memory, ", memory, "),
    "another kernel": (kernel, ", kernel, "),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_regression_is_found_and_nothing_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, figure = PLANTED[name]
    write(tmp_path / "records.jsonl", [plant(record) for record in read_records(GALLERY / "records.jsonl")])
    assert main([str(GALLERY), str(tmp_path), "--fail-on", ALL]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("regression: ")]
    assert found
    assert all(figure in line for line in found)
    assert main([str(tmp_path), str(GALLERY), "--fail-on", ALL]) == (1 if figure == ", kernel, " else 0)


def rerun(builder: "Builder", seed: int, decode: float = 1.0, rounds: int = 3) -> list[Record]:
    """Three rounds of two checkpoints with 2% of noise in every time and 0.5% in every peak."""
    rng = random.Random(seed)

    def noisy(value: float, share: float) -> float:
        return value * math.exp(rng.gauss(0, share))

    return [
        builder.latency(
            name, scenario, round=number, prefill_s=(noisy(2.0, 0.02),), step_s=noisy(0.04 * decode, 0.02),
            peak_bytes=int(noisy(1.5e9, 0.005)),
        )
        for number in range(rounds) for name in ("fp16", "awq-gemm") for scenario in SCENARIOS.values()
    ]  # fmt: skip


def test_an_unchanged_rerun_is_not_a_regression_and_a_slower_one_is(
    new_builder: "type[Builder]", tmp_path: Path
) -> None:
    alarms = found = 0
    for seed in range(60):
        for name, records in (
            ("a", rerun(new_builder(), seed)),
            ("b", rerun(new_builder(), 1000 + seed)),
            ("c", rerun(new_builder(), 2000 + seed, decode=1.1)),
        ):
            write(tmp_path / f"{name}.jsonl", records)
        same, slow = (
            compare_files(tmp_path / "a.jsonl", tmp_path / f"{name}.jsonl", fail_on="speed:5%,memory:2%").regressions
            for name in "bc"
        )
        alarms += bool(same)
        found += any("decode" in line for line in slow)
    assert alarms <= 3
    assert found >= 57


def test_a_rerun_of_the_gallery_is_no_regression_in_either_order(tmp_path: Path) -> None:
    """The half-precision model was measured in another session on the same machine, there under two names."""
    first = [one for one in read_records(GALLERY / "records.jsonl") if one.subject.variant == "fp16"]
    sessions = {"first": first}
    for record in read_records(GALLERY / "same-twice" / "records.jsonl"):
        renamed = replace(record, subject=replace(record.subject, name=first[0].subject.name))
        sessions.setdefault(record.subject.name, []).append(renamed)
    for name, records in sessions.items():
        write(tmp_path / name, records)
    pairs = list(itertools.permutations([tmp_path / name for name in sessions], 2))
    assert len(pairs) == 6
    for pair in pairs:
        assert compare_files(*pair, fail_on=ALL).regressions == []


@pytest.fixture
def two(new_builder: "type[Builder]", tmp_path: Path) -> Callable[..., list[str]]:
    """Write an unchanged rerun, the second with this done to every record; the two paths."""

    def write_two(plant: Callable[[Record], Record | None], rounds: int = 3) -> list[str]:
        files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        for file in files:
            records = [*rerun(new_builder(), 1, rounds=rounds), new_builder().quality("fp16", 15.0)]
            records.append(new_builder().quality("awq-gemm", 16.0))
            kept = records if file is files[0] else [made for one in records if (made := plant(one))]
            write(file, kept)
        return list(map(str, files))

    return write_two


def test_what_the_second_lacks_is_a_regression(two: Callable[..., list[str]]) -> None:
    files = two(lambda record: None if record.subject.version and record.scenario else record)
    found = compare_files(*files, fail_on="ppl").regressions
    assert found == [
        f"regression: Tiny-1M-AWQ-QGS64-W4-GEMM, {scenario}, cpu, float32: not in the second; it is missing"
        for scenario in ("published, total, prefill, memory, kernel", "chat, total, prefill, decode, memory, kernel")
    ]
    assert compare_files(*files).regressions == []


def test_a_checkpoint_that_is_newly_broken_is_a_regression(two: Callable[..., list[str]]) -> None:
    def broken(record: Record) -> Record:
        own = record.quality and record.subject.version
        return replace(record, quality=Quality(99.0, 4096, "pydoc topics", "t" * 64)) if own else record

    found = compare_files(*two(broken), fail_on="kernel").regressions
    assert len(found) == 1
    assert "broken, cpu, float32: no to its perplexity is x6.6 the reference's; it is newly broken" in found[0]


def test_other_libraries_are_shown_side_by_side_and_judged_where_allowed(
    two: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    def upgraded(record: Record) -> Record:
        libraries = {**record.environment.libraries, "torch": "2.14.1"}
        return replace(record, environment=replace(record.environment, libraries=libraries))

    files = two(upgraded)
    assert main([*files, "--fail-on", "speed"]) == 2
    assert capsys.readouterr().err == (
        "error: library versions differ (torch 2.13.0 against 2.14.1): --allow libraries judges all the same\n"
    )
    for arguments in ([], ["--fail-on", "speed", "--allow", "libraries"]):
        assert main([*files, *arguments]) == 0
        assert ["torch", "2.13.0", "2.14.1"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_times_of_two_machines_are_withheld(two: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    files = two(lambda record: replace(record, environment=replace(record.environment, cpu="Xeon 7")))
    assert main([*files, "--fail-on", "memory,ppl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Times on cpu are not compared: two machines (cpu: Epyc 9 against Xeon 7)." in lines
    assert not any(phase in line for line in lines for phase in (", prefill, ", ", decode, ", ", total, "))
    with pytest.raises(UserError, match=r"speed on two machines cannot be judged .*Xeon 7"):
        compare_files(*files, fail_on="speed")


def test_what_cannot_be_judged_is_refused(two: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match="too few rounds of Tiny-1M-FP16 to judge speed"):
        compare_files(*two(lambda record: record, rounds=2), fail_on="speed")
    with pytest.raises(UserError, match=r"source_sha256: one against other"):
        compare_files(*two_sources(two))
    for text in ("loss", "kernel:5%", "speed:5"):
        with pytest.raises(UserError, match=r"--fail-on does not know|is no share"):
            compare_files(*two(lambda record: record), fail_on=text)


def two_sources(two: Callable[..., list[str]]) -> list[str]:
    files = two(lambda record: replace(record, subject=replace(record.subject, source_sha256="other")))
    first = read_records(Path(files[0]))
    write(Path(files[0]), [replace(one, subject=replace(one.subject, source_sha256="one")) for one in first])
    return files


def test_json_has_every_figure(two: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*two(memory), "--fail-on", "memory", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    bad = [one for one in found["changes"] if one["regression"]]
    assert {(one["scenario"], one["figure"]) for one in bad} == {("published", "memory"), ("chat", "memory")}
    assert all(one["ratio"]["value"] == pytest.approx(1.1) for one in bad)
