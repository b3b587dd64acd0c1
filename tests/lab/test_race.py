"""The race of AWQ quantizers, on a tiny random model: every contender really runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize.calibration import builtin_texts
from quantize.int4.weight import round_to_nearest
from tests.lab.quantizers import CONTENDERS, _as_codes
from tests.lab.race import licence_texts, main, turns
from tests.lab.records import RaceRecord, read_lab

OURS = ["quantable, nearest", "quantable, gptq", "round to nearest"]


def run(source: Path, out: Path, *contenders: str, timeout: str = "600") -> list[RaceRecord]:
    names = [word for name in contenders for word in ("--contender", name)]
    options = ["--source", str(source), "--out", str(out), "--blocks", "4", "--block-tokens", "64"]
    assert main([*options, *names, "--timeout", timeout]) == 0
    return read_lab(out / "race.jsonl", RaceRecord)


def test_each_contender_is_timed_evaluated_and_recorded(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """autoawq, its fault repaired, chooses almost what our nearest rounding does."""
    names = [*OURS, "autoawq, repaired"]
    records = run(tiny_llama, tmp_path, *names)
    expected = [*names, *OURS]  # ours once more after the other
    assert [(record.contender, record.reason) for record in records] == [(name, None) for name in expected]
    for record in records:
        assert (record.seconds or 0) > 0
        assert (record.peak_bytes or 0) > 10**8
        assert set(record.perplexity or {}) == set(record.divergence or {}) == {"calibration", "other"}
        assert all(0 < value < 0.1 for value in (record.divergence or {}).values())  # a random model is hard to lose
        assert record.blocks == (4, 64)
        assert record.environment.libraries["autoawq"]
    out, err = capfd.readouterr()
    assert len([line for line in out.splitlines() if line.endswith(" s")]) == 7
    assert out.splitlines()[-1] == f"the table: python -m tests.lab.pages {tmp_path / 'race.jsonl'}"
    assert err == ""
    ours = load_file(tmp_path / "quantable-nearest.safetensors")
    theirs = load_file(tmp_path / "autoawq-repaired.safetensors")
    packed = [name for name in ours if name.endswith((".qweight", ".qzeros", ".scales"))]
    assert len(packed) == 2 * 7 * 3
    assert {name: ours[name].shape for name in packed} == {name: theirs[name].shape for name in packed}
    name = "model.layers.0.self_attn.v_proj.scales"
    torch.testing.assert_close(ours[name], theirs[name], rtol=0.5, atol=0.01)


def test_ours_run_again_after_each_of_the_others() -> None:
    assert turns(["a", "x", "b", "y"], {"a", "b"}) == ["a", "b", "x", "a", "b", "y", "a", "b"]
    assert turns(["x", "y"], {"a"}) == ["x", "y"]


def test_a_contender_that_cannot_run_is_a_record_with_its_reason(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "gptqmodel.py").write_text("raise ImportError('not installed here')")
    [record] = run(tiny_llama, tmp_path, "gptqmodel")
    assert record.seconds is None
    assert "not installed here" in str(record.reason)


def test_a_contender_that_takes_too_long_is_stopped_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    [record] = run(tiny_llama, tmp_path, "round to nearest", timeout="0.01")
    assert (record.seconds, record.reason) == (None, "took longer than 0.01 s (see --timeout)")


def test_rounded_weights_become_the_codes_they_came_from() -> None:
    weight = round_to_nearest(torch.randn(24, 128, generator=torch.Generator().manual_seed(0)), 32)
    scales, zeros = weight.scales.float(), weight.zeros.float()
    assert torch.equal(_as_codes(weight.dequantize(), scales, zeros).codes, weight.codes)
    with pytest.raises(ValueError, match="do not lie on the grid"):
        _as_codes(weight.dequantize() * 1.01, scales, zeros)


def test_an_unknown_contender_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--contender", "nobody"]) == 2
    known = ", ".join(CONTENDERS)
    assert capsys.readouterr().err == f"error: unknown contender 'nobody'; there are: {known}\n"


def paragraphs(texts: list[str]) -> list[str]:
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()]


def test_the_other_kind_of_text_is_every_licence_paragraph_once_and_none_of_the_calibrations() -> None:
    found = paragraphs(licence_texts())
    assert len(found) > 100
    assert len(found) == len(set(found))
    assert not set(found) & {*paragraphs(builtin_texts("calibration")), *paragraphs(builtin_texts("evaluation"))}


def test_other_licences_are_told_and_too_few_are_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "Permission is granted, free of charge. " * 2000
    texts = ({"licences": [words]}, "torch LICENSE is missing")
    monkeypatch.setattr("tests.lab.race.listed_texts", lambda _: texts)
    assert licence_texts() == [words]
    assert capsys.readouterr().out == "the other text is not that of constraints.txt: torch LICENSE is missing\n"
    texts[0]["licences"][0] = words[:1000]
    assert main(["--source", str(tiny_llama), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    reason = (
        "too little other text to race on (torch LICENSE is missing): pip install -c constraints.txt -e '.[models]'"
    )
    assert said.err == f"error: {reason}\n"
    assert not (tmp_path / "out").exists()


def test_a_bad_source_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no folder here" in capsys.readouterr().err
