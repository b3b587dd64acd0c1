"""The race of AWQ quantizers, on a tiny random model: every contender really runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.lab.quantizers import CONTENDERS, _as_codes
from bench.lab.race import kept, licence_texts, main, parser, race, run_contender, turns
from bench.records.lab import RaceRecord
from bench.records.store import read_only
from quantize.errors import UserError
from quantize.int4.weight import round_to_nearest

OURS = ["quantable, nearest", "quantable, gptq", "round to nearest"]


def run(source: Path, out: Path, *contenders: str, keep: bool = False, blocks: int = 4) -> list[RaceRecord]:
    names = [word for name in contenders for word in ("--contender", name)]
    options = ["--source", str(source), "--out", str(out), "--blocks", str(blocks), "--block-tokens", "64"]
    return race(parser().parse_args([*options, *names, *(["--keep"] if keep else [])]))


def test_each_contender_is_timed_evaluated_and_recorded(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """autoawq, its fault repaired, chooses almost what our nearest rounding does."""
    names = [*OURS, "autoawq, repaired"]
    records = run(tiny_llama, tmp_path, *names)
    expected = [*names, *OURS]  # ours once more after the other
    assert [(record.contender, record.reason) for record in records] == [(name, None) for name in expected]
    assert read_only(tmp_path / "race.jsonl", RaceRecord) == records
    for record in records:
        assert (record.seconds or 0) > 0
        assert (record.peak_bytes or 0) > 10**8
        assert set(record.perplexity or {}) == set(record.divergence or {}) == {"calibration", "other"}
        assert all(0 < value < 0.1 for value in (record.divergence or {}).values())  # a random model is hard to lose
        assert record.blocks == (4, 64)
        assert record.environment.libraries["autoawq"]
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 8
    assert out.splitlines()[-1] == f"the table: report {tmp_path / 'race.jsonl'}"
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
    assert read_only(tmp_path / "race.jsonl", RaceRecord) == [record]


def test_a_contender_that_takes_too_long_is_stopped_and_says_so(tmp_path: Path) -> None:
    found = run_contender("gptqmodel", {"out": str(tmp_path / "layers.safetensors")}, tmp_path / "slow", 0.01)
    assert found == {"reason": "took longer than 0.01 s (see --timeout)"}


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


def test_the_other_kind_of_text_is_every_licence_paragraph_once() -> None:
    texts = licence_texts()
    paragraphs = [" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()]
    assert len(paragraphs) > 100
    assert len(paragraphs) == len(set(paragraphs))


def test_what_was_asked_otherwise_is_not_kept(tmp_path: Path) -> None:
    out = tmp_path / "layers.safetensors"
    out.touch()
    request = {"source": "model", "blocks": "blocks", "out": str(out), "group_size": 64}
    stem = tmp_path / "contender"
    assert kept(request, stem) is None
    stem.with_suffix(".request.json").write_text(json.dumps(request))
    stem.with_suffix(".json").write_text(json.dumps({"seconds": 2.0, "peak_bytes": 10**9}))
    assert kept(request, stem) == {"seconds": 2.0, "peak_bytes": 10**9}
    assert kept({**request, "group_size": 128}, stem) is None
    out.unlink()
    assert kept(request, stem) is None


def test_a_bad_source_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder here"):
        run(tmp_path / "none", tmp_path / "out", "round to nearest")


def test_who_left_layers_is_only_evaluated_again(tiny_llama: Path, tmp_path: Path) -> None:
    (first,) = run(tiny_llama, tmp_path, "round to nearest")
    layers = tmp_path / "round-to-nearest.safetensors"
    written = layers.stat().st_mtime_ns
    (again,) = run(tiny_llama, tmp_path, "round to nearest", keep=True)
    assert replace(again, when=first.when) == first
    assert layers.stat().st_mtime_ns == written
    layers.unlink()
    run(tiny_llama, tmp_path, "round to nearest", keep=True)
    assert layers.is_file()
    with pytest.raises(UserError, match="raced on other calibration tokens"):
        run(tiny_llama, tmp_path, "round to nearest", keep=True, blocks=3)
