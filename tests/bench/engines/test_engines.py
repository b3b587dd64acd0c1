"""Checkpoints in another engine: its rows beside its own reference, its failures as rows, its sums those of ours."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from bench.engines.protocol import latency, write_expected
from bench.records.scenario import Scenario
from bench.run.engine import engines_named
from bench.run.run import Outcome, bench
from bench.worker import quality as ours
from quantize.building.build import quantize
from quantize.errors import UserError
from quantize.loader import load

QUICK: dict[str, Any] = {"scenarios": (Scenario("short", 8, 4),), "device": "cpu", "rounds": 1, "max_time_s": 0.0}


@pytest.fixture(scope="module")
def checkpoints(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "runs"
    quantize(str(tiny_llama), ["fp16", "awq-ct"], folder, blocks=2, block_tokens=32, rounding="nearest", device="cpu")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))


def measured(folder: Path, tmp_path: Path, **how: Any) -> Outcome:
    return bench(folder, records=tmp_path / "records.jsonl", **{**QUICK, **how})


def test_the_reference_in_transformers_is_ours(checkpoints: Path, tmp_path: Path) -> None:
    mine = {one.kind: one for one in measured(checkpoints, tmp_path).records if one.subject.variant == "fp16"}
    outcome = measured(checkpoints, tmp_path, engines=(f"transformers={sys.executable}",))
    found = {one.kind: one for one in outcome.records if one.subject.variant == "fp16"}
    assert {one.subject.name for one in found.values()} == {"tiny-llama-FP16, transformers"}
    assert {one.subject.baseline for one in found.values()} == {"tiny-llama in transformers"}
    exact, theirs = mine["quality"].quality, found["quality"].quality
    assert exact is not None
    assert theirs is not None
    assert theirs.perplexity == pytest.approx(exact.perplexity, rel=1e-4)
    assert theirs.text_sha256 == exact.text_sha256
    latency_of = found["latency"].latency
    assert latency_of is not None
    assert {len(steps) for steps in latency_of.decode_s} == {3}
    assert found["latency"].kernels is not None
    assert found["latency"].kernels.decode.startswith("transformers ")
    ct = {one.kind: one for one in outcome.failed}  # the package that reads it is not installed here
    assert {one.status for one in ct.values()} == {"unsupported"}
    assert all("compressed-tensors" in str(one.reason) for one in ct.values())


@pytest.mark.parametrize(("engine", "package"), [("vllm", "vllm"), ("openvino", "openvino"), ("llamacpp", "llama_cpp")])
def test_an_engine_that_is_not_installed_is_a_row(engine: str, package: str, checkpoints: Path, tmp_path: Path) -> None:
    outcome = measured(checkpoints, tmp_path, engines=(engine,))
    assert not outcome.usable
    advice = f"give --engine {engine}=PATH/bin/python of an environment that has it"
    assert {(one.status, one.reason) for one in outcome.failed} == {
        ("unsupported", f"{engine}: No module named '{package}': {advice}")
    }


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("exec sleep 600", "timeout", "vllm: took longer than 2 s"),
        ("kill -SEGV $$", "error", "vllm: the process died of signal 11"),
        ("echo 'model type unknown'; exit 3", "error", "ended with code 3 and no record: model type unknown"),
        ('printf \'{"scenario": nul\' > "${@: -1}"; exit 1', "error", "ended with code 1 and no record"),
    ],
)
def test_an_engine_that_hangs_or_dies_is_a_row_and_the_others_have_figures(
    script: str, status: str, words: str, checkpoints: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{script}\n")
    python.chmod(0o755)
    reference = tmp_path / "runs"
    reference.mkdir()
    [folder] = checkpoints.glob("*-FP16")
    (reference / folder.name).symlink_to(folder)
    how = {**QUICK, "engines": ("quantable", f"vllm={python}"), "quality": False, "timeout_s": 60.0}
    if status == "timeout":  # of which our own worker needs more
        how |= {"engines": (f"vllm={python}",), "timeout_s": 2.0}
    outcome = bench(reference, records=tmp_path / "records.jsonl", **how)
    assert {one.status for one in outcome.records if one.subject.engine is None} <= {"ok"}
    [failed] = outcome.failed
    assert (failed.status, failed.subject.engine) == (status, "vllm")
    assert words in str(failed.reason)
    assert outcome.usable is ("quantable" in how["engines"])


def test_llama_cpp_gets_the_reference_as_gguf(checkpoints: Path, tmp_path: Path) -> None:
    """Whose settings the package gguf reads; another layout is named with what to make of it."""
    python = tmp_path / "python"
    seen = (
        f'import json, sys; r = json.load(open(sys.argv[-2])); open("{tmp_path}/seen", "a").write(r["folder"] + "\\n")'
    )
    python.write_text(f'#!/bin/bash\ncp "${{@: -2:1}}" {tmp_path}/request.json\n{sys.executable} -c \'{seen}\' "$@"\n')
    python.chmod(0o755)
    measured(checkpoints, tmp_path, engines=(f"llamacpp={python}",), quality=False)
    folders = [Path(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [folder.name for folder in folders if folder.parent == checkpoints] == ["tiny-llama-AWQ-QGS128-W4-CT"]
    [made] = {folder for folder in folders if folder.parent != checkpoints}
    assert GGUFReader(made / "model.gguf").fields["general.architecture"].contents() == "llama"
    assert not any(one.name.endswith("safetensors") for one in made.iterdir())


@pytest.mark.parametrize(("option", "words"), [("tgi", "unknown engine 'tgi'"), ("vllm=/nowhere", "no interpreter")])
def test_an_unknown_engine_is_one_line(option: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        engines_named((option,))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"device": "cuda"}, "runs on the CPU here"),
        ({"kernel": "dequantize"}, "kernels of its own"),
        ({"scenarios": (Scenario("two", 8, 4, batch=2),)}, "one prompt at a time"),
        ({"scenarios": (Scenario("recorded", 8, 4, mode="graph"),)}, "add --mode eager"),
    ],
)
def test_what_an_engine_would_measure_as_something_else_is_refused(
    how: dict[str, Any], words: str, checkpoints: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        measured(checkpoints, tmp_path, engines=("transformers",), **how)


def test_a_compiled_step_of_ours_stands_beside_eager_engines(checkpoints: Path, tmp_path: Path) -> None:
    eager, compiled = (Scenario(mode, 8, 4, mode=mode) for mode in ("eager", "compiled"))
    engines = ("quantable", "transformers")
    outcome = measured(checkpoints, tmp_path, engines=engines, scenarios=(eager, compiled), quality=False)
    done = {(one.subject.engine, one.scenario) for one in outcome.records if one.status == "ok"}
    assert done == {(None, eager), (None, compiled), ("transformers", eager)}


class Table:
    """An engine whose expectations are a table: behind each token the same row."""

    version, computes = "1", "float32"

    def __init__(self, logits: np.ndarray) -> None:
        self._rows, self.calls = logits - np.log(np.exp(logits).sum(-1, keepdims=True)), list[str]()

    def prefill(self, tokens: list[int]) -> None:
        self.calls.append("prefill")

    def step(self) -> None:
        self.calls.append("step")

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        found: np.ndarray = self._rows[tokens[:-1]].astype(np.float32)
        return found


class Embedding(torch.nn.Module):
    """The same table as a transformers model."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.from_numpy(logits).float())
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.table[input_ids]})


def test_its_sums_are_those_of_our_worker(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    base, other = (drawn.normal(size=(30, 30)) for _ in range(2))
    blocks = torch.from_numpy(drawn.integers(0, 30, (4, 20)))
    kept, mine = tmp_path / "kept.npy", tmp_path / "mine.npy"
    write_expected(Table(base), blocks.tolist(), kept)
    write_expected(Table(base + 0.1 * other), blocks.tolist(), mine)
    found = ours.quality_of_file(mine, blocks, text="t", expected=kept, exact=mine)
    exact = ours.quality(Embedding(base + 0.1 * other), blocks, text="t", expected=kept)
    assert exact.divergence is not None
    assert found.divergence is not None
    assert found.from_exact is not None
    assert found.perplexity == pytest.approx(exact.perplexity, rel=1e-4)
    assert (found.tokens, found.vocabulary, found.text_sha256) == (76, 30, exact.text_sha256)
    for name in ("mean", "median", "p99", "flips"):
        assert getattr(found.divergence, name) == pytest.approx(getattr(exact.divergence, name), rel=0.02), name
    assert found.from_exact.mean == pytest.approx(0, abs=1e-6)
    write_expected(Table(np.full((30, 30), np.nan)), blocks.tolist(), mine)
    with pytest.raises(FloatingPointError):
        ours.quality_of_file(mine, blocks, text="t", expected=kept, exact=None)


def test_passes_follow_two_that_warm_up() -> None:
    engine = Table(np.zeros((4, 4)))
    found = latency(engine, [[1, 2], [3]], 2, {"max_time_s": 0.0, "min_passes": 3})
    assert [len(found[key]) for key in ("warmup_s", "prefill_s", "decode_s")] == [2, 3, 3]
    assert engine.calls == ["prefill", "step", "step"] * 2 * 5


def test_awq_ct_loads_here(checkpoints: Path) -> None:
    [folder] = checkpoints.glob("*-CT")
    assert "torch int4" in load(folder, kernel="torch-cpu").kernel(1)
