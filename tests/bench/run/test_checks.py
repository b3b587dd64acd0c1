"""What is wrong with models, text and files is said before anything is measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.records.scenario import Scenario
from bench.records.store import append
from bench.run.checks import check_models, check_references, records_to_continue
from bench.run.plan import target_of
from bench.worker.request import QualityRequest, Target
from quantize.building.build import quantize
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError
from tests.builder import Builder

SHORT = Scenario("short", 8, 1)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return target_of(quantize(str(tiny_llama), ["fp16"], tmp_path_factory.mktemp("out"))[0].checkpoint)


def test_a_text_too_short_is_told(reference: Target, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(UserError, match=rf"^{reference.subject.name}: the text has \d+ tokens, too few"):
        check_models([reference], [SHORT], QualityRequest(data=str(text)))
    check_models([reference], [SHORT], None)


def test_positions_that_a_scenario_lacks_are_told(reference: Target) -> None:
    with pytest.raises(UserError, match=r"needs 100000 positions, the model has \d+: use a smaller --prompt"):
        check_models([reference], [SHORT, Scenario("long", 100_000, 1)], QualityRequest())
    check_models([reference], [SHORT], QualityRequest(block_tokens=64))


def test_a_tokenizer_of_another_model_is_told(reference: Target, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in Path(str(reference.checkpoint)).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"it is another model's tokenizer"):
        check_models([replace(reference, checkpoint=str(folder))], [SHORT], QualityRequest(block_tokens=64))


def test_a_reference_of_other_weights_is_no_reference(make_checkpoint: Callable[..., Checkpoint]) -> None:
    targets = [target_of(make_checkpoint("fp16", name="A")), target_of(make_checkpoint("bnb-4bit", name="B"))]
    folder = Path("runs")
    check_references(targets, ["a", "b"], folder)
    other = replace(targets[1], subject=replace(targets[1].subject, source_sha256="f" * 64))
    with pytest.raises(UserError, match=r"B was made from other weights than its reference A: .*--name"):
        check_references([targets[0], other], ["a", "b"], folder)


@pytest.mark.parametrize("content", ['{"name": "M", "schema_version": 1}\n', "a text\n", '{"text": "a line"}\n'])
def test_fresh_sets_no_other_file_aside(tmp_path: Path, content: str) -> None:
    path = tmp_path / "quantable.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"quantable\.json holds no records: give --records another name"):
        records_to_continue(path, fresh=True)


def test_fresh_sets_records_of_another_version_aside(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(path, Builder().quality("fp16", 15.0))
    path.write_text(path.read_text().replace('"schema_version":8', '"schema_version":99'))
    assert records_to_continue(path, fresh=True) == []
    with pytest.raises(UserError, match="schema version 99"):
        records_to_continue(path, fresh=False)
