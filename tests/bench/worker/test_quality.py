import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.worker.quality import (
    LOGIT_ROWS,
    evaluation_blocks,
    logprobs_reader,
    predictions,
    quality,
    reference_quality,
    write_logprobs,
)
from quantize.calibration import PARAGRAPH, blocks_sha256, builtin_texts
from quantize.errors import UserError

VOCABULARY = 512


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 2 * LOGIT_ROWS + 5), generator=torch.Generator().manual_seed(0))


class Fixed:
    """A model that gives the same logits at every position."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model: Any, blocks: torch.Tensor) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    found = quality(model, blocks)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert found.tokens == 3 * (2 * LOGIT_ROWS + 4)
    assert found.text_sha256 == blocks_sha256(blocks)


def test_it_is_the_exponential_of_the_mean_loss(model: Any, blocks: torch.Tensor) -> None:
    with torch.no_grad():
        losses = [float(model(input_ids=block[None], labels=block[None]).loss) for block in blocks]
    expected = math.exp(sum(losses) / len(losses))
    assert quality(model, blocks).perplexity == pytest.approx(expected, rel=1e-5)


def test_known_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    found = quality(Fixed(logits), torch.tensor([[2, 0, 0, 1, 1]]))
    assert found.perplexity == pytest.approx((0.5 * 0.5 * 0.25 * 0.25) ** (-1 / 4))
    assert found.tokens == 4


def test_every_position_with_a_next_token_comes_once_and_in_order(model: Any, blocks: torch.Tensor) -> None:
    pieces = list(predictions(model, blocks))
    assert [len(following) for _, following in pieces] == [LOGIT_ROWS, LOGIT_ROWS, 4] * 3
    assert torch.equal(torch.cat([following for _, following in pieces]), blocks[:, 1:].reshape(-1))
    with torch.no_grad():
        logits = torch.cat([model(input_ids=block[None]).logits[0, :-1] for block in blocks])
    torch.testing.assert_close(torch.cat([own for own, _ in pieces]), torch.log_softmax(logits, dim=-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_is_called_broken(bad: float) -> None:
    with pytest.raises(FloatingPointError, match=r"not finite \(NaN or infinity\) near token"):
        quality(Fixed(torch.tensor([bad, 0.0])), torch.tensor([[0, 0, 0]]))


def test_a_loss_beyond_all_numbers_is_called_broken() -> None:
    with pytest.raises(FloatingPointError, match="too large for a number"):
        quality(Fixed(torch.tensor([-1e5, 0.0])), torch.tensor([[0, 0, 0]]))


def test_half_precision_logits_are_judged_in_float32(blocks: torch.Tensor) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    half, single = quality(Fixed(logits), blocks).perplexity, quality(Fixed(logits.float()), blocks).perplexity
    assert half == single


def test_the_text_is_the_held_out_one(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    blocks = evaluation_blocks(tokenizer, blocks=12, block_tokens=512)
    assert blocks.shape == (12, 512)
    assert tokenizer.decode(blocks[0])[:200] in PARAGRAPH.join(builtin_texts("evaluation"))
    assert tokenizer.decode(blocks[0])[:200] not in PARAGRAPH.join(builtin_texts("calibration"))


def test_known_divergences(tmp_path: Path) -> None:
    """Two tokens of three words: KL(p || q) by hand, half of the text at 0."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    kept = tmp_path / "reference.npy"
    write_logprobs(kept, iter([p.log().expand(4, -1)]), 4)
    blocks = torch.tensor([[2, 0, 0, 1, 1]])
    same = quality(Fixed(p.log()), blocks, expected=kept).divergence
    other = quality(Fixed(q.log()), blocks, expected=kept).divergence
    assert same is not None
    assert other is not None
    assert same.mean == pytest.approx(0, abs=1e-6)
    assert same.flips == 0
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert [other.mean, other.median, other.p99] == pytest.approx([expected] * 3, rel=1e-3)
    assert other.flips == 1


def test_divergence_percentiles_and_the_share_of_flips(tmp_path: Path) -> None:
    class OnceWrong(Fixed):
        """Right everywhere but at one of 100 positions."""

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            logits = self.logits.expand(*input_ids.shape, -1).clone()
            logits[0, 7] = self.logits.flip(0)
            return SimpleNamespace(logits=logits)

    right = torch.log(torch.tensor([0.9, 0.1]))
    kept = tmp_path / "reference.npy"
    blocks = torch.zeros((1, 101), dtype=torch.int64)
    write_logprobs(kept, (logits for logits, _ in predictions(Fixed(right), blocks)), 100)
    found = quality(OnceWrong(right), blocks, expected=kept).divergence
    assert found is not None
    assert found.flips == 0.01
    assert found.median == pytest.approx(0, abs=1e-6)
    assert found.mean == pytest.approx(0.8 * math.log(9) / 100, rel=1e-3)


def test_the_references_noise_floor_is_small_and_not_nothing(model: Any, blocks: torch.Tensor, tmp_path: Path) -> None:
    model = model.to(torch.bfloat16)
    found = reference_quality(model, blocks, tmp_path / "reference.npy")
    assert found.noise_floor is not None
    assert 0 < found.noise_floor.mean < 1e-3
    assert model.config._attn_implementation == "sdpa"
    assert found.perplexity == quality(model, blocks).perplexity


def test_expectations_are_whole_or_not_there(tmp_path: Path) -> None:
    kept = tmp_path / "reference.npy"
    with pytest.raises(ValueError, match="2 rows came, 3 were announced"):
        write_logprobs(kept, iter([torch.zeros(2, 5)]), 3)
    assert list(tmp_path.iterdir()) == []
    write_logprobs(kept, iter([torch.zeros(2, 5)]), 2)
    read = logprobs_reader(kept)
    assert read(2).shape == (2, 5)
    with pytest.raises(UserError, match="holds 2 tokens, more were asked for"):
        read(1)
