"""The search on Gram matrices against what it stands for: errors over tokens, and autoawq's own search."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quantize.int4.weight import LEVELS, minmax_range, round_to_nearest, rounded
from quantize.quiet import quiet_libraries
from quantize.rounding.awq_search import (
    SCALE_GRID,
    Reader,
    ScaleChoice,
    grid_scales,
    relative_magnitude,
    search_clip,
    search_scale,
    some_rows,
)
from quantize.rounding.correction import Watched, round_rows
from quantize.rounding.gptq import Grid, Target, damped_factor, gptq_round, round_with_feedback, sweep
from quantize.rounding.gram import SHRINKAGE, InputStats, StatsAccumulator, column_blocks, row_errors
from quantize.rounding.options import AwqOptions

with quiet_libraries():
    from awq.quantize.quantizer import AwqQuantizer

GROUP = 32


@pytest.fixture(params=[96, 576])
def inputs(request: pytest.FixtureRequest) -> Tensor:
    """Tokens with a few loud features, as language models have them."""
    generator = torch.Generator().manual_seed(3)
    features: int = request.param
    loud = torch.exp(torch.randn(features, generator=generator) * 1.2)
    mixed = torch.randn((700, features), generator=generator) @ torch.randn((features, features), generator=generator)
    loudest: Tensor = (mixed / features**0.5) * loud
    return loudest


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32, whatever this CPU is good at."""
    monkeypatch.setattr("quantize.rounding.gram.multiplies_bfloat16", lambda device: False)


def stats_of(inputs: Tensor) -> InputStats:
    accumulator = StatsAccumulator(inputs.shape[-1], torch.device("cpu"))
    for batch in torch.split(inputs, 256):
        accumulator.add(batch.unsqueeze(0))
    return accumulator.finish()


def weight_for(inputs: Tensor, out_features: int = 64) -> Tensor:
    return torch.randn((out_features, inputs.shape[1]), generator=torch.Generator().manual_seed(4)) * 0.05


def token_error(inputs: Tensor, difference: Tensor) -> float:
    return float((inputs.double() @ difference.double().t()).pow(2).sum() / inputs.shape[0])


def searched(weight: Tensor, stats: InputStats) -> ScaleChoice:
    channels = torch.arange(weight.shape[1])
    return search_scale([Reader(weight, stats, channels)], GROUP, channels >= 0)


def autoawq() -> AwqQuantizer:
    """autoawq's quantizer with the fields that its search reads, and no model."""
    quantizer = AwqQuantizer.__new__(AwqQuantizer)
    quantizer.group_size, quantizer.zero_point, quantizer.w_bit = GROUP, True, 4
    quantizer.duo_scaling, quantizer.n_parallel_calib_samples, quantizer.max_chunk_memory = (True, None, 1 << 30)
    return quantizer


@pytest.mark.usefixtures("single")
def test_gram_and_magnitudes_are_those_of_all_tokens(inputs: Tensor) -> None:
    stats = stats_of(inputs)
    torch.testing.assert_close(stats.gram, inputs.t() @ inputs / inputs.shape[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.abs_mean, inputs.abs().mean(dim=0))


@pytest.mark.usefixtures("single")
def test_the_error_on_grams_is_the_error_over_tokens(inputs: Tensor) -> None:
    difference = torch.randn(40, inputs.shape[1]) * 0.01
    assert float(row_errors(difference, stats_of(inputs).gram).sum()) == pytest.approx(
        token_error(inputs, difference), rel=1e-4
    )


def test_blocks_cover_every_column_once() -> None:
    for features in (8, 576, 1000, 14336):
        columns = [c for own in column_blocks(features) for c in range(own.start, own.stop)]
        assert columns == list(range(features))


@pytest.mark.usefixtures("single")
def test_scaled_statistics_are_those_of_scaled_inputs(inputs: Tensor) -> None:
    scales = torch.rand(inputs.shape[1]) + 0.5
    torch.testing.assert_close(
        stats_of(inputs).scaled(scales).gram, stats_of(inputs / scales).gram, rtol=1e-3, atol=1e-4
    )


def test_the_scales_are_those_that_autoawq_finds(inputs: Tensor) -> None:
    weight, stats = weight_for(inputs), stats_of(inputs)
    linear = nn.Linear(inputs.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    # On a CPU autoawq's search writes into the state dict it saved; a copy keeps the weights whole.
    linear.state_dict = lambda: {"weight": weight.clone()}  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        _, _, theirs = autoawq()._search_best_scale(nn.Sequential(linear), prev_op=linear, layers=[linear], inp=inputs)
    ours = searched(weight, stats)
    assert ours.exponent is not None
    torch.testing.assert_close(ours.scales, theirs, rtol=1e-3, atol=1e-3)
    assert ours.loss < token_error(inputs, round_to_nearest(weight, GROUP).dequantize() - weight)


@pytest.mark.parametrize("share", [1, 4])
def test_the_loss_of_the_chosen_scales_is_the_smallest_of_the_grid(
    inputs: Tensor, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, stats = weight_for(inputs), stats_of(inputs)
    monkeypatch.setattr("quantize.rounding.awq_search.SOME_WEIGHTS", weight.numel() // share)
    monkeypatch.setattr("quantize.rounding.awq_search.MOST_WEIGHTS", weight.numel())
    losses = {}
    for step in range(SCALE_GRID):
        scales = grid_scales(stats.abs_mean, relative_magnitude(weight, GROUP), step)
        grouped = (weight * scales).view(weight.shape[0], -1, GROUP)
        scaled = rounded(grouped, *minmax_range(grouped)).view(weight.shape) / scales
        losses[step / SCALE_GRID] = token_error(inputs, scaled - weight)
    choice = searched(weight, stats)
    assert choice.loss == pytest.approx(min(losses.values()), rel=1e-3)
    assert choice.exponent == min(losses, key=lambda exponent: losses[exponent])


@pytest.mark.parametrize("spoilt", [[0], [3], [19], list(range(20)), list(range(0, 20, 2))])
def test_scales_whose_loss_is_no_number_are_not_chosen(
    inputs: Tensor, spoilt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scales(abs_mean: Tensor, magnitude: Tensor, step: int) -> Tensor:
        return grid_scales(abs_mean, magnitude, step) * (torch.nan if step in spoilt else 1)

    weight, stats = weight_for(inputs), stats_of(inputs)
    plain = token_error(inputs, round_to_nearest(weight, GROUP).dequantize() - weight)
    monkeypatch.setattr("quantize.rounding.awq_search.grid_scales", scales)
    choice = searched(weight, stats)
    assert choice.loss <= plain * 1.001
    assert (choice.exponent is None) == (len(spoilt) == SCALE_GRID)
    assert choice.exponent not in [step / SCALE_GRID for step in spoilt]


def test_clipping_lowers_the_error_as_autoawqs_does(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = weight_for(inputs), stats_of(inputs)
    weight[:, 5] *= 6
    clip = search_clip(weight, stats, GROUP)
    theirs = autoawq()._compute_best_clip(weight, inputs, n_sample_token=inputs.shape[0]).squeeze(-1)
    assert clip.shape == theirs.shape
    assert float((clip == theirs).float().mean()) > 0.8  # ours keeps scales as float16 stores them, and clips codes

    monkeypatch.setattr("quantize.rounding.awq_search.CACHED_WEIGHTS", 3 * GROUP)
    torch.testing.assert_close(search_clip(weight, stats, GROUP), clip)
    monkeypatch.undo()
    monkeypatch.setattr("quantize.rounding.awq_search.MANY_GROUPS", 50)  # where no clip of these is better, it ends
    assert float((search_clip(weight, stats, GROUP) == clip).float().mean()) > 0.99

    def error(clipped: Tensor | None) -> float:
        return token_error(inputs, round_to_nearest(weight, GROUP, clipped).dequantize() - weight)

    assert error(clip) < error(None)
    assert error(clip) < 1.002 * error(theirs)


def test_feedback_beats_rounding_to_nearest(inputs: Tensor) -> None:
    weight, stats = weight_for(inputs), stats_of(inputs)
    quantized = round_with_feedback(weight, Target.of(stats.gram), GROUP)
    nearest = round_to_nearest(weight, GROUP)
    assert torch.equal(quantized.scales, nearest.scales)
    assert int(quantized.codes.max()) <= LEVELS
    ours = token_error(inputs, quantized.dequantize() - weight)
    assert ours < 0.75 * token_error(inputs, nearest.dequantize() - weight)


def test_feedback_without_correlation_is_rounding_to_nearest() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    fed_back = round_with_feedback(weight, Target.of(torch.eye(64)), GROUP)
    assert torch.equal(fed_back.codes, round_to_nearest(weight, GROUP).codes)


@pytest.mark.usefixtures("single")
def test_feedback_in_blocks_is_feedback_column_by_column(inputs: Tensor) -> None:
    weight, gram = weight_for(inputs, 8), stats_of(inputs).gram
    order = gram.diagonal().argsort(descending=True, stable=True)
    damped = gram[order][:, order] + 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    nearest = round_to_nearest(weight, GROUP)
    scales = nearest.scales.float().repeat_interleave(GROUP, dim=1)
    zeros = nearest.zeros.float().repeat_interleave(GROUP, dim=1)
    work, codes = weight[:, order].double(), torch.empty(weight.shape)
    for step, column in enumerate(order.tolist()):  # GPTQ's equations 2 and 3, one column after the other
        code = (work[:, step] / scales[:, column]).round().add(zeros[:, column]).clamp(0, LEVELS)
        codes[:, column] = code
        error = work[:, step] - (code - zeros[:, column]) * scales[:, column]
        work[:, step:] -= torch.outer(error / factor[step, step], factor[step, step:])
    ours = round_with_feedback(weight, Target.of(gram), GROUP).codes.float()
    assert float((ours == codes).float().mean()) > 0.99


def test_the_factor_survives_a_singular_matrix_and_silent_features() -> None:
    tokens = torch.randn(5, 64)
    tokens[:, 7] = 0
    factor = damped_factor(tokens.t() @ tokens / 5)
    assert torch.isfinite(factor).all()
    assert torch.equal(factor, factor.triu())


def test_a_factor_made_block_by_block_is_cholesky_s(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    gram, order = stats_of(inputs).gram, torch.randperm(inputs.shape[-1], generator=torch.Generator().manual_seed(0))
    damped = gram[order][:, order] + 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    for size in (len(gram), 48):
        monkeypatch.setattr("quantize.rounding.gptq.FACTOR_BLOCK", size)
        monkeypatch.setattr("quantize.rounding.gptq.SOLVED_BLOCK", size // 4)
        torch.testing.assert_close(damped_factor(gram, order), torch.linalg.cholesky(damped, upper=True))


def test_the_damping_grows_until_a_matrix_can_be_factorised() -> None:
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    factor = damped_factor(indefinite)
    torch.testing.assert_close(factor.t() @ factor, indefinite + 5 * torch.eye(2))


def test_refitting_the_scales_never_raises_the_error(inputs: Tensor) -> None:
    weight, gram = weight_for(inputs, 32), stats_of(inputs).gram
    for quantized in (round_to_nearest(weight, GROUP), round_with_feedback(weight, Target.of(gram), GROUP)):
        fitted = sweep(quantized, weight, gram, codes_too=False)
        assert torch.equal(fitted.codes, quantized.codes)
        assert torch.equal(fitted.zeros, quantized.zeros)
        before, after = (float(row_errors(one.dequantize() - weight, gram).sum()) for one in (quantized, fitted))
        assert after < 0.999 * before


def test_a_refitted_scale_is_the_least_squares_one() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, GROUP), torch.randn(200, GROUP)
    quantized = round_to_nearest(weight, GROUP)
    fitted = sweep(quantized, weight, x.t() @ x, codes_too=False)
    codes = quantized.codes.double() - quantized.zeros.double()
    for row in range(4):
        against = (x.double() @ codes[row])[:, None]
        best = torch.linalg.lstsq(against, (x.double() @ weight[row].double())[:, None]).solution
        assert float(fitted.scales[row, 0]) == pytest.approx(float(best), rel=1e-3)


def test_shrinking_lessens_what_features_share_and_keeps_their_loudness(inputs: Tensor) -> None:
    stats = stats_of(inputs)
    shrunk = stats.shrunk()
    assert torch.equal(shrunk.diagonal(), stats.gram.diagonal())
    torch.testing.assert_close(shrunk - shrunk.diagonal().diag(), 0.8 * (stats.gram - stats.gram.diagonal().diag()))


def test_feedback_on_a_shrunk_matrix_is_that_on_what_shrinking_gives(inputs: Tensor) -> None:
    stats = stats_of(inputs)
    ours, expected = Target.of(stats.gram, SHRINKAGE), Target.of(stats.shrunk())
    assert torch.equal(ours.order, expected.order)
    torch.testing.assert_close(ours.factor, expected.factor)


def test_of_many_weights_evenly_spread_rows_decide() -> None:
    weight = torch.arange(12.0).view(6, 2)
    assert torch.equal(some_rows(weight), weight)
    assert torch.equal(some_rows(weight, most=4), weight[[0, 3]])
    assert torch.equal(some_rows(weight, of=12, most=4), weight[:1])  # beside as many rows of a peer


def test_products_in_bfloat16_change_little(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    weight = weight_for(inputs)
    for half in (False, True):
        monkeypatch.setattr("quantize.rounding.gram.multiplies_bfloat16", lambda device, half=half: half)
        stats = stats_of(inputs)
        found[half] = (stats, searched(weight, stats))
    (exact, exact_choice), (rounded_stats, rounded_choice) = found[False], found[True]
    loudness = torch.outer(exact.gram.diagonal().sqrt(), exact.gram.diagonal().sqrt())
    assert float(((rounded_stats.gram - exact.gram).abs() / loudness).max()) < 2**-8
    assert rounded_choice.loss == pytest.approx(exact_choice.loss, rel=1e-3)
    assert rounded_choice.exponent == exact_choice.exponent


def test_a_sweep_lessens_the_error_and_a_second_one_less(inputs: Tensor) -> None:
    weight, gram = weight_for(inputs, 32), stats_of(inputs).gram
    first = round_with_feedback(weight, Target.of(gram), GROUP)
    errors = [float(row_errors(first.dequantize() - weight, gram).sum())]
    for _ in range(2):
        first = sweep(first, weight, gram)
        assert int(first.codes.max()) <= LEVELS
        errors.append(float(row_errors(first.dequantize() - weight, gram).sum()))
    assert errors[1] < 0.98 * errors[0]
    assert errors[1] - errors[2] < errors[0] - errors[1]


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_of_several_groups_at_once_are_those_of_one_after_the_other(
    inputs: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = weight_for(inputs, 32), stats_of(inputs).gram
    nearest, pull = round_to_nearest(weight, GROUP), weight_for(inputs, 32).roll(1, 0) * 0.01

    def swept() -> tuple[Tensor, float]:
        found = sweep(nearest, weight, gram.to(dtype), pull)
        difference = found.dequantize() - weight
        return found.codes, float((row_errors(difference, gram) - 2 * (difference * pull).sum(dim=1)).sum())

    codes, error = swept()
    monkeypatch.setattr("quantize.rounding.gptq.COLUMN_BLOCK", GROUP)
    codes_alone, error_alone = swept()
    assert error == pytest.approx(error_alone, rel=0.01)
    assert float((codes == codes_alone).float().mean()) > (0.999 if dtype == torch.float32 else 0.9)


@pytest.mark.usefixtures("single")
def test_descent_in_blocks_is_descent_code_by_code(inputs: Tensor) -> None:
    weight, gram = weight_for(inputs, 8), stats_of(inputs).gram.double()
    nearest = round_to_nearest(weight, GROUP)
    scales = nearest.scales.double().repeat_interleave(GROUP, dim=1)
    zeros = nearest.zeros.double().repeat_interleave(GROUP, dim=1)
    codes, swept = nearest.codes.double(), sweep(nearest, weight, gram.float())
    for column in range(GROUP):  # the first group, whose scales move after it only
        slope = ((codes - zeros) * scales - weight.double()) @ gram[:, column]
        moved = codes[:, column] - slope / (gram[column, column] * scales[:, column])
        codes[:, column] = moved.round().clamp(0, LEVELS)
    assert float((swept.codes[:, :GROUP] == codes[:, :GROUP]).float().mean()) > 0.99


@pytest.mark.usefixtures("single")
def test_what_pulls_is_rounded_towards(inputs: Tensor) -> None:
    """With B = D H, rounding W towards it is rounding W + D: the target's linear term is what a shift gives."""
    weight, gram = weight_for(inputs, 16), stats_of(inputs).gram
    shift = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    target = Target.of(gram)
    damped = target.factor.t() @ target.factor
    order = target.order.argsort()
    pull = shift @ damped[order][:, order]
    fixed = round_to_nearest(weight, GROUP)
    grid = Grid(GROUP, fixed.scales.float().t().contiguous(), -fixed.zeros.float().t().contiguous())
    pulled = gptq_round(weight, target, grid, pull)
    shifted = gptq_round(weight + shift, target, grid)
    assert float((pulled == shifted).float().mean()) > 0.98
    assert not torch.equal(pulled, gptq_round(weight, target, grid))


def test_a_correction_is_kept_where_watched_text_gains_by_it_and_only_there(
    inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantized model's inputs are a fifth smaller than the source's, or on watched text just the same."""
    weight, found = weight_for(inputs, 64), 0.8 * inputs
    accumulator = StatsAccumulator(inputs.shape[-1], torch.device("cpu"))
    accumulator.add(found, inputs)
    stats, options = accumulator.finish(), AwqOptions(GROUP, rounding="gptq")
    plain = round_rows(weight, replace(stats, cross=None), options)
    helpful, useless = Watched(inputs, found), Watched(found, found)
    corrected = round_rows(weight, stats, options, watched=helpful)
    assert helpful.error(weight, corrected.dequantize()) < 0.9 * helpful.error(weight, plain.dequantize())
    assert torch.equal(round_rows(weight, stats, options, watched=useless).codes, plain.codes)
    assert stats.cross is not None
    of_rows = replace(stats, cross=weight[:16] @ stats.cross)  # of few rows it is B itself that was summed up
    own = round_rows(weight[:16], stats, options, watched=helpful)
    assert torch.equal(round_rows(weight[:16], of_rows, options, watched=helpful).codes, own.codes)
    monkeypatch.setattr("quantize.rounding.correction.ROW_BLOCK", 24)  # several blocks
    torch.testing.assert_close(round_rows(weight, stats, options, watched=helpful).codes, corrected.codes)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gram_matrix_that_is_not_finite_has_no_factor_and_that_is_said(value: float) -> None:
    with pytest.raises(ArithmeticError, match="the Gram matrix is not finite"):
        damped_factor(torch.eye(4) * value)
