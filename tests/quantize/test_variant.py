"""The rows of the table, and how a user names them."""

import dataclasses

import pytest

from quantize.errors import UserError
from quantize.variant import GROUP_SIZES, REFERENCE, VARIANTS, variants_named


def test_the_rows_are_those_of_the_published_table() -> None:
    rows = [(v.name, v.method, v.w_bit, v.version) for v in VARIANTS.values() if v.published]
    assert rows == [
        ("fp16", "FP16", None, None),
        ("awq-gemm", "AWQ", 4, "GEMM"),
        ("awq-gemv", "AWQ", 4, "GEMV"),
        ("bnb-4bit", "BnB.4", 4, None),
        ("bnb-8bit", "BnB.8", 8, None),
    ]
    assert all(name == variant.name for name, variant in VARIANTS.items())
    assert VARIANTS[REFERENCE.name] is REFERENCE


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("fp16", "FP16"),
        ("awq-gemm", "AWQ-QGS128-W4-GEMM"),
        ("awq-gemv", "AWQ-QGS128-W4-GEMV"),
        ("bnb-4bit", "BnB.4"),
        ("bnb-8bit", "BnB.8"),
        ("rtn", "RTN-QGS128-W4-GEMM"),
    ],
)
def test_folders_are_named_as_the_published_checkpoints_are(name: str, suffix: str) -> None:
    assert VARIANTS[name].folder_suffix(128) == suffix


def test_the_rows_in_awqs_format() -> None:
    assert [name for name, variant in VARIANTS.items() if variant.is_awq] == [
        *("awq-gemm", "awq-gemv", "awq-ct", "awq-gguf", "rtn")
    ]
    assert list(GROUP_SIZES) == sorted(GROUP_SIZES, reverse=True)


def test_a_row_never_changes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFERENCE.w_bit = 8  # type: ignore[misc]


def test_names_come_back_in_the_order_of_the_table_without_repeats() -> None:
    assert [v.name for v in variants_named(["bnb-8bit", "fp16", "bnb-8bit"])] == ["fp16", "bnb-8bit"]
    published = [variant for variant in VARIANTS.values() if variant.published]
    assert variants_named(["all"]) == published
    assert variants_named(["bnb-4bit", "all"]) == published
    assert variants_named(["rtn", "fp16"]) == [REFERENCE, VARIANTS["rtn"]]
    with pytest.raises(UserError, match="no variant is named: choose some of fp16, "):
        variants_named([])


def test_an_unknown_variant_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError) as raised:
        variants_named(["fp16", "gptq"])
    assert str(raised.value) == (
        "unknown variant 'gptq'; there are: fp16, awq-gemm, awq-gemv, awq-ct, awq-gguf, rtn, bnb-4bit, bnb-8bit, or all"
    )
