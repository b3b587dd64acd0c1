"""A suite's file becomes rows, scenarios and rules, and its rows become what is measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records.comparison import widest_interval
from bench.records.record import Record
from bench.records.scenario import Scenario
from bench.records.stopping import PassRule, RoundsRule
from bench.run.plan import half_dtype, plan, target_of
from bench.suite.suite import checkpoint_targets, dummy_targets, shape_name, suite_named
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError
from reports.published import BIOMISTRAL, published_tables

Make = Callable[..., Checkpoint]
PUBLISHED = published_tables()[BIOMISTRAL]

HEAD = """
shape = "mistral-7b"
[reference]
base_model = "Tiny"
"""
ROWS = """
[[row]]
base_model = "Tiny"
source = "org/tiny"
variant = "fp16"
[[row]]
base_model = "Tiny"
source = "org/tiny"
variant = "awq-gemm"
group_size = 64
[[row]]
base_model = "Tiny-Merged"
source = "org/merged"
variant = "awq-gemm"
group_size = 64
[[row]]
base_model = "Tiny"
source = "org/tiny"
variant = "awq-gemm"
group_size = 64
kernel = "native"
published = false
"""
SCENARIO = """
[[scenario]]
name = "own"
prompt_tokens = 9
new_tokens = 3
"""


def own(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return str(path)


def test_biomistral_is_the_published_table() -> None:
    suite = suite_named("biomistral")
    published = [row for row in suite.rows if row.published]
    ours = [(row.base_model, row.group_size, row.quantization.w_bit, row.quantization.version) for row in published]
    assert ours == [(row.base_model, row.q_group_size, row.w_bit, row.version) for row in PUBLISHED.row]
    endings = [f"AWQ-QGS128-W4-{row.version}" if row.version else row.method for row in PUBLISHED.row[1:]]
    names = [f"{row.base_model}-{ending}" for row, ending in zip(PUBLISHED.row[1:], endings, strict=True)]
    assert [row.checkpoint_name for row in published[1:]] == names
    assert (suite.reference.base_model, suite.shape) == ("BioMistral-7B", "mistral-7b")
    assert suite.rounds.least == 3


def test_its_scenarios_are_the_cards_protocol_and_both_ways_to_decode() -> None:
    published, chat, graph = suite_named("biomistral").scenarios_named([])
    assert (published.name, published.new_tokens, published.batch, published.mode) == ("published", 1, 1, "eager")
    assert len(published.lengths) > 1
    assert chat == Scenario("chat", prompt_tokens=256, new_tokens=64)
    assert graph == Scenario("chat-graph", prompt_tokens=256, new_tokens=64, mode="graph")
    assert suite_named("biomistral").scenarios_named(["chat-graph"]) == (graph,)


def test_with_a_tokenizer_the_lengths_are_counted() -> None:
    suite = suite_named("biomistral")
    [counted] = suite.scenarios_named(["published"], lambda text: text)
    [estimated] = suite.scenarios_named(["published"])
    assert min(counted.lengths) > 2 * max(1, min(estimated.lengths))  # a character is less than a token


def test_rules_of_the_file_and_defaults_without(tmp_path: Path) -> None:
    suite = suite_named(own(tmp_path, HEAD + ROWS + SCENARIO))
    assert (suite.rounds, suite.rule) == (RoundsRule(), PassRule())
    tables = "[rounds]\nleast = 5\nmax_time_s = 7\n[rule]\nmax_time_s = 0.5\n"
    suite = suite_named(own(tmp_path, HEAD + ROWS + SCENARIO + tables))
    assert (suite.rounds, suite.rule) == (RoundsRule(least=5, max_time_s=7.0), PassRule(max_time_s=0.5))


def test_lengths_of_ones_own(tmp_path: Path) -> None:
    lengths = '[[scenario]]\nname = "many"\nlengths = [4, 8]\nnew_tokens = 2\nbatch = 3\n'
    [scenario] = suite_named(own(tmp_path, HEAD + ROWS + lengths)).scenarios_named([])
    assert scenario == Scenario.over("many", (4, 8), 2, batch=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS + SCENARIO, r"own\.toml: object missing required field `shape`"),
        ('shape = "x"\n' + ROWS + SCENARIO, r"own\.toml: object missing required field `reference`"),
        (HEAD.replace('"mistral-7b"', "7") + ROWS + SCENARIO, r"own\.toml: shape: expected `str`, got `int`"),
        (HEAD + SCENARIO, r"own\.toml has no \[\[row\]\]"),
        (HEAD + ROWS, r"own\.toml has no \[\[scenario\]\]: write one or more"),
        (HEAD + ROWS + "[scenario]\n", r"own\.toml has no \[\[scenario\]\]"),
        (HEAD.replace("Tiny", "Other") + ROWS + SCENARIO, r"own\.toml: no row is the reference, Other as fp16: add it"),
        (HEAD + ROWS + SCENARIO * 2, r"own\.toml: the scenario 'own' stands there more than once: leave one"),
        (HEAD + ROWS * 2 + SCENARIO, r"own\.toml: the row 'Tiny-FP16' stands there more than once: leave one"),
        (HEAD + ROWS + SCENARIO + "[speed]\n", r"own\.toml: unknown field speed; there are: shape, reference"),
        (HEAD + ROWS + SCENARIO + "[rounds]\nleast = 0\n", r"own\.toml: rounds\.least must be at least 1"),
        (
            HEAD + ROWS + SCENARIO + "[rounds]\nmax_time_s = nan\n",
            r"own\.toml: rounds\.max_time_s must be at least 0 seconds",
        ),
        (HEAD + ROWS + SCENARIO + "[rule]\nmax_time_s = nan\n", r"rule: a rule that can never be met"),
        (HEAD + ROWS + SCENARIO + "[rule]\nmax_warmups = 1\n", r"own\.toml: rule: a rule that can never be met"),
        (HEAD + ROWS + SCENARIO + 'batch = "two"\n', r"own\.toml, scenario 1: batch: expected `int`, got `str`"),
        (HEAD + ROWS + SCENARIO + 'lengths = "3-shot"\n', r"scenario 1: give prompt_tokens or lengths, one of the two"),
        (HEAD + ROWS + SCENARIO.replace("prompt_tokens = 9", 'lengths = "5-shot"'), r"scenario 1: lengths are numbers"),
        (
            HEAD + ROWS + SCENARIO.replace("prompt_tokens = 9", "lengths = [1.5]"),
            r"scenario 1: lengths\[0\]: expected `int`",
        ),
        (HEAD + ROWS + SCENARIO.replace("prompt_tokens = 9", "lengths = []"), r"scenario 1: scenario own: no prompt"),
        (HEAD + ROWS + SCENARIO + 'mode = "fast"\n', r"scenario 1: scenario own: mode must be one of eager, gr"),
        (HEAD + ROWS.replace("fp16", "fp8") + SCENARIO, r"own\.toml, row 1: unknown variant 'fp8'"),
    ],
)
def test_nonsense_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        suite_named(own(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_unknown_scenario(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no scenario 'chat'; there are: own"):
        suite_named(own(tmp_path, HEAD + ROWS + SCENARIO)).scenarios_named(["chat"])


# Random weights


def test_rows_become_random_weights_of_one_family(tmp_path: Path, shrunken: Path) -> None:
    suite = suite_named(own(tmp_path, HEAD + ROWS + SCENARIO))
    found = dummy_targets(suite, str(shrunken))
    subjects = [target.subject for target in found]
    assert [subject.name for subject in subjects] == [
        "Tiny-FP16, random weights",
        "Tiny-AWQ-QGS64-W4-GEMM, random weights",
        "Tiny-Merged-AWQ-QGS64-W4-GEMM, random weights",
        "Tiny-AWQ-QGS64-W4-GEMM, random weights, native kernel",
    ]
    assert {subject.baseline for subject in subjects} == {"Tiny"}
    assert [subject.may_be_reference for subject in subjects] == [True, False, False, False]
    assert [subject.kernel for subject in subjects] == [None, None, None, "native"]
    assert {subject.dummy for subject in subjects} == {"shrunken, 2 layers, hidden size 256"}
    assert {subject.file_weights_bytes for subject in subjects} == {None}
    assert found[1].dummy == str(shrunken)
    assert (subjects[1].variant, subjects[1].q_group_size) == ("awq-gemm", 64)
    assert not any(target.has_text for target in found)


def test_what_they_are_is_in_their_hash(tmp_path: Path, shrunken: Path) -> None:
    suite = suite_named(own(tmp_path, HEAD + ROWS + SCENARIO))
    first = [target.subject.content_sha256 for target in dummy_targets(suite, str(shrunken))]
    assert first == [target.subject.content_sha256 for target in dummy_targets(suite, str(shrunken))]
    assert len(set(first)) == 2  # fp16, and AWQ of one shape and group size, whatever base model it stands for
    other = tmp_path / "deeper.json"
    other.write_text(json.dumps(json.loads(shrunken.read_text()) | {"num_hidden_layers": 3}))
    deeper = [target.subject.content_sha256 for target in dummy_targets(suite, str(other))]
    assert not set(first) & set(deeper)


def test_the_suites_own_shape_is_the_published_models() -> None:
    found = dummy_targets(suite_named("biomistral"))
    subjects = [target.subject for target in found]
    assert {one.dummy for one in subjects} == {
        f"mistral-7b, {PUBLISHED.layers} layers, hidden size {PUBLISHED.hidden_size}"
    }
    assert {(one.dummy_layers, one.dummy_hidden_size) for one in subjects} == {
        (PUBLISHED.layers, PUBLISHED.hidden_size)
    }
    assert {target.dummy for target in found} == {"mistral-7b"}
    assert {target.half_dtype for target in found} == {"float16"}


def test_a_shape_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no config\.json and not one of llama-2-7b"):
        dummy_targets(suite_named("biomistral"), str(tmp_path / "none.json"))


def test_a_shape_in_words() -> None:
    assert shape_name("x", None, None) == "x"
    assert shape_name("x", 4, None) == "x, 4 layers"


def test_a_round_runs_the_rows_in_their_order_and_back(tmp_path: Path, shrunken: Path) -> None:
    suite = suite_named(own(tmp_path, HEAD + ROWS + SCENARIO))
    found = dummy_targets(suite, str(shrunken))
    runs = plan(list(reversed(found)), [Scenario("own", 9, 3)], range(2))
    assert [run.target for run in runs[:4]] == [found[0], found[3], found[2], found[1]]  # the reference first
    assert [run.target for run in plan(found, [Scenario("own", 9, 3)], range(2))] == [*found, *reversed(found)]
    assert [run.is_reference for run in runs] == [True, *[False] * 6, True]
    assert not any(run.quality or run.tasks for run in runs)


def test_a_rows_ratio_to_its_familys_reference_decides_when_it_is_enough(
    tmp_path: Path, shrunken: Path, records_of: Callable[..., list[Record]]
) -> None:
    found = dummy_targets(suite_named(own(tmp_path, HEAD + ROWS + SCENARIO)), str(shrunken))
    merged = [found[0], found[2]]
    assert merged[1].subject.base_model != merged[0].subject.base_model
    runs = plan(merged, [Scenario("own", 9, 3)], range(3))
    records = [record for run in runs for record in records_of(run)]
    assert widest_interval(records) == pytest.approx(0.0)
    assert widest_interval([record for record in records if record.subject == merged[1].subject]) is None


# Checkpoints


def test_rows_become_the_checkpoints_that_are_there(tmp_path: Path, make_checkpoint: Make) -> None:
    suite = suite_named(own(tmp_path, HEAD + ROWS + SCENARIO))
    make_checkpoint("awq-gemm", name="a", base_model="Tiny-Merged")
    make_checkpoint("bnb-8bit", name="not in the suite")
    folder = make_checkpoint("fp16", name="r").path.parent
    with pytest.raises(UserError) as caught:
        checkpoint_targets(suite, folder)
    assert str(caught.value) == (
        f"{folder} lacks Tiny-AWQ-QGS64-W4-GEMM: make what is missing with `quantize --suite "
        f"{suite.name} --out {folder}`, or measure random weights with --dummy"
    )
    make_checkpoint("awq-gemm", name="b")
    found = checkpoint_targets(suite, folder)
    assert [target.subject.name for target in found] == ["r", "b", "a", "b, native kernel"]
    assert [target.subject.family for target in found] == ["Tiny"] * 4
    assert all(target.has_text for target in found)


def test_a_folder_without_any_is_told_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks BioMistral-7B-FP16 and 7 more: make what is missing with `quantize"):
        checkpoint_targets(suite_named("biomistral"), tmp_path / "none")


def test_a_kernel_is_a_choice_for_awq_alone(make_checkpoint: Make) -> None:
    reference, awq = make_checkpoint("fp16"), make_checkpoint("awq-gemm")
    assert target_of(reference, kernel="native").subject == target_of(reference).subject
    assert target_of(awq, kernel="native").subject.name == "Tiny-awq-gemm, native kernel"
    assert target_of(awq, kernel="auto") == target_of(awq)


def test_a_checkpoint_without_a_readable_config_is_taken_for_float16(make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint("fp16")
    (checkpoint.path / "config.json").write_text("{")
    assert target_of(checkpoint).half_dtype == "float16"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({}, "float16"), ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float32"}, "float16")],
)
def test_the_half_dtype_of_a_config(config: dict[str, Any], dtype: str) -> None:
    assert half_dtype(config) == dtype
