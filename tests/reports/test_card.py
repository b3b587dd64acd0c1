"""A card is made from facts alone, twice the same, and leaves to people what people wrote."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, parse_eval_result_entries
from yaml import safe_load

import quantize
from bench.records.record import Divergence, TaskScore
from bench.records.store import append
from bench.run.plan import in_engine, target_of
from quantize.checkpoint import CARD_NAME, MANIFEST_NAME, SourceFacts, find_checkpoints, open_checkpoint, verify
from quantize.errors import UserError
from reports.card import BEGIN, END, EVALUATIONS_NAME, card, main
from tests.builder import CHAT, Builder

ROOT = Path(__file__).parents[2]
SOURCE_CARD = """\
---
license: other
license_name: tiny
language: [en, no]
tags: [poetry]
model-index: [{name: not ours, results: []}]
---
# The source's own words
"""


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every variant, of a source with a card and a licence. Read it, or copy it."""
    folder = tmp_path_factory.mktemp("private-place")
    source = Path(shutil.copytree(tiny_llama, folder / "source"))
    (source / CARD_NAME).write_text(SOURCE_CARD)
    (source / "LICENSE").write_text("All is allowed.")
    (folder / "mine.txt").write_text("Words of one's own to look at. " * 300)
    options = quantize.BuildOptions(calibration=str(folder / "mine.txt"), blocks=2, block_tokens=32)
    quantize.quantize(str(source), ["all", "rtn"], folder / "runs", options=options)
    return folder / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def awq(runs: Path) -> Path:
    return next(one.path for one in find_checkpoints(runs) if one.manifest.variant == "awq-gemm")


def measure(runs: Path, *tasks: TaskScore, perplexity: float = 15.3) -> None:
    """Leave records of the reference and of AWQ GEMM beside the checkpoints."""
    builder = Builder("source")
    for checkpoint in find_checkpoints(runs):
        name, subject = checkpoint.manifest.variant, target_of(checkpoint).subject
        if name in ("fp16", "awq-gemm"):
            factor = 1.0 if name == "fp16" else 0.5
            append(runs / "records.jsonl", builder.latency(name, subject=subject, prefill_s=(2 * factor,)))
            append(runs / "records.jsonl", builder.latency(name, CHAT, subject=subject, step_s=0.04 * factor))
            figures = builder.quality(name, 15.0 if name == "fp16" else perplexity)
            append(runs / "records.jsonl", replace(figures, subject=subject))
            if tasks:
                append(runs / "records.jsonl", builder.record("tasks", subject, tasks=tasks))


def as_hub(folder: Path) -> None:
    """Have the manifest say that the source is of the hub."""
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["source"] |= {"kind": "hub", "id": "org/tiny", "revision": "0" * 40}
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def test_the_first_card_says_what_is_known_and_names_no_path(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = awq(runs)
    measure(runs)
    assert main([str(folder), "--write", "--namespace", "us"]) == 0
    text = (folder / CARD_NAME).read_text()
    found = ModelCard(text).data.to_dict()
    assert found["license"] == "other"
    assert found["license_name"] == "tiny"
    assert found["language"] == ["en", "no"]
    assert found["tags"] == ["poetry", "quantable", "awq", "4-bit"]
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    assert not {"base_model", "base_model_relation", "model-index"} & found.keys()
    assert "The source's own words" not in text
    assert "private-place" not in text
    assert "mine.txt" not in text
    assert f"[{folder.name}](https://huggingface.co/us/{folder.name})" in text
    assert "| x0.50 |" in text
    assert "x1.02" in text
    assert "Measured on a CPU (Epyc 9, 2 threads) on 2025-03-01" in text
    assert "by rounding gptq" in text
    assert "vLLM" in text
    assert "--base-model org/name" in capsys.readouterr().err


def test_a_card_written_twice_is_the_same_and_what_people_wrote_stays(runs: Path) -> None:
    folder = awq(runs)
    measure(runs)
    given = [str(folder), "--write", "--base-model", "org/tiny"]
    assert main(given) == 0
    first = (folder / CARD_NAME).read_text()
    assert main(given[:2]) == 0
    assert (folder / CARD_NAME).read_text() == first
    found = ModelCard(first).data
    assert (found["base_model"], found["base_model_relation"]) == ("org/tiny", "quantized")
    mine = first.replace("license: other", "license: mit").replace(BEGIN, f"Ask us.\n\n{BEGIN}") + "\nThank you.\n"
    (folder / CARD_NAME).write_text(mine)
    (runs / "records.jsonl").unlink()
    assert main(given[:2]) == 0
    second = (folder / CARD_NAME).read_text()
    assert mine.partition(BEGIN)[0] == second.partition(BEGIN)[0]
    assert mine.partition(END)[2] == second.partition(END)[2]
    assert "Measured on" not in second
    assert main(given[:2]) == 0
    assert (folder / CARD_NAME).read_text() == second


def test_a_readme_of_ones_own_keeps_every_word(runs: Path) -> None:
    folder = awq(runs)
    (folder / CARD_NAME).write_text("# Mine\n\nWords.\n")
    as_hub(folder)
    card(folder).write(folder)
    text = (folder / CARD_NAME).read_text()
    assert "\n# Mine\n\nWords.\n\n<!--" in text
    assert ModelCard(text).data["base_model"] == "org/tiny"
    assert f"at revision {'0' * 40}" in text


def test_a_card_changes_nothing_of_the_checkpoint(runs: Path) -> None:
    folder = awq(runs)
    before = open_checkpoint(folder).content_sha256
    card(folder).write(folder)
    (folder / ".gitattributes").write_text("* -text\n")
    (folder / "pareto.png").write_bytes(b"a picture")
    checkpoint = open_checkpoint(folder)
    verify(checkpoint)
    assert checkpoint.content_sha256 == before
    assert "![Loss against size](pareto.png)" not in card(folder).text, "a plot without figures"
    (folder / CARD_NAME).unlink()
    (folder / "LICENSE").unlink()
    verify(open_checkpoint(folder))
    assert any("no LICENSE" in line for line in card(folder).advice)


def test_other_engines_have_a_line_each(runs: Path) -> None:
    measure(runs)
    checkpoint, reference = (open_checkpoint(one) for one in (awq(runs), next(runs.glob("*-FP16"))))
    builder, here = Builder("source"), runs / "records.jsonl"
    for one, perplexity, exact in ((reference, 15.0, 0.0), (checkpoint, 15.4, 0.002)):
        found = builder.quality("fp16", perplexity)
        assert found.quality is not None
        quality = replace(found.quality, from_exact=Divergence(exact, exact, exact, 0.0))
        append(here, replace(found, quality=quality, subject=in_engine(target_of(one), "vllm").subject))
    subject = in_engine(target_of(checkpoint), "gptqmodel").subject
    append(here, builder.record("quality", subject, status="error", reason="gptqmodel: no kernel"))
    fp16 = builder.quality("fp16", 15.0)
    append(here, replace(fp16, subject=in_engine(target_of(reference), "gptqmodel").subject))
    text = card(checkpoint.path).text
    assert "- vllm: 15.40 (0.0020)\n" in text
    assert f"- gptqmodel: {checkpoint.path.name}: gptqmodel: no kernel\n" in text
    assert text.count("Perplexity in other engines") == 1


def test_figures_of_other_contents_are_not_shown(runs: Path) -> None:
    folder = awq(runs)
    measure(runs)
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["files"]["config.json"]["sha256"] = "0" * 64
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    found = card(folder)
    assert "Measured on" not in found.text
    assert "no figures: the records are of other checkpoints, measure this one" in found.advice


def test_a_broken_checkpoint_says_so_first(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(runs, TaskScore("arc", "acc", 0.5, dataset="org/arc"), perplexity=400.0)
    assert main([str(awq(runs))]) == 1
    out, err = capsys.readouterr()
    assert out.partition(BEGIN)[2].lstrip().startswith("- AWQ GEMM, group 128, broken: its perplexity is x26.7")
    assert "it is broken: its perplexity is x26.7 the reference's" in err
    assert card(awq(runs)).evaluations is None


def test_scores_of_whole_hub_data_sets_become_evaluation_results(runs: Path) -> None:
    folder = awq(runs)
    anatomy = TaskScore("mmlu_anatomy", "acc", 0.41, 0.02, 135, 0, "cais/mmlu", "anatomy")
    measure(runs, anatomy, replace(anatomy, name="capitals", dataset=None))
    card(folder).write(folder)
    (entry,) = parse_eval_result_entries(safe_load((folder / EVALUATIONS_NAME).read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("cais/mmlu", "anatomy", 0.41)
    assert entry.notes == "acc of 135 questions, 0-shot, task mmlu_anatomy of lm-eval"
    verify(open_checkpoint(folder))
    (runs / "records.jsonl").unlink()
    card(folder).write(folder)
    assert not (folder / EVALUATIONS_NAME).exists()


@pytest.mark.parametrize(
    "content",
    [
        f"{BEGIN}\nno end",
        f"{END}\n{BEGIN}",
        f"{BEGIN}{BEGIN}{END}",
        "---\n[a, list]\n---\n",
        "---\na: [\n---\n",
        "\udcff",
    ],
)
def test_a_readme_that_cannot_be_renewed_is_one_line_and_left_as_it_is(
    runs: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = awq(runs) / CARD_NAME
    path.write_bytes(written := content.encode(errors="surrogateescape"))
    assert main([str(path.parent), "--write"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_bytes() == written


def test_random_weights_and_odd_names_have_no_card(runs: Path) -> None:
    folder = awq(runs)
    with pytest.raises(UserError, match="no name on the hub"):
        card(folder, base_model="/home/me/model")
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["source"] = SourceFacts("dummy", "dummy:tiny", None, None).__dict__
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(UserError, match="random weights"):
        card(folder)


def test_the_snippet_of_every_variant_runs(made: Path) -> None:
    for checkpoint in find_checkpoints(made):
        code = re.search(r"```python\n(.*?)```", card(checkpoint.path).text, re.DOTALL)
        assert code
        command = [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code[1]}",
        ]
        ran = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, (checkpoint.path.name, ran.stderr)
        assert ran.stdout.startswith("The capital of France is")
