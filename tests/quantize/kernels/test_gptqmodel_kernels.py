"""gptqmodel's import prints a banner and sets environment variables: neither reaches a process that only asks."""

import os
import sys
from pathlib import Path

import pytest
import torch

from quantize.int4.weight import round_to_nearest
from quantize.kernels import KERNELS

LOUD = """
import os
print("a banner")
os.environ["CUDA_DEVICE_ORDER"] = "of its own"
class AwqMarlinLinear:
    def validate_device(device): pass
    def validate(**asked): return False, f"no {asked['out_features']} rows"
"""


@pytest.fixture
def loud_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gptqmodel" / "nn_modules" / "qlinear"
    folder.mkdir(parents=True)
    for package in (folder, *folder.parents[:2]):
        (package / "__init__.py").touch()
    (folder / "marlin_awq.py").write_text(LOUD)
    for name in [name for name in sys.modules if name.partition(".")[0] == "gptqmodel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


def unsupported_reason(device: str) -> str | None:
    weight = round_to_nearest(torch.randn(48, 64), 32)
    return KERNELS["gptqmodel-marlin"].unsupported_reason(weight, torch.device(device), torch.float16)


@pytest.mark.usefixtures("loud_package")
def test_its_words_and_its_environment_stay_inside(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    assert unsupported_reason("cuda") == "gptqmodel says: no 48 rows"
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


@pytest.mark.usefixtures("loud_package")
def test_without_a_gpu_it_is_not_even_imported() -> None:
    assert unsupported_reason("cpu") == "needs a CUDA GPU"
    assert "gptqmodel.nn_modules" not in sys.modules
