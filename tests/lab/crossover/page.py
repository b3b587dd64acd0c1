"""The crossover as tables: where two ways to run a layer cross over, and how long each takes."""

from collections.abc import Iterable, Sequence

from bench.records.comparison import grouped
from quantize.errors import UserError
from reports.notes import plural
from reports.table import Column, Page, Paragraph, Table, bulleted, titled
from tests.lab.crossover.crossings import DECODE_BATCHES, PROMPT_TOKENS, SAME_WITHIN, crossings
from tests.lab.records import CrossoverEntry


def crossover_page(entries: Sequence[CrossoverEntry]) -> Page:
    """Everything that is said about a crossover; entries: one measurement's. Raises UserError for those of two."""
    settings = {(one.shape, one.linears, one.group_size, one.device, one.compute_dtype) for one in entries}
    if len(settings) > 1:
        raise UserError(f"these are measurements of {len(settings)} settings: keep each in a file of its own")
    title = "Tokens at once (batch in decode, prompt in prefill) at which two ways to run a layer cross over"
    yield from titled(f"{title}, {setting_text(entries[0])}:", crossover_table(entries))
    times = "Milliseconds of the linear layers of one decoder layer, by tokens at once:"
    yield from titled(times, seconds_table(entries))
    yield from bulleted(reasons_of(entries))
    yield Paragraph(_method(entries))


def setting_text(entry: CrossoverEntry) -> str:
    """mistral-7b's shape, float16 on NVIDIA H100 80GB HBM3"""
    where = entry.environment.gpu if entry.device == "cuda" else entry.environment.cpu
    return f"{entry.shape}'s shape, {entry.compute_dtype} on {where or entry.device}"


def crossover_table(entries: Sequence[CrossoverEntry]) -> Table:
    """One row a crossing, and for every pair with the dense product that has none a row that says so."""
    dense = {entry.contender for entry in entries if entry.style == "dense"}
    return Table.of(
        [
            (Column("Pair"), " / ".join(one.pair)),
            (Column("Cross over at", "count"), tokens_text(one.tokens) if one.tokens else one.faster_below and "never"),
            (Column("Faster with fewer tokens"), one.faster_below or "neither clearly"),
            (Column("Faster with more"), one.faster_above or "neither clearly"),
        ]
        for one in crossings(entries)
        if one.tokens is not None or dense & set(one.pair)
    )


def tokens_text(tokens: float) -> str:
    """Where two ways cross over: 2.8, from 10 on 91, 1,318."""
    return f"{tokens:.1f}" if tokens < 10 else f"{tokens:,.0f}"


def seconds_table(entries: Sequence[CrossoverEntry]) -> Table:
    """One row a contender, one column a number of tokens: the median of its turns; `error` where it was wrong."""
    ran = [entry for entry in entries if entry.tokens is not None]
    tried = [entry for entry in ran if entry.seconds or entry.kernel]
    cells = {(entry.contender, entry.tokens): entry.median_s if entry.seconds else "error" for entry in tried}
    counts = sorted({entry.tokens or 0 for entry in ran})
    return Table.of(
        [
            (Column("Kernel"), name),
            (Column("Style"), style),
            *((Column(f"{count:,}", "milliseconds"), cells.get((name, count))) for count in counts),
        ]
        for name, style in {entry.contender: entry.style for entry in ran}.items()
    )


def reasons_of(entries: Iterable[CrossoverEntry]) -> tuple[str, ...]:
    """Who was not timed and why, contenders with the same reason at the same numbers of tokens in one line."""
    untimed = grouped((one for one in entries if one.reason is not None), lambda one: (one.contender, one.reason))
    alike = grouped(untimed, lambda who: (who[1], _at([one.tokens or 0 for one in untimed[who]])))
    return tuple(f"{', '.join(name for name, _ in who)}{at}: {reason}." for (reason, at), who in alike.items())


def _at(tokens: Sequence[int]) -> str:
    """`` at 1, 2 and 4 tokens``; nothing for a contender that cannot run at all."""
    *first, last = (f"{count:,}" for count in tokens)
    if last == "0":
        return ""
    listed = f"{', '.join(first)} and {last}" if first else last
    return f" at {listed} token{'' if listed == '1' else 's'}"


def _method(entries: Sequence[CrossoverEntry]) -> str:
    first, timed = entries[0], [entry for entry in entries if entry.seconds]
    linears = ", ".join(f"{name.rpartition('.')[2]} {out:,} x {inner:,}" for name, out, inner in first.linears)
    turns = sorted({len(entry.seconds) for entry in timed}) or [0]
    told = f"{turns[0]} to {turns[-1]} turns" if turns[1:] else plural(turns[0], "turn")
    figures = f"Figures are medians of {told}, whose order is reversed from one to the next. " if timed else ""
    eager = ", ".join(sorted({entry.contender for entry in timed if entry.mode == "eager"}))
    but = f", except {eager}, whose kernels the host asks for one by one" if eager else ""
    return (
        f"One pass goes through the linear layers of one decoder layer ({linears}) with random weights, those in AWQ's "
        f"format in groups of {first.group_size}; attention, norms and activation functions are left out. "
        f"Batches in decode are {DECODE_BATCHES[0]} to {DECODE_BATCHES[-1]}, prompts {PROMPT_TOKENS[0]:,} to "
        f"{PROMPT_TOKENS[-1]:,} tokens. {figures}"
        "Before it was timed, each kernel's output was compared with the product with its dequantized weights in "
        f"float32. Medians within {SAME_WITHIN:.0%} count as a tie; between measured numbers of tokens the ratio is "
        "taken to be straight in log-log. "
    ) + (
        f"Each pass is the replay of a CUDA graph{but}. Copies of the layer take turns where one would stay in the "
        "GPU's cache."
        if first.device == "cuda"
        else "On a CPU a small layer may stay in its cache."
    )
