"""CSV and JSON parse back to the figures of the records."""

import csv
import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.records.environment import Environment, SourceState
from bench.records.scenario import SCENARIOS, Scenario
from quantize.schema import from_data
from reports.export import csv_text, json_text
from reports.results import measurements

if TYPE_CHECKING:
    from tests.builder import Builder

PUBLISHED, CHAT = SCENARIOS["published"], SCENARIOS["chat"]


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_row_for_each_checkpoint_and_scenario(builder: "Builder") -> None:
    found = measurements(builder.five_rows())
    rows = parsed(csv_text(found))
    assert len(rows) == 5 * 2
    assert [row["scenario"] for row in rows[:2]] == ["published", "chat"]
    for result in found[0].results:
        for scenario, timing in result.timings.items():
            [row] = [r for r in rows if (r["name"], r["scenario"]) == (result.subject.name, scenario.name)]
            assert float(row["prefill_s"]) == timing.seconds["prefill"]
            assert int(row["run_peak_bytes"]) == timing.run_peak_bytes
            assert row["is_reference"] == str(int(result.is_reference))
            if timing.comparison is None:
                assert row["total_ratio"] == row["total_verdict"] == ""
                continue
            ratio = timing.comparison.ratios["total"]
            assert float(row["total_ratio"]) == ratio.value
            assert (float(row["total_ratio_low"]), float(row["total_ratio_high"])) == ratio.interval
            assert (float(row["total_ratio_min"]), float(row["total_ratio_max"])) == ratio.spread
            assert row["total_verdict"] == ratio.verdict


def test_csv_says_in_each_row_where_when_and_by_what_it_was_measured(builder: "Builder") -> None:
    facts = replace(builder.environment, source=SourceState("0.1.0", "c0ffee", False))
    records = [replace(one, environment=facts) for one in builder.five_rows()]
    for row in parsed(csv_text(measurements(records))):
        assert (row["machine"], row["commit"]) == (facts.cpu, "c0ffee")
        assert row["date"].startswith("20")
        assert f"torch=={facts.libraries['torch']}" in row["versions"].split()


def test_csv_leaves_the_unknown_empty_and_keeps_odd_reasons(builder: "Builder") -> None:
    records = [builder.latency("fp16"), builder.quality("awq-gemm", 16.0)]
    records.append(builder.failure("bnb-4bit", "oom", 'said "no", twice'))
    reference, quality_only, failed = parsed(csv_text(measurements(records)))
    assert reference["decode_s"] == reference["perplexity"] == reference["q_group_size"] == ""
    assert (quality_only["scenario"], quality_only["status"], quality_only["perplexity"]) == ("", "", "16.0")
    assert (failed["scenario"], failed["status"]) == ("published", "oom")
    assert failed["reason"] == 'said "no", twice'
    assert failed["rounds"] == failed["total_ratio"] == ""


def test_csv_of_a_row_that_failed_in_some_rounds_is_ok_with_the_reason(builder: "Builder") -> None:
    records = builder.rounds({"fp16": 1.0, "bnb-4bit": 2.0})
    records.append(builder.failure("bnb-4bit", "timeout", "3600 s", round=3))
    row = parsed(csv_text(measurements(records)))[1]
    assert (row["status"], row["reason"], row["rounds"]) == ("ok", "3600 s", "3")


def test_json_holds_every_round_interval_and_failure(builder: "Builder") -> None:
    records = builder.five_rows()
    records.append(builder.failure("bnb-8bit", "oom", "too big", round=3))
    found = measurements(records)
    data = json.loads(json_text(found))
    assert data["export_version"] == 1
    [measurement] = data["measurements"]
    assert from_data(Environment, measurement["environment"], "export") == builder.environment
    assert [scenario["name"] for scenario in measurement["scenarios"]] == ["published", "chat"]
    rows = {row["subject"]["variant"]: row for row in measurement["rows"]}
    timing = next(t for t in rows["bnb-4bit"]["timings"] if t["scenario"]["name"] == "chat")
    comparison = found[0].results[3].timings[CHAT].comparison
    assert comparison is not None
    ratio = comparison.ratios["decode"]
    assert timing["ratios"]["decode"]["rounds"] == pytest.approx(list(ratio.rounds))
    assert tuple(timing["ratios"]["decode"]["interval"]) == ratio.interval
    assert timing["ratios"]["decode"]["verdict"] == "slower"
    assert timing["reference"] == "Tiny-1M-FP16"
    assert rows["fp16"]["timings"][0]["ratios"] == {}
    assert rows["fp16"]["quality"]["perplexity"] == 15.0
    assert rows["bnb-8bit"]["failures"] == [{"work": "published", "status": "oom", "reason": "too big", "rounds": [3]}]


def test_lengths_modes_and_bytes_a_second_are_exported(new_builder: "type[Builder]") -> None:
    environment = replace(new_builder().environment, copy_bytes_per_s=1e11)
    builder = new_builder(device="cuda", compute_dtype="float16", environment=environment)
    scenario = Scenario.over("published", (100, 300), 1)
    graph = Scenario("chat-graph", 256, 64, mode="graph")
    records = [
        builder.at_lengths("fp16", scenario, (1.0, 3.0)),
        builder.decoded("fp16", "CUDA graph", read_bytes=2 * 10**9, scenario=graph),
    ]
    found = measurements(records)
    prefill, decode = parsed(csv_text(found))
    assert (prefill["mode"], prefill["prompt_lengths"], prefill["decode_mode"]) == ("eager", "100 300", "")
    assert (decode["mode"], decode["prompt_lengths"], decode["decode_mode"]) == ("graph", "256", "CUDA graph")
    assert float(decode["decode_bytes_per_s"]) == pytest.approx(5e10)
    assert float(decode["decode_copy_share"]) == pytest.approx(0.5)
    [row] = json.loads(json_text(found))["measurements"][0]["rows"]
    assert row["timings"][0]["prefill_by_length_s"] == [1.0, 3.0]
    assert row["timings"][1]["decode_bytes"] == 2 * 10**9
    assert row["timings"][1]["decode_mode"] == "CUDA graph"


def test_json_says_null_for_what_is_unknown(builder: "Builder") -> None:
    records = [builder.latency("fp16", memory=None, kernels=None, started_at="?")]
    [measurement] = json.loads(json_text(measurements(records)))["measurements"]
    assert measurement["memory_source"] is measurement["first_start"] is None
    [row] = measurement["rows"]
    assert row["weights_bytes"] is row["quality"] is row["timings"][0]["kernels"] is None


def test_a_name_is_no_formula_and_controls_nothing(builder: "Builder") -> None:
    odd = builder.subject("fp16", name="=1+1\x1b")
    text = csv_text(measurements([builder.latency("fp16", subject=odd)]))
    assert text.splitlines()[1].startswith("'=1+1\\x1b,")
