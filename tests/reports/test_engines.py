"""The matrix: which engine reads which checkpoint, and whether it computes what the codes say."""

from dataclasses import replace

from bench.records.record import Divergence, Quality, Record
from reports.engines import matrix
from reports.results import measurements
from reports.table import Bullets, Table
from tests.builder import Builder


def judged(builder: Builder, variant: str, engine: str | None, perplexity: float, exact: float | None) -> Record:
    record = builder.quality(variant, perplexity)
    subject = record.subject
    name = subject.name if engine is None else f"{subject.name}, {engine}"
    divergence = None if exact is None else Divergence(exact, exact, exact, 0.0)
    quality = Quality(perplexity, 4096, "pydoc topics", "t" * 64, from_exact=divergence)
    return replace(record, subject=replace(subject, name=name, engine=engine), quality=quality)


def test_a_cell_for_each_checkpoint_and_engine(builder: Builder) -> None:
    records = [
        judged(builder, "fp16", None, 14.03, None),
        judged(builder, "awq-gemm", None, 14.92, None),
        judged(builder, "fp16", "vllm", 14.04, 0.00005),
        judged(builder, "awq-gemm", "vllm", 14.95, 0.0019),
        judged(builder, "fp16", "llamacpp", 14.03, 0.0),
        judged(builder, "awq-gemm", "llamacpp", 21.5, 0.4),
    ]
    failed = builder.failure("awq-gemv", "error", "vllm: it would read GEMV as GEMM: make awq-gemm")
    subject = replace(failed.subject, name=f"{failed.subject.name}, vllm", engine="vllm")
    records.append(replace(failed, subject=subject, kind="quality", scenario=None, round=None))
    [measurement] = measurements(records)
    table, _, reasons = matrix(measurement)
    assert isinstance(table, Table)
    assert table.titles == ["Checkpoint", "quantable", "vllm", "llamacpp"]
    assert [row[1:] for row in table.texts()] == [
        ["14.03", "14.04", "14.03"],
        ["14.92", "14.95 (0.0019)", "21.50, otherwise (0.4000)"],
        ["—", "error", "—"],
    ]
    assert isinstance(reasons, Bullets)
    assert "GEMV" in str(reasons)
    assert "make awq-gemm" in str(reasons)


def test_there_is_none_where_one_engine_alone_ran(builder: Builder) -> None:
    [measurement] = measurements([judged(builder, "fp16", None, 14.03, None)])
    assert list(matrix(measurement)) == []
