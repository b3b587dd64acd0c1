"""The same results for programs: CSV, one flat row a checkpoint and scenario, or JSON, with every round.

Figures are raw (bytes, seconds, ratios), units are in the names, and what is unknown is empty or null.
"""

import csv
import io
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from bench.records.environment import Environment
from bench.records.record import PHASES, Phase, Subject
from bench.records.scenario import Scenario
from quantize.errors import printable
from quantize.schema import to_data
from reports.results import PARTS, Measurement, Result, Timing

EXPORT_VERSION = 1

MEMORY_FIELDS = (
    *("kv_cache_bytes", "kv_cache_formula_bytes", "activations_bytes", "rest_bytes", "baseline_bytes"),
    *("reserved_peak_bytes", "nvml_process_bytes", "nvml_device_bytes"),
)


def csv_text(found: Sequence[Measurement]) -> str:
    """Comma-separated values with a header line; a checkpoint without any scenario has one row."""
    rows = []
    for measurement in found:
        for result in measurement.results:
            failed = {failure.work for failure in result.failures}
            ran: list[Scenario | None] = [
                one for one in measurement.scenarios if one in result.timings or one.name in failed
            ]
            rows += [_flat(measurement, result, scenario) for scenario in ran or [None]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def column_names() -> list[str]:
    """The columns of `csv_text`, in order."""
    subject = Subject("", "", "", "", None, None, None, None, "", None)
    result = Result(subject, False, None, None, None, None, None, {}, (), ())
    return list(_flat(Measurement("cpu", Environment(), None, (), (result,)), result, None))


def json_text(found: Sequence[Measurement]) -> str:
    """One JSON object: `measurements`, each with its machine and its rows."""
    data = {"export_version": EXPORT_VERSION, "measurements": [_measurement(item) for item in found]}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A text of one line that a spreadsheet takes for no formula, other values as they are."""
    if not isinstance(value, str):
        return value
    return "'" * value.startswith(("=", "+", "-", "@")) + printable(value)


def _flat(measurement: Measurement, result: Result, scenario: Scenario | None) -> dict[str, Any]:
    timing, quality = result.timing(scenario), result.quality
    failure = next((item for item in result.failures if scenario and item.work == scenario.name), None)
    divergence = quality and quality.divergence
    return {
        **to_data(result.subject),
        "is_reference": int(result.is_reference),
        **_fields(result, "quantized_share", "broken"),
        "device": measurement.device,
        "compute_dtype": result.compute_dtype,
        "scenario": scenario.name if scenario else None,
        **_fields(scenario, "prompt_tokens", "new_tokens", "batch", "mode"),
        "prompt_lengths": " ".join(map(str, scenario.prompt_lengths)) if scenario else None,
        "status": "ok" if timing else failure.status if failure else None,
        **_fields(failure, "reason"),
        **_fields(timing, "rounds"),
        "memory_source": measurement.memory,
        **_fields(result, "weights_bytes", "load_peak_bytes"),
        **_fields(timing, "run_peak_bytes"),
        **{name: value for phase in PHASES for name, value in _flat_phase(timing, phase).items()},
        **_speeds(timing),
        **{f"{part}_kernel": timing.kernels.get(part) if timing else None for part in PARTS},
        **_decode(measurement, timing),
        **_fields(quality, "perplexity"),
        "perplexity_ratio": result.perplexity_ratio,
        **{f"kl_{name}": value for name, value in _fields(divergence, "mean", "median", "p99").items()},
        **_fields(divergence, "flips"),
        **_fields(timing and timing.memory, *MEMORY_FIELDS),
        **_fields(timing, "energy_j", "unsteady_rounds", "outliers", "samples"),
        **_origin(measurement),
    }


def _origin(measurement: Measurement) -> dict[str, Any]:
    """Where, when and by which program a row was measured."""
    facts = measurement.environment
    versions = {"python": facts.python, **facts.libraries}
    return {
        "machine": facts.gpu if measurement.on_gpu else facts.cpu,
        "date": _iso(measurement.first_start),
        "commit": facts.source.commit if facts.source else None,
        "versions": " ".join(f"{name}=={version}" for name, version in versions.items() if version),
    }


def _fields(whole: object, *names: str) -> dict[str, Any]:
    """These attributes of something; None where it is not there."""
    return {name: getattr(whole, name, None) for name in names}


def _flat_phase(timing: Timing | None, phase: Phase) -> dict[str, Any]:
    ratio = timing.ratio(phase) if timing else None
    low, high = ratio.interval if ratio and ratio.interval else (None, None)
    least, most = ratio.spread if ratio else (None, None)
    return {
        f"{phase}_s": timing.seconds.get(phase) if timing else None,
        f"{phase}_ratio": ratio.value if ratio else None,
        f"{phase}_ratio_low": low,
        f"{phase}_ratio_high": high,
        f"{phase}_ratio_min": least,
        f"{phase}_ratio_max": most,
        f"{phase}_verdict": ratio.verdict if ratio else None,
    }


def _speeds(timing: Timing | None) -> dict[str, Any]:
    return {f"{part}_tokens_per_s": timing.tokens_per_s(part) if timing else None for part in PARTS}


def _decode(measurement: Measurement, timing: Timing | None) -> dict[str, Any]:
    return {
        **_fields(timing, "decode_mode"),
        **_fields(timing and timing.memory, "decode_bytes"),
        **_fields(timing, "decode_bytes_per_s"),
        "decode_copy_share": measurement.copy_share(timing) if timing else None,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _measurement(measurement: Measurement) -> dict[str, Any]:
    return {
        "device": measurement.device,
        "environment": to_data(measurement.environment),
        "memory_source": measurement.memory,
        "first_start": _iso(measurement.first_start),
        "last_start": _iso(measurement.last_start),
        "scenarios": to_data(measurement.scenarios),
        "rows": [_row(measurement, result) for result in measurement.results],
    }


def _row(measurement: Measurement, result: Result) -> dict[str, Any]:
    row = {name: value for name, value in vars(result).items() if name != "timings"}
    return {**to_data(row), "timings": [_timing(measurement, timing) for timing in result.timings.values()]}


def _timing(measurement: Measurement, timing: Timing) -> dict[str, Any]:
    own = {name: value for name, value in vars(timing).items() if name not in ("comparison", "memory")}
    return {
        **to_data(own),
        **_speeds(timing),
        **_decode(measurement, timing),
        "run_peak_bytes": timing.run_peak_bytes,
        "memory": _fields(timing.memory, *MEMORY_FIELDS),
        "kernels": timing.kernels or None,
        **_fields(timing.comparison, "reference", "apart_s"),
        "ratios": to_data(timing.comparison.ratios) if timing.comparison else {},
    }
