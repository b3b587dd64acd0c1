"""Every architecture on a small random model: what is tried, what is recorded, what is said of what fails."""

from pathlib import Path

import pytest
import torch

from quantize.quiet import quiet_libraries
from tests.architectures.tiny_models import NOT_BUILT, OTHERS, WRAPPERS, architectures, tiny_model
from tests.architectures.trial import main
from tests.lab.pages import lab_page
from tests.lab.records import ArchitectureRecord, read_lab


def test_enough_are_tried_and_no_name_stands_in_two_lists() -> None:
    names = [*architectures(), *WRAPPERS]
    assert len(names) == len(set(names))
    assert len([name for name in names if name not in NOT_BUILT]) >= 200
    assert not OTHERS & set(names)
    assert NOT_BUILT.keys() <= set(names)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "falcon_h1", "gemma4_text", "llava"])
def test_a_small_model_is_of_its_own_class_and_gives_numbers(name: str) -> None:
    with quiet_libraries():
        model, again = tiny_model(name), tiny_model(name)
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(16).view(1, 16) + 3, use_cache=False).logits
    assert model.config.model_type == name
    assert logits.shape == (1, 16, 512)
    assert bool(torch.isfinite(logits).all())
    assert sum(one.numel() for one in model.parameters()) < 10**7
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_one_architecture_is_quantized_loaded_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "architectures.jsonl"
    command = ["olmoe", "gemma3n", "--variants", "awq-gemm", "bnb-8bit", "--out", str(out)]
    assert main(command) == 0
    good, bad = read_lab(out, ArchitectureRecord)
    awq, bnb = good.variants["awq-gemm"], good.variants["bnb-8bit"]
    assert good.model_class == "OlmoeForCausalLM"
    assert good.moved_error is not None
    assert good.moved_error < 1e-5
    assert good.reached == 1.0
    assert awq.error is not None
    assert awq.kernel_error is not None
    assert awq.kernel_error < awq.error < 0.6
    assert "can be quantized so" in str(bnb.reason)
    assert bad.reason == NOT_BUILT["gemma3n"]
    text = lab_page(out)
    assert "| olmoe " in text
    assert "mlp.experts.\\*.up_proj -> mlp.experts.\\*.down_proj" in text


def test_a_model_whose_tensors_would_not_be_found_again_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """transformers would read experts of both kinds of this one back as of one kind."""
    out = tmp_path / "architectures.jsonl"
    assert main(["ernie4_5_vl_moe", "--variants", "awq-gemm", "--out", str(out)]) == 0
    [found] = read_lab(out, ArchitectureRecord)
    assert "would not be found again in a checkpoint of its own" in str(found.variants["awq-gemm"].reason)
