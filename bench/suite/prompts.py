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

LETTERS, SHOTS = "ABCDE", 3
MMLU = (4, "{text}\n{options}")
MMLU_HEAD = "The following are multiple choice questions (with answers) about {}.\n\n"
FORMS = {
    "medqa_4options": ("medqa", 4, "Question: {text}\n{options}"),
    "medqa_5options": ("medqa", 5, "Question: {text}\n{options}"),
    "pubmedqa": ("pubmedqa", 0, "Abstract: {context}\nQuestion: {text}"),
    "medmcqa": ("medmcqa", 4, "Question: {text}\nChoices:\n{options}"),
}
"""Task -> its questions in questions.toml, how many options it shows, and how it puts one."""

WORDS = re.compile(r"\w+|[^\w\s]|\n")
TOKENS_PER_WORD = 1.23
"""Mistral-7B's tokenizer (32,000 pieces) makes so many tokens of a word, a mark or the end of a line in these prompts:
1.14 to 1.42 over the ten of them, so that no estimate is further than 14% from that tokenizer's count."""

TokensOf = Callable[[str], Sized]  # a text's tokens, e.g. a tokenizer's `encode`


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
    """The prompt of each of the ten tasks of the BioMistral-7B model card, in its order, each in its own form."""
    asked = questions()
    subjects = [name for name in asked if name not in {subject for subject, *_ in FORMS.values()}]
    mmlu = {
        f"mmlu_{name}": MMLU_HEAD.format(name.replace("_", " ")) + _few_shot(asked[name], *MMLU) for name in subjects
    }
    return mmlu | {task: _few_shot(asked[name], count, form) for task, (name, count, form) in FORMS.items()}


def published_lengths(tokens_of: TokensOf | None = None) -> tuple[int, ...]:
    """Tokens of each of the ten prompts, ascending; estimated without a tokenizer, as with dummy weights."""
    count = estimated_tokens if tokens_of is None else lambda text: len(tokens_of(text))
    return tuple(sorted(count(prompt) for prompt in published_prompts().values()))


def estimated_tokens(text: str) -> int:
    """About how many tokens a tokenizer makes of this text."""
    return round(len(WORDS.findall(text)) * TOKENS_PER_WORD)


def _few_shot(questions: Sequence[Question], count: int, form: str) -> str:
    """The first questions as worked examples, the next one left open."""
    shown: list[str] = []
    for one in questions[: SHOTS + 1]:
        lines = (f"{letter}. {option}" for letter, option in zip(LETTERS[:count], one.options, strict=False))
        put = form.format(text=one.text, context=one.context, options="\n".join(lines))
        shown.append(f"{put}\nAnswer:" + f" {one.answer}" * (len(shown) < SHOTS))
    return "\n\n".join(shown)
