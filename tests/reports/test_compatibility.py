"""What may not stand in one table is refused in one line that names the field."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bench.records.environment import Environment, SourceState
from bench.records.record import Quality
from bench.records.scenario import SCENARIOS, Scenario
from quantize.errors import UserError
from reports.compatibility import check_alike
from reports.results import measurements

if TYPE_CHECKING:
    from tests.builder import Builder


def changed(environment: Environment, field: str, value: Any) -> Environment:
    if field in environment.libraries:
        return replace(environment, libraries={**environment.libraries, field: value})
    return replace(environment, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu", "Xeon 1"),
        ("cpu_cores", 64),
        ("torch_threads", 1),
        ("gpu", "H100"),
        ("gpu_driver", "570"),
        ("cuda", "12.8"),
        ("torch", "2.6.0"),
        ("bitsandbytes", "0.49.0"),
    ],
)
def test_another_machine_or_library_is_refused_by_name(builder: "Builder", field: str, value: object) -> None:
    records = [builder.latency("fp16"), builder.latency("bnb-4bit")]
    records.append(builder.latency("awq-gemm", environment=changed(builder.environment, field, value)))
    with pytest.raises(UserError, match=rf"^Tiny-1M-FP16 and Tiny-1M-AWQ-\S+ were .* \({field}: .*{value}\)"):
        measurements(records)


def test_what_does_not_decide_may_differ(builder: "Builder") -> None:
    elsewhere = replace(builder.environment, python="3.12.1", source=SourceState(commit="abc"))
    records = [builder.latency("fp16"), builder.latency("bnb-4bit", environment=elsewhere)]
    assert len(measurements(records)[0].results) == 2


def test_the_fingerprint_of_a_failed_run_does_not_count_against_the_others(builder: "Builder") -> None:
    records = [builder.latency("fp16"), builder.failure("bnb-4bit", "error", "no module", environment=Environment())]
    assert len(measurements(records)[0].results) == 2


def test_one_name_for_two_checkpoints_is_refused(builder: "Builder") -> None:
    remade = builder.latency("bnb-4bit", round=1, subject=builder.subject("bnb-4bit", content="f" * 64))
    with pytest.raises(UserError, match=r"Tiny-1M-BnB\.4 .* different checkpoints \(content_sha256 .* f{12}\)"):
        measurements([builder.latency("fp16"), builder.latency("bnb-4bit"), remade])


def test_one_name_with_other_facts_is_refused_by_field(builder: "Builder") -> None:
    subject = builder.subject("awq-gemm")
    records = [
        builder.latency("fp16"),
        builder.latency("awq-gemm", subject=subject),
        builder.latency("awq-gemm", round=1, subject=replace(subject, q_group_size=32)),
    ]
    with pytest.raises(UserError, match=r"disagree \(q_group_size: 64 against 32\)"):
        measurements(records)


def test_a_reference_in_another_compute_dtype_is_refused(builder: "Builder") -> None:
    records = [builder.latency("fp16"), builder.latency("bnb-4bit", compute_dtype="bfloat16")]
    with pytest.raises(UserError, match=r"\(compute_dtype: float32 against bfloat16\)"):
        measurements(records)


def test_peaks_of_two_kinds_are_refused(builder: "Builder") -> None:
    record = builder.latency("bnb-4bit")
    assert record.memory is not None
    other = replace(record, memory=replace(record.memory, source="psutil"))
    with pytest.raises(UserError, match=r"memory\.source: RSS against psutil"):
        measurements([builder.latency("fp16"), other])


@pytest.mark.parametrize(("field", "value"), [("text_sha256", "u" * 64), ("tokens", 512)])
def test_perplexities_on_other_text_are_refused(builder: "Builder", field: str, value: Any) -> None:
    other: dict[str, Any] = {"tokens": 4096, "text_sha256": "t" * 64, field: value}
    quality = Quality(perplexity=16.0, text="pydoc topics", **other)
    records = [builder.latency("fp16"), builder.quality("fp16", 15.0)]
    records.append(builder.quality("awq-gemm", 16.0, quality=quality))
    with pytest.raises(UserError, match=rf"quality\.{field}: .* against {value}"):
        measurements(records)


def test_two_scenarios_called_published_are_refused(builder: "Builder") -> None:
    shorter = Scenario("published", prompt_tokens=512, new_tokens=1)
    records = [builder.latency("fp16", SCENARIOS["published"]), builder.latency("fp16", shorter)]
    with pytest.raises(UserError, match=r"two scenarios called 'published' \(prompt_tokens: 1024 against 512\)"):
        measurements(records)


def test_two_devices_are_two_measurements_and_may_differ(new_builder: "type[Builder]") -> None:
    cpu = new_builder()
    gpu = new_builder(
        device="cuda", compute_dtype="float16", environment=replace(cpu.environment, gpu="H100", cuda="12.8")
    )
    records = [cpu.latency("fp16"), cpu.latency("bnb-4bit"), gpu.latency("fp16"), gpu.latency("bnb-4bit")]
    found = measurements(records)
    assert [(one.device, one.compute_dtypes) for one in found] == [("cpu", ("float32",)), ("cuda", ("float16",))]


def test_every_refusal_is_one_line(builder: "Builder") -> None:
    records = [builder.latency("fp16"), builder.latency("bnb-4bit", environment=Environment(cpu="Xeon 1"))]
    with pytest.raises(UserError) as caught:
        measurements(records)
    assert "\n" not in str(caught.value)
    assert "bench --fresh" in str(caught.value)


def test_other_prompts_are_refused(builder: "Builder") -> None:
    records = [builder.latency("fp16", prompt_sha256="a"), builder.latency("bnb-4bit", prompt_sha256="b")]
    with pytest.raises(UserError, match=r"prompt_sha256: a against b"):
        check_alike(records)


def test_records_of_one_checkpoint_may_differ_too(builder: "Builder") -> None:
    records = [builder.latency("fp16", prompt_sha256="a"), builder.latency("fp16", round=1, prompt_sha256="b")]
    with pytest.raises(UserError, match=r"^records of Tiny-1M-FP16 were not measured alike \(prompt_sha256: a"):
        check_alike(records)


def test_two_models_of_one_name_are_not_compared(builder: "Builder") -> None:
    subjects = [
        replace(builder.subject(variant), source_sha256=sha) for variant, sha in (("fp16", "a"), ("awq-gemm", "b"))
    ]
    records = [builder.latency(one.variant, subject=one) for one in subjects]
    with pytest.raises(UserError, match=r"Tiny-1M-FP16 and .* were made from two models that are both called Tiny-1M"):
        measurements(records)
    unknown = replace(subjects[1], source_sha256=None)
    assert measurements([records[0], builder.latency("awq-gemm", subject=unknown)])
