import pytest

from bench.suite.prompts import TOKENS_PER_WORD, estimated_tokens, published_lengths, published_prompts
from bench.worker.tasks import GROUPS
from quantize.source import Source


def test_there_is_a_prompt_for_each_of_the_cards_tasks() -> None:
    names = list(published_prompts())
    assert [name for name in names if name != "medqa_5options"] == list(GROUPS["medical"])


@pytest.mark.parametrize("name", list(published_prompts()))
def test_three_worked_examples_come_before_an_open_question(name: str) -> None:
    prompt = published_prompts()[name]
    assert prompt.count("\nAnswer: ") == 3
    assert prompt.endswith("\nAnswer:")
    options = 0 if name == "pubmedqa" else 5 if name == "medqa_5options" else 4
    for letter in "ABCDE":
        assert prompt.count(f"\n{letter}. ") == (4 if options > "ABCDE".index(letter) else 0)


def test_an_example_shows_its_options_and_its_answer() -> None:
    first = published_prompts()["medqa_4options"].split("\n\n")[0].splitlines()
    assert first[1:] == ["A. Digoxin", "B. Verapamil", "C. Enalapril", "D. Nitroglycerin", "Answer: C"]


def test_every_answer_is_among_the_options_shown() -> None:
    for name, prompt in published_prompts().items():
        answers = [line.removeprefix("Answer: ") for line in prompt.splitlines() if line.startswith("Answer: ")]
        assert set(answers) <= ({"yes", "no", "maybe"} if name == "pubmedqa" else set("ABCD")), name


def test_with_a_tokenizer_the_lengths_are_its_own() -> None:
    assert published_lengths(list) == tuple(sorted(map(len, published_prompts().values())))


def test_without_one_they_are_estimated_from_words() -> None:
    lengths = published_lengths()
    assert lengths == tuple(sorted(map(estimated_tokens, published_prompts().values())))
    assert len(lengths) == 10
    assert lengths[-1] > 5 * lengths[0]
    assert estimated_tokens("Two words.\n" * 100) == round(TOKENS_PER_WORD * 400)


@pytest.mark.slow
def test_the_estimate_is_near_a_real_tokenizers_counts(embedded: Source) -> None:
    """SmolLM2's, which has half as many pieces again as Mistral's and so makes fewer tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder)
    for counted, estimated in zip(published_lengths(tokenizer.encode), published_lengths(), strict=True):
        assert estimated == pytest.approx(counted, rel=0.25)
