"""Runs carried out by engines, each in its own interpreter. Imports no torch before it must."""

import atexit
import contextlib
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from bench.engines.protocol import EXPECTED_NAME
from bench.records.record import Kernels, Latency, Memory, Record
from bench.run.checks import logprobs_path
from bench.run.executor import Executor, WorkerExecutor
from bench.run.plan import OURS
from bench.worker.options import BenchOptions
from bench.worker.request import QUALITY, PlannedRun, Request, Settings
from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.variant import REFERENCE, known_variants

ENGINES = ("transformers", "gptqmodel", "vllm", "openvino", "llamacpp")  # each a module of bench.engines
EXTRA_POSITIONS = 16  # beyond what a scenario needs: engines reserve some


def engines_named(options: tuple[str, ...]) -> dict[str, str]:
    """Name -> interpreter, as each `--engine NAME=PYTHON` says; of NAME alone this interpreter.

    Raises UserError for an unknown name and an interpreter that is not there."""
    found = {}
    for name, _, python in (option.partition("=") for option in options):
        if name not in (OURS, *ENGINES):
            raise UserError(f"unknown engine {name!r}; there are: {', '.join((OURS, *ENGINES))}")
        if python and not Path(python).is_file():
            raise UserError(f"{python} is no interpreter: give --engine {name}=PATH/bin/python")
        found[name] = str(Path(python).absolute()) if python else sys.executable
    return found


def check_engines(options: BenchOptions) -> None:
    """Raise UserError for what no engine is asked for here: it would be measured as something else."""
    if options.device == "cuda":
        raise UserError("another engine runs on the CPU here: leave --device cuda out")
    if options.kernel is not None or options.tasks:
        raise UserError("another engine has kernels of its own and runs no lm-eval: leave --kernel and --tasks out")
    if options.scenarios and not any(one.is_plain for one in options.scenarios):
        raise UserError("another engine runs one prompt at a time, eagerly: add --mode eager, leave --batch out")


def executor_for(settings: Settings, records: Path) -> Executor:
    """Carries out each run where its subject says, in an engine or by our own worker; its log lies by the records."""
    log = records.with_suffix(".log")
    ours: Executor = WorkerExecutor(settings, log=log)
    pythons = engines_named(settings.options.engines)
    engines = {name: EngineExecutor(settings, (at, "-m", "bench.engines", name), log) for name, at in pythons.items()}
    return lambda run: (engines[run.subject.engine] if run.subject.engine else ours)(run)


@cache
def scratch() -> Path:
    """A folder until this process ends, with links to just those packages that engines import."""
    place = Path(tempfile.mkdtemp(prefix="quantable-engines-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for package in ("bench", "quantize"):
        (place / package).symlink_to(Path(__file__).resolve().parents[2] / package)
    return place


class EngineExecutor(WorkerExecutor):
    """Runs `python -m bench.engines NAME`, on the same prompts and text as our own workers get."""

    def __call__(self, run: PlannedRun) -> list[Record]:
        try:
            self._as_read(run)  # both are made here, before a clock runs
            self._exact(run)
            return super().__call__(run)
        except UserError as error:
            how: dict[str, Any] = {"started_at": datetime.now(UTC).isoformat(timespec="seconds"), "wall_s": 0.0}
            asked, reason = Request(self.settings, run), f"{run.subject.engine}: {error}"
            return [asked.record("unsupported", work, reason=reason, **how) for work in run.works]

    def environment(self) -> dict[str, str]:
        return super().environment() | {"PYTHONPATH": str(scratch())}

    def _as_read(self, run: PlannedRun) -> Path:
        """The folder that the engine reads: of llama.cpp's reference a GGUF file, which is made here."""
        folder = Path(run.target.checkpoint or "")
        if run.subject.engine != "llamacpp" or run.subject.variant != REFERENCE.name:
            return folder
        place = scratch() / run.subject.content_sha256
        if not place.is_dir():
            from quantize.gguf_file import GGUF_NAME, check_gguf, write_gguf
            from quantize.weights import open_weights

            with quiet_libraries():
                weights = open_weights(folder)
                check_gguf(folder, weights.names())
                place.mkdir()
                write_gguf(weights, place / GGUF_NAME, folder.name, folder)
        return place

    def _exact(self, run: PlannedRun) -> Path | None:
        """What this program expects of the same checkpoint, dequantized to float32; kept as a reference's is."""
        variant = known_variants()[run.subject.variant]
        if not run.quality or variant.w_bit == 8:  # LLM.int8 rounds activations, whoever runs it
            return None
        kernel = "dequantize" if variant.is_awq else None
        own = replace(run.subject, name=run.subject.folder, engine=None, kernel=kernel)
        path = Path(logprobs_path(own, "float32", self.settings.quality.label, self.settings.environment))
        if not path.is_file():
            dtypes, kept = {own.baseline: "float32"}, {own.quality_baseline: str(path)}
            settings = replace(self.settings, compute_dtypes=dtypes, reference_logprobs=kept)
            target = replace(run.target, subject=own)
            WorkerExecutor(settings)(PlannedRun(target, 0, quality=True, is_reference=True))
        return path if path.is_file() else None

    def write(self, request: Request, path: Path) -> None:
        with quiet_libraries():
            path.write_text(json.dumps(self._request(request)), encoding="utf-8")

    def read(self, request: Request, path: Path, started_at: str) -> list[Record]:
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # it died while it wrote
                found.append(self._record(request, json.loads(line), path.with_name(EXPECTED_NAME), started_at))
        return found

    def _request(self, asked: Request) -> dict[str, Any]:
        """What the engine's process reads: token ids alone, since its tokenizer may be another."""
        import torch

        from bench.worker.latency import prompts_of
        from quantize.model.pretrained import config_of, tokenizer_of

        run, judged = asked.run, self.settings.quality
        folder = Path(run.target.checkpoint or "")  # which has a tokenizer
        words = config_of(folder).get_text_config().vocab_size
        scenarios = []
        for number, one in enumerate(run.scenarios):
            prompts = [prompt[0].tolist() for prompt in prompts_of(one, words, torch.device("cpu"))]
            scenarios.append({"number": number, "decode_steps": one.decode_steps, "prompts": prompts})
        positions = max([one.positions for one in run.scenarios] + [judged.block_tokens]) + EXTRA_POSITIONS
        rule = {name: getattr(self.settings.options.rule, name) for name in ("min_passes", "max_time_s")}
        blocks, tokenizer = self._blocks(asked).tolist() if run.quality else [], tokenizer_of(folder)
        chosen = self.settings.options.dtype is not None
        where = {"dtype": asked.compute_dtype, "chosen": chosen, "positions": positions}
        text = tokenizer.decode(blocks[0], skip_special_tokens=True) if blocks else ""
        spelling = (text, tokenizer(text, add_special_tokens=False)["input_ids"])
        text_and_ids = {"blocks": blocks, "spelling": spelling}
        return {"folder": str(self._as_read(run)), **where, "scenarios": scenarios, "rule": rule, **text_and_ids}

    def _blocks(self, asked: Request) -> Any:
        """What quality is judged on, int64 [blocks, tokens]."""
        from bench.worker.quality import evaluation_blocks
        from quantize.model.pretrained import tokenizer_of

        judged, tokenizer = self.settings.quality, tokenizer_of(Path(asked.run.target.checkpoint or ""))
        return evaluation_blocks(tokenizer, blocks=judged.blocks, block_tokens=judged.block_tokens, data=judged.data)

    def _record(self, asked: Request, line: dict[str, Any], expected: Path, started_at: str) -> Record:
        subject = asked.run.subject
        name = f"{subject.engine} {line['version']} ({line['computes']})"
        held = [line[f"{one}_bytes"] for one in ("baseline", "load_peak", "run_peak")]
        memory = Memory(subject.file_weights_bytes or 0, "RSS", *held)
        how = {"started_at": started_at, "wall_s": line["wall_s"], "kernels": Kernels(name, name), "memory": memory}
        if line["scenario"] is None:
            return self._judged(asked, expected, how)
        scenario = asked.run.scenarios[line["scenario"]]
        by_length = tuple(map(tuple, line["prefill_s"])) if scenario.lengths else ()
        prefill_s, decode_s = tuple(map(sum, line["prefill_s"])), tuple(map(tuple, line["decode_s"]))
        timed = Latency(prefill_s, decode_s, tuple(line["warmup_s"]), None, "time", by_length, "eager")
        return asked.record("ok", ("latency", scenario), latency=timed, **how)

    def _judged(self, asked: Request, written: Path, how: dict[str, Any]) -> Record:
        """The record of what an engine expects; of a reference that is kept for the others."""
        from bench.worker.quality import quality_of_file

        kept = Path(asked.reference_logprobs) if asked.reference_logprobs else None
        expected = kept if kept and kept.is_file() and not asked.run.is_reference else None
        try:
            exact, label = self._exact(asked.run), self.settings.quality.label
            found = quality_of_file(written, self._blocks(asked), label, expected, exact)
        except FloatingPointError as error:
            return asked.record("broken", QUALITY, reason=str(error), **how)
        if kept and asked.run.is_reference:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(written, kept.with_suffix(".partial"))
            kept.with_suffix(".partial").replace(kept)
        return asked.record("ok", QUALITY, quality=found, **how)
