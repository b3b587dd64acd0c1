"""The pages of the laboratory's records."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.records.environment import Environment
from bench.records.scenario import Scenario
from bench.records.store import append, write
from quantize.errors import UserError
from tests.lab.pages import findings, lab_page, main
from tests.lab.records import OverheadRecord, RaceRecord, SideBySideRecord, read_lab

if TYPE_CHECKING:
    from tests.builder import Builder

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "reports" / "gallery" / "cpu-smollm2-135m"
MACHINE = Environment(cpu="Epyc 9")
SCENARIO = Scenario("overhead", 128, 65)


def lines_of(path: Path) -> list[list[str]]:
    """The cells of every table line of a report."""
    lines = [line for line in lab_page(path).splitlines() if line.startswith("|")]
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
    text = lab_page(tmp_path / "side_by_side.jsonl")
    assert text.index("256 prompt tokens") < text.index("512 prompt tokens")


def test_a_race_says_on_how_many_blocks_each_was_calibrated(tmp_path: Path) -> None:
    append(tmp_path / "race.jsonl", racer("ours", 40.0), replace(racer("other", 50.0), blocks=(8, 64)))
    said = " ".join(lab_page(tmp_path / "race.jsonl").split())
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


@pytest.mark.parametrize("name", ["race", "overhead", "side_by_side"])
def test_the_gallerys_records_of_schema_1_print_as_those_written_today(name: str, tmp_path: Path) -> None:
    records = read_lab(GALLERY / f"{name}.jsonl")
    write(tmp_path / f"{name}.jsonl", records)
    assert read_lab(tmp_path / f"{name}.jsonl") == records
    assert lab_page(tmp_path / f"{name}.jsonl") == lab_page(GALLERY / f"{name}.jsonl")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "race.jsonl").touch()
    with pytest.raises(UserError, match="holds no records: run what makes them first"):
        lab_page(tmp_path / "race.jsonl")


def test_two_kinds_in_one_file_are_refused(tmp_path: Path, builder: "Builder") -> None:
    append(tmp_path / "mixed.jsonl", racer("ours", 1.0), runs_of("quantable", 0.5, 0.04, 10.0)[0])
    with pytest.raises(UserError, match=r"jsonl, line 2 is of kind 'side by side', not 'race': keep kinds apart"):
        lab_page(tmp_path / "mixed.jsonl")
    write(tmp_path / "mixed.jsonl", [racer("ours", 1.0), builder.latency("fp16")])
    with pytest.raises(UserError, match=r"line 2 is no record of the laboratory \(kind 'latency'\): try `report`"):
        lab_page(tmp_path / "mixed.jsonl")
    write(tmp_path / "race.jsonl", [racer("ours", 1.0)])
    with pytest.raises(UserError, match="line 1 is of kind 'race', not 'overhead'"):
        read_lab(tmp_path / "race.jsonl", OverheadRecord)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind":"race"', "line 3 is no JSON"),
        ("[1]", r"line 3 is no record of the laboratory \(kind None\)"),
        ('{"kind":["race"],"schema_version":2}', "line 3 is no record of the laboratory"),
        ('{"kind":"race","schema_version":99}', "line 3: record of schema version 99, these are read up to 2"),
        (json.dumps(asdict(racer("ours", 1.0)) | {"seconds": -1.0}), "line 3: seconds: expected `float` >= 1e-12"),
        (json.dumps(asdict(racer("ours", 1.0)) | {"speed": 1}), "line 3: unknown field speed"),
    ],
)
def test_what_is_no_record_is_named_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    append(path := tmp_path / "race.jsonl", racer("ours", 1.0))
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_lab(path)


def test_a_repeated_line_counts_once_and_no_file_is_one_line(tmp_path: Path) -> None:
    records = [racer("ours", 1.0), racer("other", 2.0), racer("ours", 1.0)]
    append(path := tmp_path / "race.jsonl", *records)
    assert read_lab(path, RaceRecord) == records[:2]
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot read"):
            read_lab(missing)


def test_the_page_of_the_architectures_is_of_their_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, page = ROOT / "reports/gallery/architectures.jsonl", ROOT / "docs/architectures.md"
    assert main([str(records)]) == 0
    assert capsys.readouterr().out == page.read_text(encoding="utf-8")
    assert main([str(records), "--out", str(out := tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_bytes() == page.read_bytes()


def test_a_report_never_takes_the_place_of_a_record_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "race.jsonl"
    append(path, racer("ours", 1.0))
    before = path.read_bytes()
    for out in (path, tmp_path / "other.jsonl"):
        assert main([str(path), "--out", str(out)]) == 2
        assert "would be written over with a report" in capsys.readouterr().err
    assert path.read_bytes() == before
