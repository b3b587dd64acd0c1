"""The pages of the laboratory's records, and `report --all`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.records.crossover import CrossoverEntry
from bench.records.environment import Environment
from bench.records.lab import Operation, OverheadRecord, ProfileRecord, RaceRecord, SideBySideRecord
from bench.records.record import Kernels
from bench.records.scenario import Scenario
from bench.records.store import append, write
from quantize.errors import UserError
from reports import report
from reports.api import write_all
from reports.cli import main
from reports.lab import NAME_CHARACTERS, SHOWN_OPERATIONS, findings

if TYPE_CHECKING:
    from tests.builder import Builder

GALLERY = Path(__file__).resolve().parents[2] / "reports" / "gallery" / "cpu-smollm2-135m"
MACHINE = Environment(cpu="Epyc 9")
SCENARIO = Scenario("overhead", 128, 65)


def lines_of(path: Path) -> list[list[str]]:
    """The cells of every table line of a report."""
    lines = [line for line in report(path).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def racer(name: str, seconds: float | None = None, kld: float = 0.0, reason: str | None = None) -> RaceRecord:
    figures: dict[str, Any] = {"perplexity": {"a": 14.0}, "divergence": {"a": kld}} if seconds else {}
    return RaceRecord(
        "2026", name, "Tiny", (4, 64), "0", {}, MACHINE, seconds, 10**9 if seconds else None, **figures, reason=reason
    )


def test_a_race_has_medians_and_ratios_to_autoawq(tmp_path: Path) -> None:
    entries = [racer("ours", 40.0, 0.06), racer("ours", 50.0, 0.06), racer("autoawq, repaired", 900.0, 0.12)]
    append(tmp_path / "race.jsonl", *entries, racer("other", reason="not there"))
    assert lines_of(tmp_path / "race.jsonl")[2:] == [
        ["ours", "45", "x0.05", "1.00", "14.00", "0.0600", "x0.5"],
        ["autoawq, repaired", "900", "x1", "1.00", "14.00", "0.1200", "x1"],
        ["other", "did not run: not there", "—", "—", "—", "—", "—"],
    ]


def test_two_models_or_two_workloads_never_stand_in_one_table(tmp_path: Path) -> None:
    race = [racer("ours", 40.0, 0.06), replace(racer("ours", 80.0, 0.06), model="Small"), racer("ours", 50.0, 0.06)]
    append(tmp_path / "race.jsonl", *race)
    assert [line[1] for line in lines_of(tmp_path / "race.jsonl") if line[0] == "ours"] == ["45", "80"]
    runs = [*runs_of("quantable", 0.5, 0.04, 10.0), replace(runs_of("quantable", 0.7, 0.04, 10.0)[0], prompt=512)]
    append(tmp_path / "side_by_side.jsonl", *runs)
    prefill = [line[1] for line in lines_of(tmp_path / "side_by_side.jsonl") if line[0] == "quantable"]
    assert prefill == ["0.5", "0.7"]
    text = report(tmp_path / "side_by_side.jsonl")
    assert text.index("256 prompt tokens") < text.index("512 prompt tokens")


def test_a_race_says_on_how_many_blocks_each_was_calibrated(tmp_path: Path) -> None:
    append(tmp_path / "race.jsonl", racer("ours", 40.0), replace(racer("other", 50.0), blocks=(8, 64)))
    said = " ".join(report(tmp_path / "race.jsonl").split())
    assert "Quantizing Tiny, 4 blocks of 64 and 8 blocks of 64 calibration tokens, on Epyc 9" in said


def test_an_overhead_race_is_a_row(tmp_path: Path) -> None:
    seconds: dict[str, tuple[float, ...]] = {"ours": (0.05,) * 3, "generate": (0.1,) * 3}
    record = OverheadRecord("2026", "Tiny-FP16", SCENARIO, "float32", seconds, 0.5, (0.49, 0.51), MACHINE)
    append(tmp_path / "overhead.jsonl", record)
    assert lines_of(tmp_path / "overhead.jsonl")[2] == [
        *("Tiny-FP16", "128", "65", "float32", "Epyc 9", "50.0", "100", "x0.5", "0.490 to 0.510", "3")
    ]


def runs_of(name: str, prefill_s: float, decode_s: float, wall_s: float) -> list[SideBySideRecord]:
    latency = {"per_token": {"p50": decode_s, "mean": decode_s, "count": 2}}
    raw = {} if name == "quantable" else {"launcher_cpu_s": wall_s, "latency": latency}
    blank = SideBySideRecord("2026", name, 0, wall_s, "Tiny", "0", 256, 16, 3, 10, 0, MACHINE)
    figures = {"prefill_s": (prefill_s,), "decode_s": ((decode_s, decode_s),), "raw": raw}
    return [replace(blank, round=number, **figures) for number in range(2)]  # type: ignore[arg-type]


def test_benchmarks_side_by_side(tmp_path: Path) -> None:
    runs = runs_of("quantable", 0.5, 0.04, 10.0) + runs_of("theirs", 1.0, 0.16, 40.0)
    runs += runs_of("theirs, asleep", 0.51, 0.04, 16.0)
    failed = replace(runs[0], contender="broken", prefill_s=(), decode_s=(), reason="no such luck")
    append(tmp_path / "side_by_side.jsonl", *runs, failed)
    ours, theirs, asleep, broken = lines_of(tmp_path / "side_by_side.jsonl")[2:]
    assert ours == ["quantable", "0.5", "", "", "0.04", "", "", "10.0", "", ""]
    assert theirs[1:4] == ["1.00", "x0.50", "0.50 to 0.50"]
    assert theirs[5] == "x0.25"
    assert asleep[2] == "x0.98"
    assert broken[1] == "could not run: no such luck"
    said = [*findings(runs, "theirs"), *findings(runs, "theirs, asleep")]
    assert "prefill s: not within 5% of theirs (x0.500)." in said
    assert "prefill s: within 5% of theirs, asleep (x0.980)." in said
    assert "wall s: at most 0.5 of theirs (x0.250)." in said
    assert "wall s: not at most 0.5 of theirs, asleep (x0.625)." in said
    assert "theirs: its launching process used 40.0 processor seconds while it only waited." in said
    assert findings([failed], "broken") == []


def test_a_profile_has_its_longest_operations_and_the_rest_in_one_row(tmp_path: Path) -> None:
    many = tuple(Operation(f"kernel {number}" + "<T>" * 99, 2.0, 0.001) for number in range(SHOWN_OPERATIONS + 3))
    record = ProfileRecord("2026", "Tiny", None, SCENARIO, Kernels("a", "b"), MACHINE, "prefill", 0.02, many)
    append(tmp_path / "profile.jsonl", record)
    text = report(tmp_path / "profile.jsonl")
    assert "Tiny, prefill: 20.00 ms, of which busy 15.00 ms, on Epyc 9." in text
    rows = lines_of(tmp_path / "profile.jsonl")[2:]
    assert len(rows) == SHOWN_OPERATIONS + 1
    assert rows[0][:3] == ["1.00", "6.7%", "2"]
    assert rows[0][3].replace("\\", "") == f"kernel 0{'<T>' * 99}"[:NAME_CHARACTERS]
    assert rows[-1] == ["3.00", "20.0%", "6", "3 others"]


def test_a_profile_of_few_operations_has_a_row_for_each(tmp_path: Path) -> None:
    few = (Operation("gemm", 2.0, 0.003), Operation("norm", 4.0, 0.001))
    record = ProfileRecord("2026", "Tiny", "fp16", SCENARIO, Kernels("a", "b"), MACHINE, "prefill", 0.004, few)
    append(tmp_path / "profile.jsonl", record)
    assert "Tiny, fp16, prefill: 4.00 ms" in report(tmp_path / "profile.jsonl")
    assert [row[3] for row in lines_of(tmp_path / "profile.jsonl")[2:]] == ["gemm", "norm"]


@pytest.mark.parametrize("name", ["race", "overhead", "side_by_side"])
def test_the_gallerys_records_of_schema_1_print_as_those_written_today(name: str, tmp_path: Path) -> None:
    from bench.records.store import read_file

    records = list(read_file(GALLERY / f"{name}.jsonl").records)
    write(tmp_path / f"{name}.jsonl", records)
    assert list(read_file(tmp_path / f"{name}.jsonl").records) == records
    assert report(tmp_path / f"{name}.jsonl") == report(GALLERY / f"{name}.jsonl")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "race.jsonl").touch()
    with pytest.raises(UserError, match="holds no records: run `bench` first"):
        report(tmp_path / "race.jsonl")


def test_two_kinds_in_one_file_are_refused(tmp_path: Path, builder: "Builder") -> None:
    append(tmp_path / "mixed.jsonl", racer("ours", 1.0), builder.latency("fp16"))
    with pytest.raises(UserError, match="records of 2 kinds"):
        report(tmp_path / "mixed.jsonl")


def test_a_report_never_takes_the_place_of_a_record_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "race.jsonl"
    append(path, racer("ours", 1.0))
    before = path.read_bytes()
    for out in (path, tmp_path / "other.jsonl"):
        assert main([str(path), "--out", str(out)]) == 2
        assert "would be written over with a report" in capsys.readouterr().err
    assert path.read_bytes() == before


# Every page of a folder


def test_all_writes_every_page_that_there_are_records_for(
    tmp_path: Path, builder: "Builder", crossover: list[CrossoverEntry], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    append(tmp_path / "records.jsonl", *builder.five_rows())
    write(tmp_path / "crossover.jsonl", crossover)
    append(tmp_path / "race.jsonl", racer("ours", 1.0))
    assert main([str(tmp_path), "--all"]) == 0
    plots = [f"{name}.{form}" for name in ("loss", "time", "memory", "crossover") for form in ("png", "svg")]
    names = ["table.md", *plots, "crossover.md", "race.md"]
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / name}" for name in names]
    assert (tmp_path / "table.md").read_text() == report(tmp_path, view="full")
    assert (tmp_path / "race.md").read_text() == report(tmp_path / "race.jsonl")


def test_all_writes_the_published_table_beside_ours_where_a_row_is_of_it(
    tmp_path: Path, new_builder: "type[Builder]"
) -> None:
    append(tmp_path / "records.jsonl", *new_builder("BioMistral-7B").five_rows())
    written, problems, sound = write_all(tmp_path)
    assert [path.name for path in written][:2] == ["table.md", "published.md"]
    assert (tmp_path / "published.md").read_text() == report(tmp_path, view="versus")
    assert (problems, sound) == ([], True)


def test_a_page_that_cannot_be_written_leaves_the_others(
    tmp_path: Path, builder: "Builder", capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path / "records.jsonl", builder.quality("awq-gemm", 15.0))
    append(tmp_path / "race.jsonl", racer("ours", 1.0))
    assert main([str(tmp_path), "--all"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"wrote {tmp_path / 'race.md'}"
    assert out[1].startswith("no table.md: no record of the reference")
    (tmp_path / "records.jsonl").write_text("no records\n")
    assert main([str(tmp_path), "--all"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {tmp_path / 'race.md'}"


def test_all_is_of_a_folder_and_goes_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([tmp_path / "none"], [tmp_path], [tmp_path, "--plots"]):
        assert main([*map(str, arguments), "--all"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "is no folder" in errors[0]
    assert "holds no record files" in errors[1]
    assert "leave the other options out" in errors[2]
