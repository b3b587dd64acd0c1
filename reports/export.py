"""The same results for programs: CSV, one flat row a checkpoint and scenario, or JSON, with every round.

Figures are raw (bytes, seconds, ratios), units are in the names, and what is unknown is empty or null.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.records.phase import PHASES, Phase
from bench.records.ratio import Ratio
from bench.records.scenario import Scenario
from reports.results import Failure, Measurement, Result, Timing

EXPORT_VERSION = 1


def csv_text(found: Sequence[Measurement]) -> str:
    """Comma-separated values with a header line; a checkpoint without any scenario has one row."""
    rows = [
        _flat(measurement, result, scenario)
        for measurement in found
        for result in measurement.results
        for scenario in _scenarios(measurement, result)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_text(found: Sequence[Measurement]) -> str:
    """One JSON object: `measurements`, each with its machine and its rows."""
    data = {"export_version": EXPORT_VERSION, "measurements": [_measurement(item) for item in found]}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _scenarios(measurement: Measurement, result: Result) -> list[Scenario | None]:
    """The scenarios this checkpoint ran in, well or not; [None] when in none."""
    failed = {failure.work for failure in result.failures}
    ran = [one for one in measurement.scenarios if one in result.timings or one.name in failed]
    return [*ran] or [None]


def _flat(measurement: Measurement, result: Result, scenario: Scenario | None) -> dict[str, Any]:
    timing = result.timing(scenario)
    failure = next((item for item in result.failures if scenario and item.work == scenario.name), None)
    row: dict[str, Any] = {
        **asdict(result.subject),
        "is_reference": int(result.is_reference),
        "device": measurement.device,
        "compute_dtype": result.compute_dtype,
        "scenario": scenario.name if scenario else None,
        "prompt_tokens": scenario.prompt_tokens if scenario else None,
        "new_tokens": scenario.new_tokens if scenario else None,
        "batch": scenario.batch if scenario else None,
        "mode": scenario.mode if scenario else None,
        "prompt_lengths": " ".join(map(str, scenario.prompt_lengths)) if scenario else None,
        "status": _status(timing, failure),
        "reason": failure.reason if failure else None,
        "rounds": timing.rounds if timing else None,
        "memory_source": measurement.memory,
        "weights_bytes": result.weights_bytes,
        "load_peak_bytes": result.load_peak_bytes,
        "run_peak_bytes": timing.run_peak_bytes if timing else None,
    }
    for phase in PHASES:
        row |= _flat_phase(timing, phase)
    return row | {
        "prefill_tokens_per_s": timing.prefill_tokens_per_s if timing else None,
        "decode_tokens_per_s": timing.decode_tokens_per_s if timing else None,
        "prefill_kernel": timing.kernels.prefill if timing and timing.kernels else None,
        "decode_kernel": timing.kernels.decode if timing and timing.kernels else None,
        **_flat_decode(measurement, timing),
        "perplexity": result.quality.perplexity if result.quality else None,
        "perplexity_ratio": result.perplexity_ratio,
        **_flat_divergence(result),
        **_flat_memory(timing),
        "energy_j": timing.energy_j if timing else None,
        "unsteady_rounds": timing.unsteady if timing else None,
        "outliers": timing.outliers[0] if timing else None,
        "samples": timing.outliers[1] if timing else None,
    }


def _flat_decode(measurement: Measurement, timing: Timing | None) -> dict[str, Any]:
    return {
        "decode_mode": timing.decode_mode if timing else None,
        "decode_bytes": timing.memory.decode_bytes if timing and timing.memory else None,
        "decode_bytes_per_s": timing.decode_bytes_per_s if timing else None,
        "decode_copy_share": measurement.copy_share(timing) if timing else None,
    }


def _flat_divergence(result: Result) -> dict[str, Any]:
    divergence = result.quality.divergence if result.quality else None
    fields = ("mean", "median", "p99")
    told: dict[str, Any] = {f"kl_{name}": getattr(divergence, name) if divergence else None for name in fields}
    return told | {"flips": divergence.flips if divergence else None}


def _flat_memory(timing: Timing | None) -> dict[str, Any]:
    memory = timing.memory if timing else None
    fields = (
        "kv_cache_bytes",
        "kv_cache_formula_bytes",
        "activations_bytes",
        "rest_bytes",
        "baseline_bytes",
        "reserved_peak_bytes",
        "nvml_process_bytes",
        "nvml_device_bytes",
    )
    return {name: getattr(memory, name) if memory else None for name in fields}


def _status(timing: Timing | None, failure: Failure | None) -> str | None:
    """ "ok" where any round ended well; the reason of one that did not stands beside it."""
    if timing:
        return "ok"
    return failure.status if failure else None


def _flat_phase(timing: Timing | None, phase: Phase) -> dict[str, Any]:
    ratio = _ratio(timing, phase)
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


def _ratio(timing: Timing | None, phase: Phase) -> Ratio | None:
    return timing.comparison.ratios.get(phase) if timing and timing.comparison else None


def _measurement(measurement: Measurement) -> dict[str, Any]:
    first, last = measurement.first_start, measurement.last_start
    return {
        "device": measurement.device,
        "environment": measurement.environment,
        "memory_source": measurement.memory,
        "first_start": first.isoformat() if first else None,
        "last_start": last.isoformat() if last else None,
        "scenarios": [asdict(scenario) for scenario in measurement.scenarios],
        "rows": [_row(measurement, result) for result in measurement.results],
    }


def _row(measurement: Measurement, result: Result) -> dict[str, Any]:
    return {
        "subject": asdict(result.subject),
        "is_reference": result.is_reference,
        "compute_dtype": result.compute_dtype,
        "weights_bytes": result.weights_bytes,
        "load_peak_bytes": result.load_peak_bytes,
        "quality": asdict(result.quality) if result.quality else None,
        "perplexity_ratio": result.perplexity_ratio,
        "timings": [_timing(measurement, timing) for timing in result.timings.values()],
        "tasks": [asdict(score) for score in result.tasks],
        "failures": [asdict(failure) for failure in result.failures],
        "placements": list(result.placements),
    }


def _timing(measurement: Measurement, timing: Timing) -> dict[str, Any]:
    comparison = timing.comparison
    return {
        "scenario": asdict(timing.scenario),
        "rounds": timing.rounds,
        "seconds": timing.seconds,
        "prefill_tokens_per_s": timing.prefill_tokens_per_s,
        "decode_tokens_per_s": timing.decode_tokens_per_s,
        **_flat_decode(measurement, timing),
        "prefill_by_length_s": list(timing.prefill_by_length_s),
        "run_peak_bytes": timing.run_peak_bytes,
        "memory": _flat_memory(timing),
        "energy_j": timing.energy_j,
        "unsteady_rounds": timing.unsteady,
        "outliers": timing.outliers[0],
        "samples": timing.outliers[1],
        "throttled": list(timing.throttled),
        "other_processes": timing.neighbours,
        "kernels": asdict(timing.kernels) if timing.kernels else None,
        "reference": comparison.reference if comparison else None,
        "apart_s": comparison.apart_s if comparison else None,
        "ratios": {phase: asdict(ratio) for phase, ratio in comparison.ratios.items()} if comparison else {},
    }
