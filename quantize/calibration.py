"""Text to calibrate and to judge on, and how it becomes blocks of tokens.

The built-in text is the documentation that Python carries for `help()` and, for calibration, what `calibration.toml`
names. Calibration and evaluation never share a paragraph: perplexity is always of text that no search has seen.
"""

import hashlib
import json
import re
import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any, Literal

import torch

from quantize.errors import UserError
from quantize.quiet import quiet_libraries

BUILTIN, HUB_PREFIX, PARAGRAPH = "builtin", "hub:", "\n\n"
AMPLE_CHARACTERS = 16  # characters of text a token needed that are surely enough; a token of English has about four
LISTED = Path(__file__).with_suffix(".toml")
PIECE = re.compile(r"[^\n].{1000,}?(?=\n\n|\Z)|[^\n].*", re.DOTALL)  # whole paragraphs, about a block of 256 tokens
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
Split = Literal["calibration", "evaluation"]


class Chat(str):
    """A conversation, to be written by a chat template: the JSON of a list of messages, each with role and content."""


def split_of(topic: str) -> Split:
    """A built-in topic's split, which never changes: evaluation when its SHA-256 begins with a byte divisible by 4."""
    return "evaluation" if hashlib.sha256(topic.encode()).digest()[0] % 4 == 0 else "calibration"


def builtin_texts(split: Split) -> list[str]:
    """Evaluation: its topics in the order of their names. Calibration: pieces of what is listed, kinds mixed evenly.

    Topics quote one another. Within a split a repeated paragraph is kept where it comes first; one that an
    evaluation topic holds is left out of calibration. Paragraphs that differ in white space are the same."""
    seen = set[str]()
    names = (name for name in sorted(topics) if split_of(name) == "evaluation")
    evaluation = list(filter(None, (PARAGRAPH.join(unseen_paragraphs(topics[name], seen)) for name in names)))
    if split == "evaluation":
        return evaluation
    places, chance = list[tuple[float, str]](), Random(0)  # a place of its own each, lest a stride meets one kind alone
    for texts in listed_texts(LISTED)[0].values():
        kind = [piece for text in texts for piece in PIECE.findall(PARAGRAPH.join(unseen_paragraphs(text, seen)))]
        places += [((n + chance.random()) / len(kind), piece) for n, piece in enumerate(kind)]
    return [piece for _, piece in sorted(places)]


def unseen_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """The paragraphs of `text` that are not in `seen`, which they join; white space makes no difference."""
    for paragraph in text.split(PARAGRAPH):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            yield paragraph


def listed_texts(listed: Path) -> tuple[dict[str, list[str]], str]:
    """The texts that a TOML file names, by table, as this machine has them; what is missing or differs, in a line."""
    found, told = dict[str, list[str]](), []
    for kind, table in tomllib.loads(listed.read_text("utf-8")).items():
        for name, digest in table.items():
            found.setdefault(kind, []).extend(texts := _texts_of(name))
            if hashlib.sha256(PARAGRAPH.join(texts).encode()).hexdigest() != digest:
                told.append(f"{name} {'differs' if texts else 'is missing'}")
    return found, ", ".join(told[:3]) + (f" and {len(told) - 3} more" if told[3:] else "")


def _texts_of(name: str) -> list[str]:
    package, _, file = name.partition(" ")
    try:
        if name == "topics":
            return [topics[one] for one in sorted(topics) if split_of(one) == "calibration"]
        if not file:
            return metadata.metadata(name).get_all("Description", [])
        home = sysconfig.get_path("stdlib") if package == "python" else metadata.distribution(package).locate_file("")
        return [Path(str(home), file).read_text("utf-8")]
    except (OSError, ImportError, ValueError):
        return []


def text_from(spec: str, say: Callable[[str], object] = str) -> list[str]:
    """The texts that `spec` names; those without a visible character are left out. say: told what differs elsewhere.

    - `builtin`: the calibration split of the built-in text.
    - a `.txt` file: one text. A `.jsonl` file: one object with a field "text" a line. A `.json` file: a list
      of such objects, or of strings. One with "messages" or "conversations" (from, value) in place of "text" is a Chat.
    - `hub:NAME[:split[:column]]`: a data set on the hub, by default split "train", column "text", "messages"
      or "conversations". NAME is org/name, or org/name/configuration.

    Raises UserError, naming the line where there is one, for what cannot be read."""
    if spec == BUILTIN:
        if told := listed_texts(LISTED)[1]:
            say(f"the built-in text is not that of Python 3.11 and constraints.txt, codes will differ: {told}")
        return builtin_texts("calibration")
    found = _from_hub(spec.removeprefix(HUB_PREFIX)) if spec.startswith(HUB_PREFIX) else _from_file(Path(spec), spec)
    texts = [text for text in found if text.strip()]
    if not texts:
        raise UserError(f"{spec} holds no text: choose another, or {BUILTIN!r}")
    return texts


def _from_file(path: Path, spec: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"no such text: {spec!r} is no file, not {BUILTIN!r} and not hub:NAME")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl", ".json"):
        raise UserError(f"{path} is no text that can be read: give a file that ends in .txt, .jsonl, .json")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): fix its permissions") from None
    if suffix == ".txt":
        return [content]
    if suffix == ".jsonl":
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(content.split("\n"), start=1) if line.strip())
        return [_text_in(_parse(line, place), place) for place, line in lines]
    entries = _parse(content, str(path))
    if not isinstance(entries, list):
        raise UserError(f'{path} is no list: write a list of strings or of objects with a field "text"')
    places = ((f"{path}, entry {n}", one) for n, one in enumerate(entries, start=1))
    return [_text_in({"text": one} if isinstance(one, str) else one, place) for place, one in places]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}): fix it") from None


def _text_in(entry: Any, where: str) -> str:
    fields = entry if isinstance(entry, dict) else {}
    turns = fields.get("messages", fields.get("conversations"))
    text = fields.get("text") if turns is None or "text" in fields else _chat_in(turns, where)
    if not isinstance(text, str):
        raise UserError(f'{where} is no object with a string in the field "text", or with messages: fix it')
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where} holds half of a surrogate pair, which is no text: fix it")
    return text


def _chat_in(turns: Any, where: str) -> Chat:
    messages = []
    for number, turn in enumerate(turns if isinstance(turns, list) and turns else [None], start=1):
        said = turn if isinstance(turn, dict) else {}
        role, content = ROLES.get(str(said.get("role", said.get("from")))), said.get("content", said.get("value"))
        if role is None or not isinstance(content, str):
            raise UserError(f"{where}: message {number} lacks a role ({', '.join(ROLES)}) or text as content: fix it")
        messages.append({"role": role, "content": content})
    return Chat(json.dumps(messages, ensure_ascii=False))


def _from_hub(spec: str) -> list[str]:
    name, split, column = (*spec.split(":", 2), "", "")[:3]
    split, parts = split or "train", name.split("/")
    try:
        import datasets
    except ImportError:
        raise UserError("text from the hub needs the package datasets: pip install datasets") from None
    try:
        with quiet_libraries():
            data = datasets.load_dataset("/".join(parts[:2]), "/".join(parts[2:]) or None, split=split)
    except Exception as error:  # the library raises anything from ValueError to its own and its clients' errors
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data set {name}, split {split}, cannot be had ({first}): fix it, or give a file") from None
    column = column or next((one for one in ("text", "messages", "conversations") if one in data.column_names), "text")
    if column not in data.column_names:
        columns = ", ".join(data.column_names)
        raise UserError(f"data set {name} has no column {column!r}; it has: {columns} (hub:NAME:split:column)")
    texts = list(data[column])
    if not all(isinstance(text, str | list) for text in texts):
        raise UserError(f"data set {name}: column {column!r} holds no text; choose another (hub:NAME:split:column)")
    return [one if isinstance(one, str) else _chat_in(one, f"{name}, row {n}") for n, one in enumerate(texts, start=1)]


def token_blocks(texts: Sequence[str], tokenizer: Any, *, blocks: int, block_tokens: int) -> torch.Tensor:
    """Texts as packed token ids: int64 of shape [blocks, block_tokens].

    All texts follow one another in one stream, the tokenizer's end-of-sequence token between two of them; nothing is
    truncated or padded. Each block begins with the `first_tokens`. The blocks are spread evenly over a stream that is
    longer than needed; of one that is shorter there are fewer. Of far more text than needed, only every n-th text is
    tokenised. Raises UserError when the texts are empty or too short for one block."""
    if blocks < 1 or block_tokens < 1:
        raise UserError(f"{blocks} blocks of {block_tokens} tokens: both must be at least 1")
    first = first_tokens(tokenizer)
    length = block_tokens - len(first)
    if length < 1:
        raise UserError(f"a block of {block_tokens} tokens has no room for text: the tokenizer adds {len(first)}")
    needed = blocks * length
    step = max(1, sum(map(len, texts)) // (needed * AMPLE_CHARACTERS))
    while len(stream := _token_stream(texts[::step], tokenizer, first)) < needed and step > 1:
        step //= 2
    if not stream:
        raise UserError("the text is empty: choose another")
    found = min(blocks, len(stream) // length)
    if found == 0:
        raise UserError(f"the text has {len(stream)} tokens, too few for a block of {block_tokens}: give a longer one")
    spare = len(stream) - length if found == blocks else (found - 1) * length
    starts = [number * spare // max(1, found - 1) for number in range(found)]
    return torch.tensor([first + stream[start : start + length] for start in starts], dtype=torch.int64)


def first_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: its beginning-of-sequence token where the model was trained with one."""
    with quiet_libraries():
        whole, bare = (list(tokenizer("a", add_special_tokens=a, truncation=False)["input_ids"]) for a in (True, False))
    starts = [n for n in range(len(whole)) if whole[n : n + len(bare)] == bare]
    return whole[: starts[0]] if starts and bare else []


def check_blocks(blocks: torch.Tensor, model: Any, shorter: str = "use fewer --block-tokens") -> None:
    """Raise UserError for token ids that this model has no row for, and for blocks longer than its learned positions.

    model: its weights may be on the meta device. Rotary positions have no end. shorter: what to do about the length."""
    rows, largest = model.get_input_embeddings().num_embeddings, int(blocks.max())
    if largest >= rows:
        raise UserError(f"the tokenizer gives id {largest}, the model has {rows} rows: it is another model's tokenizer")
    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    learned = any(positions <= one.num_embeddings <= positions + 2 for one in tables)  # OPT has two rows more
    if learned and 0 < positions < blocks.shape[1]:
        lacking = f"the model has {positions} positions, too few for blocks of {blocks.shape[1]} tokens"
        raise UserError(f"{lacking}: {shorter}")


def _token_stream(texts: Sequence[str], tokenizer: Any, first: list[int]) -> list[int]:
    """All ids in one row; a chat has the beginning and the end that its template writes, but for the `first` tokens."""
    separator = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    stream: list[int] = []
    with quiet_libraries():  # tokenizers warn of texts longer than their model's context
        for text in texts:
            written = _written(text, tokenizer) if (chat := isinstance(text, Chat)) else text
            ids = list(tokenizer(written, add_special_tokens=False, truncation=False)["input_ids"])
            begun = len(first) if chat and ids[: len(first)] == first else 0
            stream += ids[begun:] if chat or not stream or not ids else separator + ids
    return stream


def _written(chat: str, tokenizer: Any) -> str:
    try:  # transformers runs a template in a sandbox
        return str(tokenizer.apply_chat_template(json.loads(chat), tokenize=False))
    except Exception as error:  # whatever a template raises
        why = str(error).strip().split("\n")[0] if getattr(tokenizer, "chat_template", None) else "it has none"
        raise UserError(f"the model's chat template cannot write this ({why}): give plain text; {chat[:80]}") from None


def blocks_sha256(blocks: torch.Tensor) -> str:
    """Hex SHA-256 over the blocks' shape and token ids (64-bit, little-endian, row by row)."""
    ids = blocks.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"{tuple(blocks.shape)}".encode() + ids).hexdigest()
