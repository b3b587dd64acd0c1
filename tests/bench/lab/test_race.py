"""The race of AWQ quantizers, on a tiny random model: every contender really runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.lab.evaluate import licence_texts
from bench.lab.quantizers import CONTENDERS, _as_codes
from bench.lab.race import Entry, append_entry, kept_entry, line_of, main, parser, race, turns
from quantize.errors import UserError
from quantize.int4.weight import round_to_nearest

OURS = ["quantable, nearest", "quantable, gptq", "round to nearest"]


def run(source: Path, out: Path, *contenders: str, keep: bool = False, blocks: int = 4) -> list[Entry]:
    names = [word for name in contenders for word in ("--contender", name)]
    options = ["--source", str(source), "--out", str(out), "--blocks", str(blocks), "--block-tokens", "64"]
    return race(parser().parse_args([*options, *names, *(["--keep"] if keep else [])]))


def test_each_contender_is_timed_judged_and_recorded(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [*OURS, "autoawq, repaired"]
    entries = run(tiny_llama, tmp_path, *names)
    expected = [*names, *OURS]  # ours once more after the other
    assert [(entry.contender, entry.reason) for entry in entries] == [(name, None) for name in expected]
    lines = [json.loads(line) for line in (tmp_path / "race.jsonl").read_text().splitlines()]
    assert [line["contender"] for line in lines] == expected
    for line in lines:
        assert line["seconds"] > 0
        assert line["peak_bytes"] > 10**8
        assert set(line["perplexity"]) == set(line["divergence"]) == {"calibration", "other"}
        assert all(0 < value < 0.1 for value in line["divergence"].values())  # a random model is hard to lose
        assert line["blocks"] == [4, 64]
        assert line["environment"]["libraries"]["autoawq"]
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 7
    assert err == ""


def test_ours_run_again_after_each_of_the_others() -> None:
    assert turns(["a", "x", "b", "y"], {"a", "b"}) == ["a", "b", "x", "a", "b", "y", "a", "b"]
    assert turns(["x", "y"], {"a"}) == ["x", "y"]


def test_the_repaired_autoawq_chooses_almost_what_our_nearest_does(tiny_llama: Path, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path, "quantable, nearest", "autoawq, repaired")
    ours = load_file(tmp_path / "quantable-nearest.safetensors")
    theirs = load_file(tmp_path / "autoawq-repaired.safetensors")
    packed = [name for name in ours if name.endswith((".qweight", ".qzeros", ".scales"))]
    assert len(packed) == 2 * 7 * 3
    assert {name: ours[name].shape for name in packed} == {name: theirs[name].shape for name in packed}
    name = "model.layers.0.self_attn.v_proj.scales"
    torch.testing.assert_close(ours[name], theirs[name], rtol=0.5, atol=0.01)


def test_a_contender_that_cannot_run_is_a_line_with_its_reason(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "gptqmodel.py").write_text("raise ImportError('not installed here')")
    [entry] = run(tiny_llama, tmp_path, "gptqmodel")
    assert entry.seconds is None
    assert "not installed here" in str(entry.reason)
    assert line_of(entry, entry).startswith("gptqmodel              could not run: ")
    assert json.loads((tmp_path / "race.jsonl").read_text())["reason"] == entry.reason


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


def test_ratios_are_to_the_first_contender() -> None:
    first = Entry("a", 2.0, 10**9, {"calibration": 10.0}, {"calibration": 0.1})
    second = Entry("b", 5.0, 2 * 10**9, {"calibration": 11.0}, {"calibration": 0.07})
    assert "5.0 s (x2.50)  2.00 GB  calibration: ppl   11.000 KLD 0.0700 (x0.70)" in line_of(second, first)


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
    assert kept_entry("contender", request, stem) is None
    stem.with_suffix(".request.json").write_text(json.dumps(request))
    stem.with_suffix(".json").write_text(json.dumps({"seconds": 2.0, "peak_bytes": 10**9}))
    assert kept_entry("contender", request, stem) == Entry("contender", 2.0, 10**9)
    assert kept_entry("contender", {**request, "group_size": 128}, stem) is None
    out.unlink()
    assert kept_entry("contender", request, stem) is None


def test_a_bad_source_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder here"):
        run(tmp_path / "none", tmp_path / "out", "round to nearest")


def test_the_table_has_medians_and_ratios_to_autoawq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "race.jsonl"
    for entry in (
        Entry("ours", 40.0, 10**9, {"a": 14.0}, {"a": 0.06}),
        Entry("ours", 50.0, 10**9, {"a": 14.0}, {"a": 0.06}),
        Entry("autoawq, repaired", 900.0, 2 * 10**9, {"a": 15.0}, {"a": 0.12}),
        Entry("other", reason="not there"),
    ):
        append_entry(path, entry, {})
    assert main(["--table", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| ours | 45 | x0.05 | 1.00 | 14.00 | 0.060 | x0.5 |",
        "| autoawq, repaired | 900 | x1 | 2.00 | 15.00 | 0.120 | x1 |",
        "| other | did not run: not there |  |  |  |  |  |",
    ]
    assert main(["--table", str(tmp_path / "none.jsonl")]) == 2
    assert "run the race first" in capsys.readouterr().err


def test_who_left_layers_is_only_judged_again(tiny_llama: Path, tmp_path: Path) -> None:
    (first,) = run(tiny_llama, tmp_path, "round to nearest")
    layers = tmp_path / "round-to-nearest.safetensors"
    written = layers.stat().st_mtime_ns
    (again,) = run(tiny_llama, tmp_path, "round to nearest", keep=True)
    assert again == first
    assert layers.stat().st_mtime_ns == written
    layers.unlink()
    run(tiny_llama, tmp_path, "round to nearest", keep=True)
    assert layers.is_file()
    with pytest.raises(UserError, match="raced on other calibration tokens"):
        run(tiny_llama, tmp_path, "round to nearest", keep=True, blocks=3)
