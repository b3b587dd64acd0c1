"""A suite's rows, and the checkpoints that `quantize --suite` makes of them."""

from pathlib import Path

import pytest

from quantize.checkpoint import find_checkpoints
from quantize.cli import main
from quantize.errors import UserError
from quantize.suite import SUITES, QuantizeCall, SuiteRow, calls_of, suite_file, suite_rows

HUB = "BioMistral/BioMistral-7B"


def toml(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def row(**fields: object) -> str:
    """One [[row]] of a suite's file."""
    words = {True: "true", False: "false"}
    values = (f"{key} = {words[value] if isinstance(value, bool) else repr(value)}" for key, value in fields.items())
    return "\n".join(["[[row]]", *values, ""])


def test_biomistral_has_the_published_rows_in_their_order_and_two_more() -> None:
    rows = suite_rows("biomistral")
    assert [(row.base_model, row.variant, row.group_size) for row in rows if row.published] == [
        ("BioMistral-7B", "fp16", None),
        ("BioMistral-7B", "awq-gemm", 128),
        ("BioMistral-7B", "awq-gemv", 128),
        ("BioMistral-7B", "bnb-4bit", None),
        ("BioMistral-7B", "bnb-8bit", None),
        ("BioMistral-7B-DARE", "awq-gemm", 128),
        ("BioMistral-7B-TIES", "awq-gemm", 128),
        ("BioMistral-7B-SLERP", "awq-gemm", 128),
    ]
    assert [(row.base_model, row.variant, row.kernel) for row in rows if not row.published] == [
        ("BioMistral-7B", "awq-gemm", "native"),
        ("BioMistral-7B", "awq-gemv", "native"),
    ]
    assert all(row.source == f"BioMistral/{row.base_model}" for row in rows)
    assert rows[1].checkpoint_name == "BioMistral-7B-AWQ-QGS128-W4-GEMM"


def test_one_job_makes_all_of_one_source() -> None:
    every = ("fp16", "awq-gemm", "awq-gemv", "bnb-4bit", "bnb-8bit")
    assert calls_of(suite_rows("biomistral")) == [
        QuantizeCall("BioMistral-7B", HUB, None, 128, every),
        *(
            QuantizeCall(f"BioMistral-7B-{m}", f"{HUB}-{m}", None, 128, ("awq-gemm",))
            for m in ("DARE", "TIES", "SLERP")
        ),
    ]


def test_another_group_size_or_revision_is_a_job_of_its_own() -> None:
    rows = [
        SuiteRow("A", "org/a", "fp16"),
        SuiteRow("A", "org/a", "awq-gemm", 64),
        SuiteRow("A", "org/a", "awq-gemm", 32),
        SuiteRow("A", "org/a", "bnb-4bit", revision="v2"),
        SuiteRow("B", "org/b", "bnb-8bit"),
    ]
    assert calls_of(rows) == [
        QuantizeCall("A", "org/a", None, 64, ("fp16", "awq-gemm")),
        QuantizeCall("A", "org/a", None, 32, ("awq-gemm",)),
        QuantizeCall("A", "org/a", "v2", 64, ("bnb-4bit",)),
        QuantizeCall("B", "org/b", None, None, ("bnb-8bit",)),
    ]


GOOD = {"base_model": "A", "source": "org/a", "variant": "fp16"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"s\.toml has no \[\[row\]\]: write one or more"),
        ("row = 3", r"s\.toml has no \[\[row\]\]"),
        ("row = [3]", r"s\.toml, row 1: expected `object`, got `int`"),
        ("[[row]", r"s\.toml is no suite \(.*\): fix it, or name another"),
        (row(**GOOD) + row(**GOOD, speed=1), r"s\.toml, row 2: unknown field speed; there are: base_model, source,"),
        (row(base_model="A", variant="fp16"), r"s\.toml, row 1: object missing required field `source`"),
        (row(**GOOD | {"source": 7}), r"row 1: source: expected `str`, got `int`"),
        (row(**GOOD, published=1), r"row 1: published: expected `bool`, got `int`"),
        (row(**GOOD | {"variant": "awq"}), r"row 1: unknown variant 'awq'; there are: fp16, awq-gemm"),
        (row(**GOOD | {"variant": "awq-gemm"}), r"row 1: awq-gemm needs a group_size: one of 128, 64, 32"),
        (row(**GOOD | {"variant": "awq-gemm"}, group_size=100), r"row 1: awq-gemm needs a group_size"),
        (row(**GOOD | {"variant": "awq-gemm"}, group_size=True), r"row 1: group_size: expected `int"),
        (row(**GOOD, group_size=64), r"row 1: fp16 has no group_size and no choice of a kernel: leave them out"),
        (row(**GOOD, kernel="native"), r"row 1: fp16 has no group_size and no choice of a kernel"),
    ],
)
def test_nonsense_is_refused_by_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        suite_rows(toml(tmp_path / "s.toml", text))


def test_a_suite_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert suite_file("biomistral") == SUITES / "biomistral.toml"
    own = tmp_path / "own.toml"
    own.touch()
    assert suite_file(str(own)) == own
    for wrong in ("biomistal", str(tmp_path / "none.toml"), str(tmp_path)):
        with pytest.raises(
            UserError, match=r"no suite '.*'; there are: autoawq-mistral-7b, biomistral, .*, or name a \.toml file"
        ):
            suite_file(wrong)


# The command


@pytest.fixture
def two_rows(tmp_path: Path, tiny_llama: Path) -> str:
    """The tiny model in half precision and in 4 bits."""
    fields = {"base_model": "tiny-llama", "source": str(tiny_llama)}
    return toml(tmp_path / "two.toml", row(**fields, variant="fp16") + row(**fields, variant="bnb-4bit"))


def test_quantize_makes_a_suites_checkpoints_and_keeps_what_is_there(
    tmp_path: Path, two_rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--suite", two_rows, "--out", str(out), "--device", "cpu", "--rounding", "nearest"]
    assert main(command) == 0
    made = {one.manifest.name: (one.manifest.created, one.content_sha256) for one in find_checkpoints(out)}
    assert list(made) == ["tiny-llama-FP16", "tiny-llama-BnB.4"]
    first = capsys.readouterr().out
    assert [line.split(":")[0] for line in first.splitlines() if " GB of weights, " in line] == [
        str(out / name) for name in made
    ]
    assert main(command) == 0
    again = {one.manifest.name: (one.manifest.created, one.content_sha256) for one in find_checkpoints(out)}
    assert again == made
    assert " GB of weights, " not in capsys.readouterr().out


def test_a_source_of_another_name_is_told(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = toml(tmp_path / "s.toml", row(base_model="Tiny", source=str(tiny_llama), variant="fp16"))
    assert main(["--suite", suite, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "makes checkpoints of tiny-llama, the suite calls it Tiny: write base_model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["org/a", "--suite", "biomistral"], "source does not go with --suite, which says what to make"),
        (["--suite", "biomistral", "--variant", "fp16"], "--variant does not go with --suite"),
        (["--suite", "biomistral", "--group-size", "64"], "--group-size does not go with --suite"),
        (["--suite", "none"], "no suite 'none'; there are: autoawq-mistral-7b, biomistral"),
        ([], "name the model to quantize: quantize SOURCE --out DIR"),
    ],
)
def test_what_does_not_go_with_a_suite(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {message}")
