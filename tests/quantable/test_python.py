"""`import quantable`: what it offers, and plain keyword arguments."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import bench
import quantable
import quantize
import reports
from bench.records.stopping import RoundsRule
from bench.worker.options import BenchChoices, BenchOptions
from quantable import BuildOptions, UserError
from quantize.building.job import BuildChoices
from quantize.rounding.options import BnbOptions
from quantize.schema import with_choices

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("package", [quantable, quantize, bench, reports])
def test_what_a_package_offers_is_there_and_typed(package: Any) -> None:
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert (Path(package.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match=f"module {package.__name__!r} has no attribute 'speed'"):
        package.speed  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    code = "import quantable, sys; quantable.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("choices", "own", "inner"), [(BuildChoices, BuildOptions, BnbOptions), (BenchChoices, BenchOptions, RoundsRule)]
)
def test_every_field_is_a_keyword_of_its_type(choices: Any, own: type, inner: type) -> None:
    wanted = get_type_hints(inner) | get_type_hints(own)
    if inner is RoundsRule:  # an int is the least
        wanted["rounds"] = int | wanted.pop("rounds")
        del wanted["least"]
    assert get_type_hints(choices) == wanted


def test_keywords_go_over_the_options() -> None:
    options = BuildOptions(blocks=7, bnb=BnbOptions(double_quant=True))
    found = with_choices(options, "bnb", {"group_size": 64, "quant_type": "fp4", "rounding": "nearest"})
    bnb = BnbOptions("fp4", double_quant=True)
    assert found == replace(options, group_size=64, rounding="nearest", bnb=bnb)
    assert with_choices(options, "bnb", {"bnb": BnbOptions(), "quant_type": "fp4"}).bnb == BnbOptions("fp4")


def test_an_unknown_keyword_is_named(tmp_path: Path) -> None:
    unknown: dict[str, Any] = {"groups": 64}
    with pytest.raises(UserError, match="there is no option 'groups'; there are: group_size, calibration, "):
        quantable.quantize("m", "fp16", tmp_path, **unknown)
    with pytest.raises(UserError, match="there is no option 'groups'; there are: scenarios, rounds, "):
        quantable.bench(tmp_path, **unknown)
    with pytest.raises(UserError, match=r"rounds\.least must be at least 1"):
        quantable.bench(tmp_path, rounds=0)


def test_one_variant_by_name_with_keywords(tiny_llama: Path, tmp_path: Path) -> None:
    few: Any = {"blocks": 2, "block_tokens": 32, "device": "cpu"}
    [made] = quantable.quantize(str(tiny_llama), "awq-gemm", tmp_path, group_size=64, **few)
    assert (made.checkpoint.manifest.q_group_size, made.kept) == (64, False)
    with pytest.raises(UserError, match="unknown variant 'awq'"):
        quantable.quantize(str(tiny_llama), "awq", tmp_path)
