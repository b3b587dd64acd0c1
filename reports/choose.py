"""The best variant that fits into a memory, by what was measured, else by an estimate; only that needs torch."""

import argparse
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from bench.records.record import Phase
from bench.records.scenario import Scenario
from bench.records.store import RECORDS_NAME
from quantize.checkpoint import MANIFEST_NAME, find_checkpoints
from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.shell import Parser, command, tell
from quantize.units import parse_bytes, parse_share
from reports.api import Reading
from reports.results import Result
from reports.table import gigabytes_text as gb

NEAR = 0.01  # losses this close count as one


@dataclass(frozen=True)
class Candidate:
    """A variant, and what it takes; unknown is None.

    need_bytes: the peak of a run at the context asked for: weights, keys and values, activations and the rest.
    how:        where that is from, or why it is unknown; problem: why it is not taken.
    loss:       as of a Result; time: over the reference's."""

    name: str
    base_model: str
    w_bit: int
    need_bytes: float | None
    how: str
    loss: float | None = None
    time: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Choice:
    """The variants that fit, the best first, and the others.

    rule: what best means, and where it was measured, or that nothing was; phase: what times are of."""

    memory_bytes: int
    context: int
    rule: str
    phase: Phase
    fit: tuple[Candidate, ...]
    others: tuple[Candidate, ...]

    def lines(self) -> list[str]:
        """One line for each variant, and the rule."""
        at = f"GB of {gb(self.memory_bytes)} GB at {self.context:,} tokens"
        need, name = min(((one.need_bytes, one.name) for one in self.others if one.need_bytes), default=(0, "none"))
        lines = [] if self.fit else [f"nothing to take: the least is needed by {name}, {gb(need)} {at}"]
        for one in self.fit:
            need = one.need_bytes or 0.0
            loss = "unknown" if one.loss is None else f"{one.loss:+.1%}"
            time = "" if one.time is None else f", {self.phase} x{one.time:.2f} of FP16's time"
            needs = f"{one.name}: needs {gb(need)} {at}, {gb(self.memory_bytes - need)} left"
            lines.append(f"{'then' if lines else 'take'} {needs}, perplexity {loss}{time} ({one.how})")
        return [*lines, *(f"not {one.name}: {one.problem}" for one in self.others), self.rule]


def choose(
    source: Path | str, memory_bytes: int, context: int, *,
    max_loss: float | None = None, device: str | None = None, model: str | None = None,
) -> Choice:  # fmt: skip
    """The variants of one base model that fit into so much memory with one prompt of `context` tokens, the best first.

    source: a folder that was measured, or its records; else an estimate is made, of checkpoints or a model.
    device: of the measurement, CUDA where both were. model: the base model, where there are several."""
    path = Path(source)
    measured = path.is_file() or (path / RECORDS_NAME).is_file()
    if context < 1:
        raise UserError(f"no model runs on {context} tokens: choose a --context of 1 or more")
    if not measured and (max_loss is not None or device is not None):
        raise UserError(f"--max-loss and --device need a measurement of {source}: run `bench` first")
    found, phase, basis = _measured(path, context, device) if measured else _estimated(str(source), context)
    models = dict.fromkeys(one.base_model for one in found)
    if len(models) > 1 if model is None else model not in models:
        raise UserError(f"{source} has variants of {', '.join(models)}: choose one of these with --model")
    own = [one for one in found if model in (None, one.base_model)]
    judged = [replace(one, problem=one.problem or _problem(one, memory_bytes, max_loss)) for one in own]
    fit = [one for one in judged if one.problem is None]
    least = min((one.loss for one in fit if one.loss is not None), default=math.nan)
    limit, best = least + NEAR, f"within {NEAR:.0%} perplexity of the least loss the fastest in {phase}"
    if max_loss is not None:
        limit, best = max_loss, f"with at most {max_loss:.3g} more perplexity the fastest in {phase}"
    elif all(one.loss is None for one in own):
        best = "the most bits a weight, as the loss is unknown"

    def place(one: Candidate) -> tuple[bool, float, int]:
        loss = math.inf if one.loss is None else one.loss
        return not loss <= limit, (one.time or math.inf) if loss <= limit else loss, -one.w_bit

    rule, others = f"the rule: of those that fit, {best}; {basis}", tuple(one for one in judged if one.problem)
    return Choice(memory_bytes, context, rule, phase, tuple(sorted(fit, key=place)), others)


def _problem(one: Candidate, memory_bytes: int, max_loss: float | None) -> str | None:
    if one.need_bytes is None:
        return f"what it needs is unknown ({one.how})"
    if one.need_bytes > memory_bytes:
        return f"needs {gb(one.need_bytes)} GB, {gb(one.need_bytes - memory_bytes)} too much ({one.how})"
    loss = "its loss is unknown" if one.loss is None else f"perplexity {one.loss:+.1%}"
    return None if max_loss is None or (one.loss is not None and one.loss <= max_loss) else loss


def _measured(path: Path, context: int, device: str | None) -> tuple[list[Candidate], Phase, str]:
    found = [one for one in Reading(path).measurements if device in (None, one.device)]
    if not found:
        raise UserError(f"{path} holds nothing that was measured on {device}: leave --device out")
    chosen = max(found, key=lambda one: one.on_gpu)
    timed = {phase for result in chosen.results for timing in result.timings.values() for phase in timing.seconds}
    phase: Phase = "decode" if "decode" in timed else "prefill"
    rows = []
    for one in chosen.results:
        subject = one.subject
        near = [timing for timing in one.timings.values() if timing.scenario.batch == 1 and phase in timing.seconds]
        timing = min(near, key=lambda timing: abs(timing.scenario.positions - context), default=None)
        time, need = one.ratio_in(timing, phase) if timing else None, need_at(one, context)
        problem = f"broken: {one.broken}" if one.broken else None
        rows.append(Candidate(subject.name, subject.base_model, subject.w_bit or 16, *need, one.loss, time, problem))
    return rows, phase, f"measured on {', '.join((chosen.device, *chosen.compute_dtypes))}"


def need_at(result: Result, context: int) -> tuple[float | None, str]:
    """The bytes that a run with one prompt of so many tokens needs at its peak, None where that is unknown; and how.

    Measured; between two contexts, and beyond the last, linear, there never flatter than the keys and values alone.
    Beyond a single one the activations grow in proportion, the most they can. Below the first it is the first's."""
    runs = [one for one in result.timings.values() if one.scenario.batch == 1 and one.run_peak_bytes]
    runs.sort(key=lambda one: (one.scenario.positions, one.run_peak_bytes))
    peaks = {one.scenario.positions: float(one.run_peak_bytes or 0) for one in runs}
    if result.placements or not peaks:
        failed = [f"{one.status}: {one.reason}" for one in result.failures]
        return None, "; ".join([*result.placements, *failed]) or "no run of a single prompt has a peak"
    tokens, memory = list(peaks), runs[-1].memory
    if context in peaks or context < tokens[0]:
        return peaks[max(context, tokens[0])], "measured" + f" at {tokens[0]:,} tokens" * (context < tokens[0])
    for below, above in pairwise(tokens):
        slope = (peaks[above] - peaks[below]) / (above - below)
        if context < above:
            return peaks[below] + slope * (context - below), f"between {below:,} and {above:,} tokens, measured"
    if memory is None or memory.kv_cache_formula_bytes is None or memory.activations_bytes is None:
        return None, f"only {tokens[-1]:,} tokens were measured, and the size of the cache is unknown"
    cache = memory.kv_cache_formula_bytes / tokens[-1]
    slope = max(cache, slope) if len(tokens) > 1 else cache + memory.activations_bytes / tokens[-1]
    return peaks[tokens[-1]] + slope * (context - tokens[-1]), f"extrapolated from {tokens[-1]:,} tokens"


def _estimated(source: str, context: int) -> tuple[list[Candidate], Phase, str]:
    """From weights, keys and values, and what one layer works on, in half precision."""
    with quiet_libraries():
        import torch

        from bench.worker.latency import kv_cache_formula_bytes
        from quantize.building.estimate import variants_of
        from quantize.model.pretrained import config_of

        if any(Path(source).glob(f"*/{MANIFEST_NAME}")):
            made = [(one.manifest, one.variant, config_of(one.path)) for one in find_checkpoints(Path(source))]
            sized = [(one.name, one.base_model, variant, one.weights_bytes, c) for one, variant, c in made]
        else:
            sized = variants_of(source)
        found = []
        for name, base_model, variant, weights_bytes, config in sized:
            text = config.get_text_config()
            positions = getattr(text, "max_position_embeddings", None)
            if positions and context > positions:
                raise UserError(f"{base_model} has {positions:,} positions: choose a smaller --context")
            cache = kv_cache_formula_bytes(text, Scenario("context", context, 1), torch.float16)
            hidden, inner = (getattr(text, f"{one}_size", None) or 0 for one in ("hidden", "intermediate"))
            widths = 6 * hidden + 3 * (inner or 4 * hidden)
            need = cache and weights_bytes + cache + 2 * context * widths + 4 * text.vocab_size
            found.append(Candidate(name, base_model, variant.w_bit or 16, need, "estimated"))
    basis = "estimated, nothing was measured, and what Python and its libraries hold comes on top: run `bench`"
    return found, "decode", basis


def parser() -> Parser:
    rule = "of those that fit, the fastest in decoding that loses at most --max-loss, or 1% more than the least"
    about = f"The best variant for a memory: {rule}."
    cli = Parser(prog="quantable choose", description=about, epilog="Exit code 1: nothing to take.")
    add = cli.add_argument
    add("source", metavar="DIR", help="what `bench` measured; or checkpoints, or a model, to estimate")
    add("--memory", dest="memory_bytes", type=parse_bytes, required=True, metavar="SIZE", help="such as 6GB or 6GiB")
    add("--context", type=int, required=True, metavar="N", help="tokens of the prompt and the answer together")
    add("--max-loss", type=parse_share, metavar="SHARE", help="of perplexity, such as 5%%")
    add("--device", choices=("cpu", "cuda"), help="of the measurement (default: cuda where there is one)")
    add("--model", metavar="NAME", help="the base model, where there are several")
    add("--json", action="store_true", help="all of it as JSON")
    return cli


def run(arguments: argparse.Namespace) -> int:
    """Choose; 1 where nothing fits."""
    found = choose(**{name: given for name, given in vars(arguments).items() if name != "json"})
    tell(found, found.lines(), as_json=arguments.json)
    return 0 if found.fit else 1


main = command(parser, run)
