"""How a model answers the questions of public tasks, through EleutherAI's lm-eval (the extra `lm-eval`)."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records.record import TaskScore
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

GROUPS: dict[str, tuple[str, ...]] = {"medical": (
    "mmlu_clinical_knowledge", "mmlu_medical_genetics", "mmlu_anatomy", "mmlu_professional_medicine",
    "mmlu_college_biology", "mmlu_college_medicine", "medqa_4options", "pubmedqa", "medmcqa",
)}  # fmt: skip
"""Names that stand for several tasks; lm-eval's own groups and tags work beside them.

medical: nine of the ten tasks of the BioMistral-7B model card, in its order and by their names in lm-eval, which has no
MedQA with 5 options. Its `pubmedqa` wants a data set that comes as a script, which datasets 4 and later refuse: a
task of the same name in a folder of one's own takes its place. The prompts are lm-eval's, not the card's.
"""

SEEDS = {f"{name}_seed": 1234 for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
MAIN_METRICS = ("acc_norm", "acc")  # what counts where a task gives several metrics; without these, its first


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """The tasks that these names stand for (GROUPS), each once and in order. Raises UserError when there is none."""
    tasks = tuple(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
    if not tasks:
        raise UserError(f"no task named: name tasks of lm-eval or one of {', '.join(GROUPS)}")
    return tasks


def evaluate(
    model: Any, tokenizer: Any, names: Iterable[str], *, folder: Path | None, limit: int | None
) -> tuple[TaskScore, ...]:
    """Ask a loaded transformers model the questions of these tasks, with fixed seeds and without printing a word.

    folder: YAML files of one's own tasks, which go before lm-eval's; relative paths in them start at this folder.
    limit: at most so many questions a task, the first ones. A group or tag of lm-eval gives one result for each of its
    tasks. Log-probabilities are taken in float32. Raises UserError, before any question is asked, without lm-eval, for
    an unknown task, and for one whose data cannot be loaded."""
    if tokenizer is None:
        raise UserError("dummy weights have no tokenizer and no knowledge: run tasks on a checkpoint of a real model")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: use a limit of 1 or more")
    wanted = expand(names)
    with quiet_libraries():
        manager = task_manager(wanted, folder)
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _no_output(), contextlib.chdir(folder or "."):
            tasks = {name: task for task_name in wanted for name, task in _load(manager, task_name).items()}
            asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
            how = {"task_manager": manager, "limit": limit, "log_samples": False, **SEEDS}
            found = simple_evaluate(model=asked, tasks=list(tasks.values()), **how)
    return tuple(_result(name, found, folder) for name in tasks)


def task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index that knows these names, its own 14,000 read only where needed. Raises UserError for others."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("lm-eval, which runs the tasks, is not installed: pip install 'quantable[lm-eval]'") from None
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that holds the YAML files of your tasks")
    with _no_output():
        if folder is not None:
            local = TaskManager(include_path=folder.resolve(), include_defaults=False)
            if set(names) <= set(local.all_subtasks):
                return local
        manager = TaskManager(include_path=folder and folder.resolve())
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*GROUPS, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"unknown task {name!r}: {hint}`lm-eval ls tasks` lists the names")
    return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
    """The tasks behind one name of the index, with their data, by their own names."""
    from datasets.exceptions import DatasetsError

    try:
        return dict(manager.load([name])["tasks"])
    except (OSError, RuntimeError, ValueError, ImportError, DatasetsError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        ways = "fetch its data set where there is a network, or put a task of this name with local data into a folder"
        raise UserError(f"task {name} cannot be loaded ({reason}): leave it out, {ways} of your own") from error


def _result(name: str, found: Mapping[str, Any], folder: Path | None) -> TaskScore:
    """The main metric out of keys such as "acc,none" and "acc_stderr,none" (metric, then filter)."""
    figures = found["results"][name]
    keys = [key for key in figures if "," in key and "_stderr," not in key]
    main = next((key for metric in MAIN_METRICS for key in keys if key.startswith(f"{metric},")), keys[0])
    metric, _, kept = main.partition(",")
    stderr = figures.get(f"{metric}_stderr,{kept}")
    asked, config = found["n-samples"].get(name, {}), found["configs"].get(name, {})
    dataset = config.get("dataset_path") or ""
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not ((folder or Path()) / dataset).exists()
    whole = bool(of_hub and asked) and asked["effective"] == asked["original"]
    value, error = float(figures[main]), float(stderr) if isinstance(stderr, float) else None
    where = (dataset, config.get("dataset_name")) if whole else (None, None)
    return TaskScore(name, metric, value, error, asked.get("effective"), found["n-shot"].get(name), *where)


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Lose what this process and its children print: lm-eval draws bars, logs, and has git complain."""
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with Path(os.devnull).open("w") as nowhere:
            for number in kept:
                os.dup2(nowhere.fileno(), number)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
