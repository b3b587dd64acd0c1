"""The prompt lengths of the published protocol: three worked examples and a question of each of the card's ten tasks.

Time depends on how long a prompt is and on nothing else in it, so questions of our own in the tasks' forms
(questions.toml) take the place of the data sets. Imports no torch.
"""

import functools
import re
import tomllib
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from quantize.schema import from_data

LETTERS = "ABCDE"
SHOTS = 3

WORDS = re.compile(r"\w+|[^\w\s]|\n")
TOKENS_PER_WORD = 1.23
"""Mistral-7B's tokenizer (32,000 pieces) makes so many tokens of a word, a mark or the end of a line in these prompts.

It is 1.14 to 1.42 over the ten of them, so that no estimate is further than 14% from that tokenizer's count.
"""

TokensOf = Callable[[str], Sized]
"""A text's tokens, e.g. a tokenizer's `encode`."""


@dataclass(frozen=True)
class Question:
    """A question, its options (none: yes, no or maybe), the answer's letter or word, and the abstract it is about."""

    text: str
    answer: str
    options: tuple[str, ...] = ()
    context: str = ""


@functools.cache
def questions() -> dict[str, tuple[Question, ...]]:
    """Four questions a subject, by its name in questions.toml."""
    file = Path(__file__).with_name("questions.toml")
    entries = tomllib.loads(file.read_text(encoding="utf-8"))
    return {name: tuple(from_data(Question, one, file.name) for one in some) for name, some in entries.items()}


def published_prompts() -> dict[str, str]:
    """The prompt of each of the ten tasks of the BioMistral-7B model card, in its order, each in its own form.

    MMLU's begins with a line that names the subject; MedQA's question is a patient's story, PubMedQA's is about an
    abstract and is to be answered with yes, no or maybe.
    """
    asked, prompts = questions(), {}
    for name in asked:
        if name not in ("medqa", "medmcqa", "pubmedqa"):
            head = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
            prompts[f"mmlu_{name}"] = head + _few_shot(asked[name], lambda one: f"{one.text}\n{_options(one, 4)}")
    forms: dict[str, tuple[str, Callable[[Question], str]]] = {
        "medqa_4options": ("medqa", lambda one: f"Question: {one.text}\n{_options(one, 4)}"),
        "medqa_5options": ("medqa", lambda one: f"Question: {one.text}\n{_options(one, 5)}"),
        "pubmedqa": ("pubmedqa", lambda one: f"Abstract: {one.context}\nQuestion: {one.text}"),
        "medmcqa": ("medmcqa", lambda one: f"Question: {one.text}\nChoices:\n{_options(one, 4)}"),
    }
    return prompts | {task: _few_shot(asked[name], form) for task, (name, form) in forms.items()}


def published_lengths(tokens_of: TokensOf | None = None) -> tuple[int, ...]:
    """Tokens of each of the ten prompts, ascending.

    tokens_of: a tokenizer, for its own counts. Without one, as with dummy weights, each word, mark and end of a line
    counts as TOKENS_PER_WORD.
    """
    count = estimated_tokens if tokens_of is None else lambda text: len(tokens_of(text))
    return tuple(sorted(count(prompt) for prompt in published_prompts().values()))


def estimated_tokens(text: str) -> int:
    """About how many tokens a tokenizer makes of this text."""
    return round(len(WORDS.findall(text)) * TOKENS_PER_WORD)


def _few_shot(questions: Sequence[Question], form: Callable[[Question], str]) -> str:
    """The first questions as worked examples, the next one left open."""
    solved = [f"{form(one)}\nAnswer: {one.answer}" for one in questions[:SHOTS]]
    return "\n\n".join([*solved, f"{form(questions[SHOTS])}\nAnswer:"])


def _options(question: Question, count: int) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options[:count], strict=False))
