"""Text becomes blocks without losing a token, and calibration never sees what evaluation judges on."""

import hashlib
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize import calibration
from quantize.calibration import (
    LISTED,
    PARAGRAPH,
    Chat,
    Split,
    blocks_sha256,
    builtin_texts,
    check_blocks,
    first_tokens,
    listed_texts,
    split_of,
    text_from,
    token_blocks,
)
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[2]

# What the names of Python 3.11's topics decide. A change here makes old and new perplexities incomparable.
EVALUATION = [
    "bitwise",
    "break",
    "calls",
    "class",
    "context-managers",
    "debugger",
    "exceptions",
    "for",
    "function",
    "global",
    "imaginary",
    "in",
    "lists",
    "numeric-types",
    "objects",
    "raise",
    "subscriptions",
    "typesmodules",
    "typesseq",
]
CALIBRATION = [
    "assert",
    "assignment",
    "compound",
    "formatstrings",
    "specialnames",
    "string-methods",
    "try",
    "types",
    "with",
    "yield",
]


class Characters:
    """A tokenizer whose ids are code points, so that a test can read the blocks."""

    def __init__(self, eos_token_id: int | None = 0) -> None:
        self.eos_token_id = eos_token_id
        self.read = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options in ({"add_special_tokens": added, "truncation": False} for added in (True, False))
        self.read += len(text)
        return {"input_ids": [ord(character) for character in text]}


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n")} - {""}


def test_the_split_of_the_topics_never_changes() -> None:
    assert {split_of(name) for name in EVALUATION} == {"evaluation"}
    assert {split_of(name) for name in CALIBRATION} == {"calibration"}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions have other topics")
def test_the_evaluation_topics_of_python_3_11() -> None:
    topics = importlib.import_module("pydoc_data.topics").topics
    assert sorted(name for name in topics if split_of(name) == "evaluation") == EVALUATION


def builtin_text(split: Split) -> str:
    return PARAGRAPH.join(builtin_texts(split))


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    calibration, evaluation = paragraphs(builtin_text("calibration")), paragraphs(builtin_text("evaluation"))
    assert len(calibration) > 1000
    assert len(evaluation) > 300
    assert not calibration & evaluation


def test_the_topics_do_quote_one_another_so_the_split_by_name_alone_would_not_do() -> None:
    topics = importlib.import_module("pydoc_data.topics").topics
    by_name = {
        split: paragraphs("\n\n".join(text for name, text in topics.items() if split_of(name) == split))
        for split in ("calibration", "evaluation")
    }
    assert by_name["calibration"] & by_name["evaluation"]
    assert by_name["evaluation"] == paragraphs(builtin_text("evaluation")), "evaluation keeps every paragraph"
    assert by_name["calibration"] - by_name["evaluation"] < paragraphs(builtin_text("calibration"))


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="other versions have other topics")
def test_the_evaluation_text_never_changes() -> None:
    """Perplexities in committed records are of this text."""
    digest = hashlib.sha256("\0".join(builtin_texts("evaluation")).encode()).hexdigest()
    assert digest == "9f471dce8fd349bf258c250d1c3e90db5a74a9b8923a0d34b1c8f3a15cf6d199"


def kind_of_paragraph() -> dict[str, str]:
    """The table of LISTED that a paragraph, white space aside, comes from."""
    return {part: kind for kind, texts in listed_texts(LISTED)[0].items() for part in paragraphs("\n\n".join(texts))}


def characters_by_kind(texts: list[str]) -> Counter[str]:
    kinds, found = kind_of_paragraph(), Counter[str]()
    for part in (part for text in texts for part in paragraphs(text)):
        found[kinds[part]] += len(part)
    return found


def test_calibration_is_most_of_the_topics_and_other_english_and_code() -> None:
    found = characters_by_kind(builtin_texts("calibration"))
    assert set(found) == {"documentation", "prose", "code"}
    assert 0.55 < found["documentation"] / found.total() < 0.8
    assert found["prose"] / found.total() > 0.1
    assert found["code"] / found.total() > 0.1


@pytest.mark.parametrize("stride", range(1, 9))
def test_no_stride_over_the_pieces_meets_one_kind_alone(stride: int) -> None:
    """token_blocks takes every n-th text of a long list."""
    found = characters_by_kind(builtin_texts("calibration")[::stride])
    assert 0.4 < found["documentation"] / found.total() < 0.9
    assert found["prose"] / found.total() > 0.03
    assert found["code"] / found.total() > 0.03


def test_every_quarter_of_the_calibration_text_holds_all_kinds() -> None:
    texts = builtin_texts("calibration")
    quarter = len(texts) // 4
    for start in range(0, 4 * quarter, quarter):
        found = characters_by_kind(texts[start : start + quarter])
        assert all(found[kind] / found.total() > 0.05 for kind in ("documentation", "prose", "code"))


def test_what_is_listed_of_the_standard_library_is_the_same_in_every_python() -> None:
    table = importlib.import_module("tomllib").loads(LISTED.read_text("utf-8"))
    library = {name: sha for kind in table.values() for name, sha in kind.items() if name.startswith("python ")}
    assert len(library) > 3
    for name, sha in library.items():
        [text] = calibration._texts_of(name)
        assert hashlib.sha256(text.encode()).hexdigest() == sha, name


def test_with_the_versions_of_constraints_the_packages_texts_are_as_listed() -> None:
    table = importlib.import_module("tomllib").loads(LISTED.read_text("utf-8"))
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for name, sha in [one for kind in table.values() for one in kind.items()]:
        package = name.partition(" ")[0]
        if package not in ("python", "topics"):
            assert package in pinned, f"{package} has no pinned version"
            if metadata.version(package) == pinned[package]:
                [text] = calibration._texts_of(name)
                assert hashlib.sha256(text.encode()).hexdigest() == sha, name


def test_what_is_missing_or_differs_is_told_and_what_differs_is_taken_as_it_is(tmp_path: Path) -> None:
    listed, names = tmp_path / "some.toml", ["json", "heapq", "string"]
    lines = [f'"python {name}.py" = "{"0" * 64}"' for name in names] + ['no-such-package = ""', '"pytest none.py" = ""']
    listed.write_text("[code]\n" + "\n".join(lines))
    found, told = listed_texts(listed)
    assert told == "python json.py is missing, python heapq.py differs, python string.py differs and 2 more"
    assert [text.splitlines()[0][:20] for text in found["code"]] == ['"""Heap queue algori', '"""A collection of s']
    digest = hashlib.sha256(found["code"][0].encode()).hexdigest()
    listed.write_text(f'[code]\n"python heapq.py" = "{digest}"')
    assert listed_texts(listed) == ({"code": found["code"][:1]}, "")


def test_a_built_in_text_that_is_not_everywhere_the_same_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(calibration, "listed_texts", lambda _: ({"code": ["a text"]}, "h11 is missing"))
    assert text_from("builtin", said.append) == ["a text"]
    reason = "the built-in text is not that of Python 3.11 and constraints.txt, codes will differ: h11 is missing"
    assert said == [reason]
    monkeypatch.setattr(calibration, "listed_texts", lambda _: ({"code": ["a text"]}, ""))
    text_from("builtin", said.append)
    assert said == [reason]


def test_no_builtin_paragraph_comes_twice() -> None:
    text = "\n\n".join(builtin_texts("calibration"))
    parts = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    assert len(parts) == len(set(parts))


def test_builtin_names_the_calibration_split_whose_first_topic_comes_first() -> None:
    assert text_from("builtin") == builtin_texts("calibration")
    assert 'The "assert" statement' in "".join(builtin_texts("calibration")[:9])


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Grüße,\n\nworld\n", encoding="utf-8")
    assert text_from(str(path)) == ["Grüße,\n\nworld\n"]


def test_json_lines_and_json_give_one_text_an_entry(tmp_path: Path) -> None:
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    # A line separator inside a string is no line's end.
    entries = [{"text": "one\u2028more"}, {"text": "  "}, {"text": "two", "id": 3}]
    lines.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n\n", "utf-8")
    listed.write_text(json.dumps(["one", {"text": "two"}, ""]), "utf-8")
    assert text_from(str(lines)) == ["one\u2028more", "two"]
    assert text_from(str(listed)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl, line 2 is no object with a string in the field"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', r"a\.jsonl, line 3 is no object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y\n', r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1 is no object"),
        ("a.json", b'{"text": "x"}', r"a\.json is no list"),
        ("a.json", b'["x", 3]', r"a\.json, entry 2 is no object"),
        ("a.json", b'["x"', r"a\.json is no JSON"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 at byte 3"),
        ("a.txt", b" \n\t\n", r"a\.txt holds no text"),
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.jsonl", b"", r"a\.jsonl holds no text"),
        ("a.parquet", b"PAR1", r"a\.parquet is no text that can be read: give a file that ends in \.txt, \.jsonl"),
    ],
)
def test_a_bad_text_file_is_one_line_that_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        text_from(str(path))
    assert "\n" not in str(raised.value)


def test_a_text_that_may_not_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(path: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "text.txt"
    path.write_text("a text")
    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UserError, match=r"cannot read .*text\.txt \(Permission denied\): fix its permissions"):
        text_from(str(path))


def test_a_text_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match=r"no such text: 'novel\.txt' is no file, not 'builtin' and not hub:NAME"):
        text_from("novel.txt")


def test_a_hub_data_set_gives_the_asked_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet_libraries():
        import datasets
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["a", "", "b"], "body": ["c", "d", "e"], "id": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert text_from("hub:org/name") == ["a", "b"]
    assert text_from("hub:org/name/small:test:body") == ["c", "d", "e"]
    assert asked == [(("org/name", None), {"split": "train"}), (("org/name", "small"), {"split": "test"})]
    with pytest.raises(UserError, match="no column 'txt'; it has: text, body, id"):
        text_from("hub:org/name:train:txt")
    with pytest.raises(UserError, match="column 'id' holds no text"):
        text_from("hub:org/name:train:id")


def test_a_hub_data_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with quiet_libraries():
        import datasets

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="data set org/none, split train, cannot be had") as raised:
        text_from("hub:org/none")
    assert "\n" not in str(raised.value)


def test_without_the_package_datasets_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        text_from("hub:org/name")


def test_all_texts_are_packed_with_the_end_token_between_and_nothing_lost() -> None:
    blocks = token_blocks(["abc", "", "de", "fghi"], Characters(), blocks=99, block_tokens=2)
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [list(map(ord, pair)) for pair in ("ab", "c\0", "de", "\0f", "gh")]


def test_a_tokenizer_without_an_end_token_just_joins() -> None:
    blocks = token_blocks(["abc", "de"], Characters(None), blocks=1, block_tokens=5)
    assert "".join(map(chr, blocks[0].tolist())) == "abcde"


@pytest.mark.parametrize("asked", [1, 2, 3, 7, 9, 10])
def test_blocks_are_spread_evenly_over_all_of_the_text_and_never_overlap(asked: int) -> None:
    text = "".join(map(chr, range(1, 105)))
    blocks = token_blocks([text], Characters(), blocks=asked, block_tokens=10)
    assert blocks.shape == (asked, 10)
    starts = blocks[:, 0].tolist()
    assert all(row == list(range(row[0], row[0] + 10)) for row in blocks.tolist())
    gaps = [after - before for before, after in pairwise(starts)]
    assert all(gap >= 10 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert starts[0] == 1
    assert asked == 1 or blocks[-1, -1] == 104


def test_fewer_blocks_come_back_when_the_text_is_short() -> None:
    assert token_blocks(["x" * 25], Characters(), blocks=8, block_tokens=10).shape == (2, 10)


def test_of_far_more_text_than_needed_only_a_part_is_tokenised_but_from_all_of_it() -> None:
    texts = [chr(1000 + number) * 50 for number in range(1000)]
    tokenizer = Characters()
    blocks = token_blocks(texts, tokenizer, blocks=10, block_tokens=20)
    assert blocks.shape == (10, 20)
    assert tokenizer.read < 0.1 * sum(map(len, texts))
    seen = [max(row) - 1000 for row in blocks.tolist()]
    assert seen[0] < 100
    assert seen[-1] > 900


def test_when_the_chosen_part_turns_out_too_short_more_is_read() -> None:
    class Sparse(Characters):
        """One token for twenty characters."""

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": super().__call__(text, **options)["input_ids"][::20]}

    texts = ["y" * 60 for _ in range(1000)]  # 3,000 tokens; 10 * 200 are asked for
    assert token_blocks(texts, Sparse(None), blocks=10, block_tokens=200).shape == (10, 200)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match="the text is empty"):
        token_blocks(texts, Characters(), blocks=1, block_tokens=4)


def test_a_text_too_short_for_one_block_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="has 3 tokens, too few for a block of 4"):
        token_blocks(["abc"], Characters(), blocks=1, block_tokens=4)


@pytest.mark.parametrize(("blocks", "block_tokens"), [(0, 4), (1, 0), (-1, 4)])
def test_sizes_below_one_are_refused(blocks: int, block_tokens: int) -> None:
    with pytest.raises(UserError, match="both must be at least 1"):
        token_blocks(["abcdefgh"], Characters(), blocks=blocks, block_tokens=block_tokens)


def test_the_hash_is_over_shape_and_ids_and_does_not_depend_on_the_machine() -> None:
    blocks = torch.tensor([[1, 2, 3], [4, 5, 600]])
    bytes_of_ids = b"".join(number.to_bytes(8, "little") for number in (1, 2, 3, 4, 5, 600))
    assert blocks_sha256(blocks) == hashlib.sha256(b"(2, 3)" + bytes_of_ids).hexdigest()
    assert blocks_sha256(blocks) == blocks_sha256(blocks.to(torch.int32).T.contiguous().T)
    assert blocks_sha256(blocks) != blocks_sha256(blocks.reshape(3, 2))


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Iterator[Any]:
    with quiet_libraries():
        from transformers import AutoTokenizer

        yield AutoTokenizer.from_pretrained(tiny_llama)


def test_a_real_tokenizer_gives_back_the_text_whole(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer.model_max_length = 64  # a longer text must neither be cut nor warned of
    texts = builtin_texts("evaluation")[:3]
    blocks = token_blocks(texts, tokenizer, blocks=10**6, block_tokens=32)
    expected = tokenizer.eos_token.join(texts)
    decoded = tokenizer.decode(blocks.flatten().tolist(), clean_up_tokenization_spaces=False)
    assert expected.startswith(decoded)
    assert len(expected) - len(decoded) < 32 * 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_a_surrogate_pair_is_no_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_text('{"text": "a \\ud800 b"}' if suffix == ".jsonl" else '["good", "a \\udfff b"]')
    where = "line 1" if suffix == ".jsonl" else "entry 2"
    with pytest.raises(UserError, match=f"{where} holds half of a surrogate pair"):
        text_from(str(path))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert text_from(str(path)) == ["hello"]


class Beginning:
    """A tokenizer of characters that puts token 1 before a text, as Llama's does, and 2 behind it."""

    eos_token_id = 2

    def __call__(self, text: str, *, add_special_tokens: bool, truncation: bool = False) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_a_block_begins_as_the_tokenizer_begins_a_text() -> None:
    assert first_tokens(Beginning()) == [1]
    blocks = token_blocks(["abcdef", "ghij"], Beginning(), blocks=3, block_tokens=4)
    assert blocks.tolist() == [[1, 97, 98, 99], [1, 101, 102, 2], [1, 104, 105, 106]]
    with pytest.raises(UserError, match="has no room for text"):
        token_blocks(["abc"], Beginning(), blocks=1, block_tokens=1)


def test_ids_and_positions_that_the_model_does_not_have() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    small = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    learned = AutoModelForCausalLM.from_config(GPT2Config(**small, n_positions=32), trust_remote_code=False)
    rotary = AutoModelForCausalLM.from_config(LlamaConfig(**small, max_position_embeddings=32), trust_remote_code=False)
    check_blocks(torch.full((2, 32), 63), learned)
    check_blocks(torch.full((2, 64), 63), rotary)
    with pytest.raises(UserError, match="gives id 64, the model has 64 rows: it is another model's tokenizer"):
        check_blocks(torch.full((2, 8), 64), rotary)
    with pytest.raises(UserError, match="the model has 32 positions, too few for blocks of 33 tokens"):
        check_blocks(torch.full((2, 33), 1), learned)


TEMPLATE = """{{ '<s>' }}{% for one in messages %}{% if one['role'] == 'system' %}\
{{ raise_exception('No system here.') }}{% endif %}[{{ one['role'] }}]{{ one['content'] }}{% endfor %}</s>"""
TURNS = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hi"}]
SHAREGPT = [{"from": "human", "value": "Grüße"}, {"from": "gpt", "value": "Hi", "weight": 1}]
WRITTEN = "<s>[user]Grüße[assistant]Hi</s>"


@pytest.fixture
def chatting(tokenizer: Any) -> Any:
    """A tokenizer that puts <s> before a text, as its chat template does; </s> ends a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    single = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = single
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(tmp_path: Path, *entries: Any, name: str = "chat.jsonl") -> str:
    path = tmp_path / name
    path.write_text(json.dumps(entries) if name.endswith(".json") else "\n".join(map(json.dumps, entries)), "utf-8")
    return str(path)


def decoded(texts: list[str], tokenizer: Any) -> str:
    blocks = token_blocks(texts, tokenizer, blocks=1000, block_tokens=3)
    return str(tokenizer.decode([token for block in blocks.tolist() for token in block[1:]]))


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.json"])
def test_chat_goes_through_the_template_and_special_tokens_come_once(
    name: str, tmp_path: Path, chatting: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = text_from(written(tmp_path, {"messages": TURNS}, {"conversations": SHAREGPT}, name=name))
    assert texts[0] == texts[1]
    assert [json.loads(text) for text in texts] == [TURNS, TURNS]
    assert first_tokens(chatting) == [chatting.bos_token_id]
    blocks = token_blocks(texts * 9, chatting, blocks=99, block_tokens=5)
    assert (blocks == chatting.bos_token_id).sum() == blocks.shape[0]
    assert (blocks[:, 0] == chatting.bos_token_id).all()
    stream = blocks[:, 1:].flatten().tolist()
    bare = chatting(WRITTEN.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
    assert stream == (bare * 99)[: len(stream)]
    assert capfd.readouterr() == ("", "")


def test_plain_text_beside_chat_stays_as_it_is(tmp_path: Path, chatting: Any) -> None:
    texts = text_from(written(tmp_path, {"text": "one"}, {"messages": TURNS}, {"text": "two", "messages": 3}))
    assert [type(text) for text in texts] == [str, Chat, str]
    found = decoded(texts, chatting)
    assert f"one{WRITTEN.removeprefix('<s>')}</s>two".startswith(found)
    assert len(found) > 30


def test_a_tokenizer_that_begins_no_text_keeps_what_the_template_writes(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    text = Chat(json.dumps(TURNS))
    blocks = token_blocks([text], tokenizer, blocks=1, block_tokens=4)
    assert blocks.tolist() == [tokenizer(WRITTEN, add_special_tokens=False)["input_ids"][:4]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            r"chat\.jsonl, line 2: message 1 lacks a role \(system, us",
        ),
        ({"messages": [TURNS[0], {"role": ["user"], "content": "x"}]}, r"line 2: message 2 lacks a role"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, r"line 2: message 2 lacks .* text as content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, r"line 2: message 1 lacks"),
        ({"messages": []}, r"line 2: message 1 lacks"),
        ({"messages": "hello"}, r"line 2: message 1 lacks"),
        ({"conversations": [{"from": "human"}]}, r"line 2: message 1 lacks"),
        ({"conversations": ["hello"]}, r"line 2: message 1 lacks"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, r"line 2 holds half of a surrogate pair"),
        ({"messages": None}, r"line 2 is no object with a string in the field \"text\", or with messages"),
    ],
)
def test_a_bad_chat_is_one_line_that_says_where(entry: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        text_from(written(tmp_path, {"text": "x"}, entry))
    assert "\n" not in str(raised.value)


def test_a_model_without_a_chat_template_is_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"cannot write this \(it has none\): give plain text; ") as raised:
        token_blocks([Chat(json.dumps(TURNS))], tokenizer, blocks=1, block_tokens=2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEMPLATE, "No system here"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ no_such_thing() }}", "undefined"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_what_a_template_refuses_is_one_line_that_shows_the_chat(template: str, reason: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    chat = Chat(json.dumps([{"role": "system", "content": "Be\nbrief"}]))
    with pytest.raises(UserError, match=rf"\(.*{reason}.*\): give plain text; .*Be\\nbrief") as raised:
        token_blocks([chat], tokenizer, blocks=1, block_tokens=2)
    assert "\n" not in str(raised.value)


def test_a_hub_data_set_of_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet_libraries():
        import datasets
    rows: dict[str, Any] = {"messages": [TURNS, TURNS], "id": [1, 2]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows))
    for spec in ("hub:org/name", "hub:org/name:train:messages"):
        assert [(type(text), json.loads(text)) for text in text_from(spec)] == [(Chat, TURNS)] * 2
    rows["messages"][1] = [{"role": "user", "content": None}]
    with pytest.raises(UserError, match="org/name, row 2: message 1 lacks"):
        text_from("hub:org/name")
