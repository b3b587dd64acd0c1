"""Runs carried out by another engine, in its own interpreter. Imports no torch before it must."""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.records.record import Divergence, Kernels, Latency, Memory, Quality, Record
from bench.run.executor import append_log, run_process, worker_environment
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, Request, Settings
from bench.worker.worker import without_folder
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

ENGINES = ("transformers", "gptqmodel", "vllm")  # each a module of bench.engines
EXTRA_POSITIONS = 16  # beyond what a scenario needs: engines reserve some


def engine_of(option: str) -> tuple[str, str]:
    """Name and interpreter of what `--engine NAME=PYTHON` says; of NAME alone this interpreter.

    Raises UserError for an unknown name and an interpreter that is not there.
    """
    name, _, python = option.partition("=")
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}; there are: {', '.join(ENGINES)}")
    if python and not Path(python).is_file():
        raise UserError(f"{python} is no interpreter: give --engine {name}=PATH/bin/python")
    return name, python or sys.executable


def check_engine(options: BenchOptions) -> None:
    """Raise UserError for what no engine is asked for here: it would be measured as something else."""
    if options.device == "cuda":
        raise UserError("another engine runs on the CPU here: leave --device cuda out")
    if options.kernel is not None or options.tasks:
        raise UserError("another engine has kernels of its own and runs no lm-eval: leave --kernel and --tasks out")
    for scenario in options.scenarios or ():
        if scenario.batch != 1 or scenario.mode != "eager":
            raise UserError(f"another engine runs one prompt at a time, eagerly: leave {scenario.name} out")


@dataclass(frozen=True)
class EngineExecutor:
    """Runs `PYTHON -m bench.engines.NAME` for every run, on the same prompts and text as our own workers get.

    settings, log: as WorkerExecutor has them.
    """

    settings: Settings
    log: Path | None = None

    @cached_property
    def engine(self) -> tuple[str, str]:
        return engine_of(self.settings.options.engine or "")

    def __call__(self, run: PlannedRun) -> list[Record]:
        asked = Request(self.settings, run)
        started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        name, python = self.engine
        with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
            request, result = Path(folder) / "request.json", Path(folder) / "result.jsonl"
            with quiet_libraries():
                request.write_text(json.dumps(self._request(asked)), encoding="utf-8")
            command, options = [python, "-m", f"bench.engines.{name}", str(request), str(result)], self.settings.options
            environment = worker_environment(options.threads)
            ended = run_process(command, timeout_s=options.timeout_s, environment=environment)
            lines = result.read_text(encoding="utf-8").splitlines() if result.is_file() else []
        wall_s = time.perf_counter() - start
        records = [self._record(asked, json.loads(line), started_at) for line in lines]
        measured = {(record.kind, record.scenario) for record in records}
        status, said = ended.verdict()
        reason = f"{name}: {without_folder(said, run.target.checkpoint)}"
        for work in (one for one in run.works if one not in measured):
            records.append(asked.record(status, work, started_at=started_at, wall_s=wall_s, reason=reason))
        if self.log is not None and any(record.status != "ok" for record in records):
            append_log(self.log, f"{run.subject.name}, {started_at}", ended)
        return records

    def _request(self, asked: Request) -> dict[str, Any]:
        """What the engine's process reads: token ids alone, since its tokenizer may be another."""
        import torch

        from bench.worker.latency import prompts_of
        from bench.worker.quality import evaluation_blocks
        from quantize.calibration import blocks_sha256
        from quantize.model.pretrained import config_of, tokenizer_of

        run, judged = asked.run, self.settings.quality
        folder = Path(run.target.checkpoint or "")
        words = config_of(folder).get_text_config().vocab_size
        scenarios = []
        for number, one in enumerate(run.scenarios):
            prompts = [prompt[0].tolist() for prompt in prompts_of(one, words, torch.device("cpu"))]
            scenarios.append({"number": number, "decode_steps": one.decode_steps, "prompts": prompts})
        size = {"blocks": judged.blocks, "block_tokens": judged.block_tokens}
        text = evaluation_blocks(tokenizer_of(folder), **size, data=judged.data) if run.quality else None
        positions = max([one.positions for one in run.scenarios] + [judged.block_tokens]) + EXTRA_POSITIONS
        rule = {name: getattr(self.settings.options.rule, name) for name in ("min_passes", "max_time_s")}
        blocks, digest = ([], "") if text is None else (text.tolist(), blocks_sha256(text))
        where = {"folder": str(folder), "dtype": asked.compute_dtype, "positions": positions}
        kept = {"expected": asked.reference_logprobs, "keep": run.is_reference}
        return {**where, **kept, "scenarios": scenarios, "blocks": blocks, "text_sha256": digest, "rule": rule}

    def _record(self, asked: Request, line: dict[str, Any], started_at: str) -> Record:
        name, subject = f"{self.engine[0]} {line['version']} ({line['computes']})", asked.run.subject
        held = [line[f"{one}_bytes"] for one in ("baseline", "load_peak", "run_peak")]
        memory = Memory(subject.file_weights_bytes or 0, "RSS", *held)
        how = {"started_at": started_at, "wall_s": line["wall_s"], "kernels": Kernels(name, name), "memory": memory}
        if line["scenario"] is None:
            divergence = line.get("divergence")
            facts = (line["perplexity"], line["tokens"], self.settings.quality.label, line["text_sha256"])
            found = Quality(*facts, Divergence(**divergence) if divergence else None, vocabulary=line["vocabulary"])
            return asked.record("ok", ("quality", None), quality=found, **how)
        scenario = asked.run.scenarios[line["scenario"]]
        by_length = tuple(map(tuple, line["prefill_s"])) if scenario.lengths else ()
        prefill_s, decode_s = tuple(map(sum, line["prefill_s"])), tuple(map(tuple, line["decode_s"]))
        timed = Latency(prefill_s, decode_s, tuple(line["warmup_s"]), None, "time", by_length, "eager")
        return asked.record("ok", ("latency", scenario), latency=timed, **how)
