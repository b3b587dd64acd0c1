"""A checkpoint that the experiments run on."""

from pathlib import Path

import pytest

from tests.bench.conftest import make_checkpoint as make_checkpoint


@pytest.fixture(scope="session")
def tiny_reference(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The half-precision checkpoint of the tiny Llama."""
    from quantize import quantize

    (checkpoint,) = quantize(str(tiny_llama), ["fp16"], tmp_path_factory.mktemp("reference"))
    return checkpoint.checkpoint.path
