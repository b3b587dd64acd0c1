"""The same results for programs: CSV, one flat row a checkpoint and scenario, or JSON, with every round.

Figures are raw (bytes, seconds, ratios), units are in the names, and what is unknown is empty or null.
"""

import csv
import io
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from bench.records.record import PHASES, Phase
from bench.records.scenario import Scenario
from quantize.errors import printable
from quantize.schema import to_data
from reports.results import PARTS, Measurement, Result, Timing

EXPORT_VERSION = 1
OF_A_PHASE = {  # what each column of a phase means; the verdict follows them
    **{"s": "median seconds over the rounds", "ratio": "its time over the reference's"},
    **{"ratio_low": "lower end of the ratio's 95% interval", "ratio_high": "upper end of the ratio's 95% interval"},
    **{"ratio_min": "the least ratio of a round", "ratio_max": "the greatest ratio of a round"},
}
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
            ran = [one for one in measurement.scenarios if one in result.timings or one.name in failed]
            rows += [_flat(measurement, result, one) for one in ran] or [_flat(measurement, result, None)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def json_text(found: Sequence[Measurement]) -> str:
    """One JSON object: `measurements`, each with its machine and its rows."""
    data = []
    for one in found:
        facts = {"device": one.device, "environment": to_data(one.environment), "memory_source": one.memory}
        facts |= {**_fields(one, "first_start", "last_start"), "scenarios": to_data(one.scenarios)}
        data.append(facts | {"rows": [_row(one, result) for result in one.results]})
    whole = {"export_version": EXPORT_VERSION, "measurements": data}
    return json.dumps(whole, indent=1, allow_nan=False, default=datetime.isoformat) + "\n"


def _plain(value: Any) -> Any:
    """A text of one line that a spreadsheet takes for no formula, other values as they are."""
    if not isinstance(value, str):
        return value
    return "'" * value.startswith(("=", "+", "-", "@")) + printable(value)


def _flat(measurement: Measurement, result: Result, scenario: Scenario | None) -> dict[str, Any]:
    timing, quality, facts = result.timing(scenario), result.quality, measurement.environment
    failure = next((item for item in result.failures if scenario and item.work == scenario.name), None)
    divergence, versions = quality and quality.divergence, {"python": facts.python, **facts.libraries}
    row = {**to_data(result.subject), "is_reference": int(result.is_reference)}
    row |= {**_fields(result, "quantized_share", "broken"), "device": measurement.device}
    row |= {"compute_dtype": result.compute_dtype, "scenario": scenario and scenario.name}
    row |= _fields(scenario, "prompt_tokens", "new_tokens", "batch", "mode")
    row |= {"prompt_lengths": scenario and " ".join(map(str, scenario.prompt_lengths))}
    row |= {"status": "ok" if timing else failure and failure.status, **_fields(failure, "reason")}
    row |= {**_fields(timing, "rounds"), "memory_source": measurement.memory}
    row |= {**_fields(result, "weights_bytes", "load_peak_bytes"), **_fields(timing, "run_peak_bytes")}
    for phase in PHASES:
        row |= _flat_phase(timing, phase)
    row |= {**_speeds(timing), **{f"{part}_kernel": timing and timing.kernels.get(part) for part in PARTS}}
    row |= {**_decode(measurement, timing), **_fields(quality, "perplexity")}
    row |= {"perplexity_ratio": result.perplexity_ratio}
    row |= {f"kl_{name}": value for name, value in _fields(divergence, "mean", "median", "p99").items()}
    row |= {**_fields(divergence, "flips"), **_fields(timing and timing.memory, *MEMORY_FIELDS)}
    row |= _fields(timing, "energy_j", "unsteady_rounds", "outliers", "samples")
    row |= {"machine": facts.gpu if measurement.on_gpu else facts.cpu}
    row |= {"date": measurement.first_start and measurement.first_start.isoformat()}
    used = " ".join(f"{name}=={version}" for name, version in versions.items() if version)
    return row | {"commit": facts.source and facts.source.commit, "versions": used}


def _fields(whole: object, *names: str) -> dict[str, Any]:
    """These attributes of something; None where it is not there."""
    return {name: getattr(whole, name, None) for name in names}


def _flat_phase(timing: Timing | None, phase: Phase) -> dict[str, Any]:
    ratio = timing and timing.ratio(phase)
    told = (ratio.value, *(ratio.interval or (None, None)), *ratio.spread, ratio.verdict) if ratio else (None,) * 6
    values = (timing and timing.seconds.get(phase), *told)
    return {f"{phase}_{name}": value for name, value in zip((*OF_A_PHASE, "verdict"), values, strict=True)}


def _speeds(timing: Timing | None) -> dict[str, Any]:
    return {f"{part}_tokens_per_s": timing and timing.tokens_per_s(part) for part in PARTS}


def _decode(measurement: Measurement, timing: Timing | None) -> dict[str, Any]:
    found = {**_fields(timing, "decode_mode"), **_fields(timing and timing.memory, "decode_bytes")}
    found |= _fields(timing, "decode_bytes_per_s")
    return found | {"decode_copy_share": timing and measurement.copy_share(timing)}


def _row(measurement: Measurement, result: Result) -> dict[str, Any]:
    row = {name: value for name, value in vars(result).items() if name != "timings"}
    return {**to_data(row), "timings": [_timing(measurement, timing) for timing in result.timings.values()]}


def _timing(measurement: Measurement, timing: Timing) -> dict[str, Any]:
    own = {name: value for name, value in vars(timing).items() if name not in ("comparison", "memory")}
    found = {**to_data(own), **_speeds(timing), **_decode(measurement, timing)}
    found |= {"run_peak_bytes": timing.run_peak_bytes, "memory": _fields(timing.memory, *MEMORY_FIELDS)}
    found |= {"kernels": timing.kernels or None, **_fields(timing.comparison, "reference", "apart_s")}
    return found | {"ratios": to_data(timing.comparison.ratios) if timing.comparison else {}}
