import json
import math
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.records.record import TaskScore
from bench.worker.tasks import GROUPS, _result, evaluate, expand
from quantize.errors import UserError

FOLDER = Path(__file__).parent / "local_task"
QUESTIONS = [json.loads(line) for line in (FOLDER / "capitals.jsonl").read_text().splitlines()]


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval, which here looks for no network and leaves nothing in the user's cache."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval: pip install 'quantable[lm-eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def subject(tiny_llama: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llama)


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, before: str, answer: str) -> float:
    """Sum of log p(token | those before it) over the tokens of `answer`."""
    start = len(tokenizer(before)["input_ids"])
    tokens = torch.tensor(tokenizer(before + answer)["input_ids"])
    log_p = torch.log_softmax(model(input_ids=tokens[None]).logits[0, :-1].double(), dim=-1)
    return float(log_p.gather(1, tokens[1:, None])[start - 1 :].sum())


def picks(model: Any, tokenizer: Any) -> list[int]:
    """For each of QUESTIONS the choice with the largest log-likelihood a character."""
    likeliest = []
    for item in QUESTIONS:
        before = f"Question: {item['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, before, f" {choice}") / len(choice) for choice in item["choices"]]
        likeliest.append(scores.index(max(scores)))
    return likeliest


def write_task(folder: Path, *, answers: list[int], dataset: str = "json") -> Path:
    """A copy of the local task with other answers, or with another data set."""
    folder.mkdir()
    yaml = (FOLDER / "capitals.yaml").read_text()
    (folder / "capitals.yaml").write_text(yaml.replace("dataset_path: json", f"dataset_path: {dataset}"))
    lines = [json.dumps(item | {"answer": answer}) for item, answer in zip(QUESTIONS, answers, strict=True)]
    (folder / "capitals.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.usefixtures("lm_eval")
def test_the_accuracy_is_that_of_the_models_own_log_likelihoods(
    subject: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (result,) = evaluate(*subject, ["capitals"], folder=FOLDER, limit=None)
    assert capfd.readouterr() == ("", "")
    assert Path.cwd() == tmp_path
    right = [pick == item["answer"] for pick, item in zip(picks(*subject), QUESTIONS, strict=True)]
    share = sum(right) / len(right)
    stderr = math.sqrt(share * (1 - share) / (len(right) - 1))
    assert astuple(result) == ("capitals", "acc_norm", share, pytest.approx(stderr), 8, 0, None, None)


@pytest.mark.usefixtures("lm_eval")
def test_the_answers_decide_and_the_limit_takes_the_first_questions(
    subject: tuple[Any, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = picks(*subject)
    half = [pick if number < 4 else (pick + 1) % 4 for number, pick in enumerate(answers)]
    folder = write_task(tmp_path / "own", answers=half)
    (whole,) = evaluate(*subject, ["capitals"], folder=folder, limit=None)
    (first,) = evaluate(*subject, ["capitals"], folder=folder, limit=4)
    assert (whole.value, whole.samples) == (0.5, 8)
    assert first == TaskScore("capitals", "acc_norm", 1.0, 0.0, samples=4, shots=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("lm_eval")
def test_data_that_cannot_be_reached_is_one_line(
    subject: tuple[Any, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_task(tmp_path / "own", answers=[0] * 8, dataset="nobody/nothing")
    with pytest.raises(
        UserError, match=r"^task capitals cannot be loaded \(.*nobody/nothing.*\): leave it out"
    ) as error:
        evaluate(*subject, ["capitals"], folder=folder, limit=None)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("lm_eval")
def test_lm_eval_knows_the_medical_tasks_and_an_unknown_one_is_named(
    subject: tuple[Any, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^unknown task 'medqa_4option': did you mean medqa_4options.*lm-eval ls"):
        evaluate(*subject, ["medical", "medqa_4option"], folder=FOLDER, limit=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("lm_eval")
def test_a_folder_that_is_not_there(subject: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere: give one"):
        evaluate(*subject, ["capitals"], folder=tmp_path / "nowhere", limit=None)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'quantable\[lm-eval\]'$"):
        evaluate(object(), object(), ["medical"], folder=None, limit=None)


def test_a_limit_that_asks_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="use a limit of 1 or more"):
        evaluate(object(), object(), ["medical"], folder=None, limit=0)


def test_dummy_weights_have_nothing_to_say() -> None:
    with pytest.raises(UserError, match="dummy weights"):
        evaluate(object(), None, ["medical"], folder=None, limit=None)


def test_a_group_becomes_its_tasks_each_once_and_in_order() -> None:
    assert expand(["mine", "medmcqa", "medical"])[:3] == ("mine", "medmcqa", "mmlu_clinical_knowledge")
    assert len(expand(["mine", "medmcqa", "medical"])) == 1 + len(GROUPS["medical"])
    assert expand(GROUPS) == GROUPS["medical"]
    with pytest.raises(UserError, match="name tasks of lm-eval or one of medical"):
        expand([])


@pytest.mark.parametrize(
    ("path", "asked", "expected"),
    [("org/arc", 9, "org/arc"), ("org/arc", 8, None), ("json", 9, None), (None, 9, None), ("own/data", 9, None)],
)
def test_only_a_whole_data_set_of_the_hub_is_named(
    tmp_path: Path, path: str | None, asked: int, expected: str | None
) -> None:
    (tmp_path / "own" / "data").mkdir(parents=True)
    found = {
        "results": {"arc": {"acc,none": 0.5}},
        "n-samples": {"arc": {"original": 9, "effective": asked}},
        "n-shot": {"arc": 0},
        "configs": {"arc": {"dataset_path": path, "dataset_name": "easy"}},
    }
    score = _result("arc", found, tmp_path)
    assert (score.dataset, score.configuration) == (expected, expected and "easy")
