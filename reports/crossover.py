"""The crossover as tables: where two ways to run a layer cross over, and how long each takes."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.records.crossover import (
    CROSSOVER_NAME,
    DECODE_BATCHES,
    PROMPT_TOKENS,
    SAME_WITHIN,
    Crossing,
    CrossoverEntry,
    crossings,
    series_by_contender,
)
from reports.table import Block, Bullets, Cell, Column, Page, Paragraph, Table

NEVER = "never"
NEITHER = "neither clearly"


def crossover_file(source: Path) -> Path | None:
    """The crossover's record that belongs to what `report` is given, a folder or a file; None without one."""
    path = source / CROSSOVER_NAME if source.is_dir() else source
    return path if path.name == CROSSOVER_NAME and path.is_file() else None


def crossover_page(entries: Sequence[CrossoverEntry]) -> Page:
    """Everything a report says about a crossover; entries: one measurement's, as `read_crossover` gives them."""
    first = entries[0]
    blocks: list[Block] = []
    pairs = crossover_table(entries)
    if pairs.rows:
        title = "Tokens at once (batch in decode, prompt in prefill) at which two ways to run a layer cross over"
        blocks += [Paragraph(f"{title}, {setting_text(first)}:"), pairs]
    times = seconds_table(entries)
    if times.rows:
        blocks += [Paragraph("Milliseconds of the linear layers of one decoder layer, by tokens at once:"), times]
    reasons = reasons_of(entries)
    if reasons:
        blocks.append(Bullets(reasons))
    blocks.append(Paragraph(_method(entries)))
    return tuple(blocks)


def setting_text(entry: CrossoverEntry) -> str:
    """mistral-7b's shape, float16 on NVIDIA H100 80GB HBM3"""
    where = entry.environment.gpu if entry.device == "cuda" else entry.environment.cpu
    return f"{entry.shape}'s shape, {entry.compute_dtype} on {where or entry.device}"


def crossover_table(entries: Sequence[CrossoverEntry]) -> Table:
    """One row a crossing, and for every pair with the dense product that has none a row that says so."""
    dense = {entry.contender for entry in entries if entry.style == "dense"}
    columns = (
        Column("Pair"),
        Column("Cross over at", "count"),
        Column("Faster with fewer tokens"),
        Column("Faster with more"),
    )
    shown = [one for one in crossings(entries) if one.tokens is not None or dense & set(one.pair)]
    return Table(columns, tuple(_crossing_row(crossing) for crossing in shown))


def _crossing_row(crossing: Crossing) -> tuple[Cell, ...]:
    at = tokens_text(crossing.tokens) if crossing.tokens is not None else NEVER if crossing.faster_below else None
    return " / ".join(crossing.pair), at, crossing.faster_below or NEITHER, crossing.faster_above or NEITHER


def tokens_text(tokens: float) -> str:
    """Where two ways cross over: 2.8, from 10 on 91, 1,318."""
    return f"{tokens:.1f}" if tokens < 10 else f"{tokens:,.0f}"


def seconds_table(entries: Sequence[CrossoverEntry]) -> Table:
    """One row a contender, one column a number of tokens: the median of its turns; `error` where it was wrong."""
    counts = sorted({entry.tokens for entry in entries if entry.tokens is not None})
    ran = {(entry.contender, entry.tokens): entry for entry in entries if entry.tokens is not None}
    names = {entry.contender: entry.style for entry in entries if entry.tokens is not None}
    columns = (Column("Kernel"), Column("Style"), *(Column(f"{count:,}", "milliseconds") for count in counts))
    rows = [
        (name, style, *(_seconds_cell(ran.get((name, count))) for count in counts)) for name, style in names.items()
    ]
    return Table(columns, tuple(rows))


def _seconds_cell(entry: CrossoverEntry | None) -> Cell:
    if entry is None or entry.median_s is not None:
        return entry.median_s if entry else None
    return "error" if entry.kernel else None


def reasons_of(entries: Iterable[CrossoverEntry]) -> tuple[str, ...]:
    """Who was not timed and why, contenders with the same reason at the same numbers of tokens in one line."""
    counts: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        if entry.reason is not None:
            counts.setdefault((entry.contender, entry.reason), []).append(entry.tokens or 0)
    names: dict[tuple[str, str], list[str]] = {}
    for (name, reason), tokens in counts.items():
        names.setdefault((reason, _at(tokens)), []).append(name)
    return tuple(f"{', '.join(found)}{at}: {reason}." for (reason, at), found in names.items())


def _at(tokens: Sequence[int]) -> str:
    """`` at 1, 2 and 4 tokens``; nothing for a contender that cannot run at all."""
    *first, last = (f"{count:,}" for count in tokens)
    if last == "0":
        return ""
    listed = f"{', '.join(first)} and {last}" if first else last
    return f" at {listed} token{'' if listed == '1' else 's'}"


def _method(entries: Sequence[CrossoverEntry]) -> str:
    """How it was measured, in a paragraph."""
    first, timed = entries[0], [entry for entry in entries if entry.seconds]
    linears = ", ".join(f"{name.rpartition('.')[2]} {out:,} x {inner:,}" for name, out, inner in first.linears)
    said = [
        f"One pass goes through the linear layers of one decoder layer ({linears}) with random weights, those in AWQ's "
        f"format in groups of {first.group_size}; attention, norms and activation functions are left out.",
        f"Batches in decode are {DECODE_BATCHES[0]} to {DECODE_BATCHES[-1]}, prompts {PROMPT_TOKENS[0]:,} to "
        f"{PROMPT_TOKENS[-1]:,} tokens.",
    ]
    if timed:
        turns = sorted({len(entry.seconds) for entry in timed})
        told = f"{turns[0]}" if len(turns) == 1 else f"{turns[0]} to {turns[-1]}"
        plural = "" if turns[-1] == 1 else "s"
        said.append(f"Figures are medians of {told} turn{plural}, whose order is reversed from one to the next.")
    said.append(
        "Before it was timed, each kernel's output was compared with the product with its dequantized weights in "
        f"float32. Medians within {SAME_WITHIN:.0%} count as a tie; between measured numbers of tokens the ratio is "
        "taken to be straight in log-log."
    )
    if first.device == "cuda":
        eager = sorted({entry.contender for entry in timed if entry.mode == "eager"})
        but = f", except {', '.join(eager)}, whose kernels the host asks for one by one" if eager else ""
        said.append(f"Each pass is the replay of a CUDA graph{but}.")
        said.append("Copies of the layer take turns where one would stay in the GPU's cache.")
    else:
        said.append("On a CPU a small layer may stay in its cache.")
    return " ".join(said)


def counts_by_contender(entries: Iterable[CrossoverEntry]) -> dict[str, dict[int, float]]:
    """Contender -> tokens -> median seconds, where there are seconds."""
    return {
        name: {tokens: entry.median_s for tokens, entry in found.items() if entry.median_s is not None}
        for name, found in series_by_contender(entries).items()
    }
