"""`bench` judges a checkpoint of another maker against its base model, wherever the two lie."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bench.run.run import Outcome, bench, targets_in
from quantize.building.build import quantize
from quantize.errors import UserError
from quantize.model.pretrained import model_of, tokenizer_of
from tests import foreign
from tests.foreign import write

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.fixture
def judged(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPTQ checkpoint of the tiny model, alone in its folder; what is kept goes into a cache of this test."""
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write(tiny_llama, tmp_path, GPTQ, partial(foreign.gptq, group=32, act_order=True))[0]


def lost(judged: Path, **how: str) -> Outcome:
    return bench(judged, scenarios=(), device="cpu", **how)  # type: ignore[arg-type]


def test_one_folder_is_judged_and_the_reference_is_kept(judged: Path, tiny_llama: Path, tmp_path: Path) -> None:
    first = lost(judged, reference=str(tiny_llama))
    assert first.path == Path("runs/foreign/records.jsonl")
    assert [(one.subject.name, one.subject.method, one.status) for one in first.records] == [
        ("tiny-llama-FP16", "FP16", "ok"),
        ("foreign", "GPTQ", "ok"),
    ]
    reference, gptq = (one.quality for one in first.records)
    assert reference is not None
    assert gptq is not None
    from bench.worker.quality import evaluation_blocks, quality

    dense, tokenizer = model_of(tmp_path / "dense"), tokenizer_of(tmp_path / "dense")
    exact = quality(dense, evaluation_blocks(tokenizer, blocks=12, block_tokens=512))
    assert gptq.perplexity == pytest.approx(exact.perplexity, rel=1e-3)
    assert gptq.divergence is not None
    again = bench(judged, scenarios=(), device="cpu", reference=str(tiny_llama), records=tmp_path / "again.jsonl")
    assert (again.measured, len(again.records)) == (1, 2)


def test_the_base_may_stand_beside_it_or_in_its_card(judged: Path, tiny_llama: Path, tmp_path: Path) -> None:
    quantize(str(tiny_llama), "fp16", tmp_path / "runs")
    shutil.move(judged, tmp_path / "runs" / "foreign")
    ours, theirs = targets_in(tmp_path / "runs")
    assert (ours.subject.may_be_reference, theirs.subject.method) == (True, "GPTQ")
    assert theirs.subject.source_sha256 == ours.subject.source_sha256
    (tmp_path / "runs" / "foreign" / "README.md").write_text(f"---\nbase_model: {tiny_llama}\n---\n")
    assert [target.subject.name for target in targets_in(tmp_path / "runs")] == [ours.subject.name, "foreign"]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (lambda source, other: None, "does not say which model it was made from: name that with --reference"),
        (lambda source, other: str(other), "was not made from wider: .* is .* here and .* there"),
        (lambda source, other: "nothing/here at all", "no folder here, no hub id"),
    ],
)
def test_a_base_that_is_missing_or_another_model_is_one_line(
    reference: Callable[[Path, Path], str | None], words: str, judged: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "wider"
    shutil.copytree(tiny_llama, other)
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.intermediate_size = 384
    LlamaForCausalLM(config).half().save_pretrained(other)
    with pytest.raises(UserError, match=words):
        bench(judged, scenarios=(), device="cpu", reference=reference(tiny_llama, other))


def test_what_cannot_be_read_is_a_row_and_a_changed_file_another_checkpoint(judged: Path, tiny_llama: Path) -> None:
    lost(judged, reference=str(tiny_llama))
    text = (judged / "config.json").read_text()
    (judged / "config.json").write_text(text.replace('"quant_method": "gptq"', '"quant_method": "hqq"'))
    with pytest.raises(UserError, match=r"foreign is not what .* has records of"):
        lost(judged, reference=str(tiny_llama))
    outcome = bench(judged, scenarios=(), device="cpu", reference=str(tiny_llama), fresh=True)
    assert [(one.status, one.reason) for one in outcome.failed] == [
        ("unsupported", "it is quantized by hqq, which needs the package hqq")
    ]
