"""The prompt lengths of the published protocol: three worked examples and a question of each of the card's ten tasks.

Time depends on how long a prompt is and on nothing else in it, so questions of our own in the tasks' forms
(prompts.toml) take the place of the data sets. Imports no torch.
"""

import functools
import re
import tomllib
from collections.abc import Callable, Sized
from pathlib import Path

WORDS = re.compile(r"\w+|[^\w\s]|\n")
TOKENS_PER_WORD = 1.23  # or mark, or end of a line: Mistral-7B's tokenizer makes 1.14 to 1.42 in these prompts

TokensOf = Callable[[str], Sized]  # a text's tokens, e.g. a tokenizer's `encode`


@functools.cache
def published_prompts() -> dict[str, str]:
    """The prompt of each of the ten tasks of the BioMistral-7B model card, in its order, each in its own form."""
    return tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))


def published_lengths(tokens_of: TokensOf | None = None) -> tuple[int, ...]:
    """Tokens of each of the ten prompts, ascending; estimated without a tokenizer, as with dummy weights."""
    count = estimated_tokens if tokens_of is None else lambda text: len(tokens_of(text))
    return tuple(sorted(count(prompt) for prompt in published_prompts().values()))


def estimated_tokens(text: str) -> int:
    """About how many tokens a tokenizer makes of this text."""
    return round(len(WORDS.findall(text)) * TOKENS_PER_WORD)
