"""Each checkpoint answers, one after the other; what it says is shown, never acted on."""

import shutil
from pathlib import Path

import pytest

import quantize
from bench.chat import Answer, answers, main
from quantize.checkpoint import find_checkpoints


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference and a quantized checkpoint of a model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    source = Path(shutil.copytree(tiny_llama, folder / "tiny"))
    (source / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:")
    quantize.quantize(str(source), ["fp16", "rtn"], folder / "runs")
    return folder / "runs"


def test_the_answer_is_that_of_the_model_in_its_chat_template(runs: Path) -> None:
    folders = [one.path for one in find_checkpoints(runs)]
    reference, quantized = answers(folders, "Who?", new=5, device="cpu")
    loaded = quantize.load(folders[0])
    prompt = loaded.tokenizer("Q: Who? A:", return_tensors="pt").input_ids
    expected = loaded.model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert list(reference.tokens) == expected
    assert reference.text == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert quantized.problem is None


def test_answers_stand_side_by_side_escaped(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [Answer("one\ntwo \x1b[31m", (1, 2, 3)), Answer("one", (1, 2, 4)), Answer(problem="oom: no room")]
    monkeypatch.setattr("bench.chat.answers", lambda folders, *_, **__: said[: len(folders)])
    assert main([str(runs), "--prompt", "Who?"]) == 0
    shown = ["tiny-FP16", "  one", "  two \\x1b[31m", ""]
    shown += ["tiny-RTN-QGS128-W4-GEMM (its first 2 of 3 tokens are those of FP16)", "  one", ""]
    assert capsys.readouterr().out.splitlines() == shown
    said[1] = said[2]
    assert main([str(runs), "--prompt", "Who?"]) == 1
    assert "  no answer: oom: no room" in capsys.readouterr().out
    assert main([str(runs), "--prompt", "Who?", "--variant", "awq-gemm"]) == 2


def test_a_model_that_cannot_be_loaded_has_a_reason(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(find_checkpoints(runs)[0].path, tmp_path / "cut"))
    (folder / "model.safetensors").write_bytes(b"")
    (found,) = answers([folder], "Who?", new=5, device="cpu")
    assert found.problem
    assert str(tmp_path) not in found.problem
