"""`quantable chat`: what each checkpoint of a folder answers to one prompt, greedily. Importing it imports no torch.

python -m bench.chat CHECKPOINT ANSWER.json PROMPT NEW DEVICE PARENT_PID answers with one.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from bench.run.executor import run_module
from bench.worker.options import DEVICES, BenchOptions
from bench.worker.worker import die_with, failure
from quantize.checkpoint import find_checkpoints
from quantize.errors import UserError
from quantize.schema import from_json
from quantize.shell import Parser, command, say
from quantize.variant import REFERENCE, variants_named


@dataclass(frozen=True)
class Answer:
    """What a checkpoint said, without special tokens, and its new tokens with them; or the problem it had."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    problem: str | None = None


def answers(folders: Sequence[Path], prompt: str, *, new: int = 64, device: str = "auto") -> list[Answer]:
    """The answer of each checkpoint, each in a process of its own: no more than one model is in memory."""
    found = []
    for folder in folders:
        with tempfile.TemporaryDirectory(prefix="quantable-") as scratch:
            path = Path(scratch) / "answer.json"
            given = (str(folder), str(path), prompt, str(new), device, str(os.getpid()))
            ended = run_module("bench.chat", *given, timeout_s=BenchOptions.timeout_s)
            made = from_json(Answer, path.read_bytes(), "an answer") if path.is_file() else None
        found.append(made or Answer(problem=": ".join(ended.verdict())))
    return found


def _answer(folder: Path, prompt: str, new: int, device: str) -> Answer:
    """Load this checkpoint here and ask it, in its chat template where it has one."""
    from quantize.loader import load

    try:
        loaded = load(folder, device=device)
        if (tokenizer := loaded.tokenizer) is None:
            raise UserError("random weights have no tokenizer: chat with a real model's checkpoint")
        if templated := bool(tokenizer.chat_template):
            said = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        asked = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated).to(loaded.device)
        mask = {"attention_mask": asked.attention_mask}
        made = loaded.model.generate(asked.input_ids, **mask, max_new_tokens=new, do_sample=False)
        tokens = tuple(made[0, asked.input_ids.shape[1] :].tolist())
        return Answer(tokenizer.decode(tokens, skip_special_tokens=True), tokens)
    except Exception as error:
        return Answer(problem=": ".join(failure(error, str(folder))))


def parser() -> Parser:
    p = Parser(prog="quantable chat", description="See what each variant answers to one prompt.")
    p.add_argument("directory", type=Path, metavar="DIR", help="where `quantize --out` put the checkpoints")
    p.add_argument("--prompt", required=True, metavar="TEXT")
    p.add_argument("--new", type=int, default=64, metavar="N", help="new tokens at most (default %(default)s)")
    p.add_argument("--variant", default="all,rtn", metavar="NAME[,NAME]", help="only these of those that are there")
    p.add_argument("--device", choices=DEVICES, default="auto", help="where to run (default %(default)s)")
    return p


def run(options: argparse.Namespace) -> int:
    """Ask each checkpoint, and say side by side what it answers; 1 where one gives no answer."""
    chosen = variants_named(options.variant.split(","))
    found = [one for one in find_checkpoints(options.directory) if one.variant in chosen]
    if not found or not options.prompt.strip() or options.new < 1:
        raise UserError("nothing to ask: give a --prompt, --new of 1 or more, and a --variant that is in the folder")
    said = answers([one.path for one in found], options.prompt, new=options.new, device=options.device)
    pairs = list(zip(found, said, strict=True))
    references = {one.manifest.base_model: made.tokens for one, made in pairs if one.variant == REFERENCE}
    for checkpoint, made in pairs:
        title, reference = checkpoint.path.name, references.get(checkpoint.manifest.base_model)
        if reference and made.tokens and checkpoint.variant != REFERENCE:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(made.tokens, reference, strict=False)))
            title += f" (its first {same} of {len(made.tokens)} tokens are those of FP16)"
        text = f"no answer: {made.problem}" if made.problem else made.text
        say(title, *(f"  {line}" for line in text.splitlines()), "")
    return int(any(made.problem for made in said))


main = command(parser, run)

if __name__ == "__main__":
    die_with(int(sys.argv[6]))
    answered = _answer(Path(sys.argv[1]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
    Path(sys.argv[2]).write_text(json.dumps(asdict(answered)), encoding="utf-8")
