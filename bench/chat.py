"""`quantable chat`: what each checkpoint of a folder answers to one prompt, greedily. Importing it imports no torch."""

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from bench.worker.options import DEVICES
from bench.worker.worker import without_folder
from quantize.checkpoint import find_checkpoints
from quantize.errors import UserError
from quantize.process_memory import trim_memory
from quantize.quiet import quiet_libraries
from quantize.shell import Parser, command, say
from quantize.variant import REFERENCE, variants_named


@dataclass(frozen=True)
class Answer:
    """What a checkpoint said, without special tokens, and its new tokens with them; or the problem it had."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    problem: str | None = None


def answers(folders: Sequence[Path], prompt: str, *, new: int = 64, device: str = "auto") -> Iterator[Answer]:
    """The answer of each checkpoint, one model after the other in memory."""
    for folder in folders:
        with quiet_libraries():
            try:
                answer = _answer(folder, prompt, new, device)
            except Exception as error:  # whatever a model does: the others answer
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                answer = Answer(problem=without_folder(said, str(folder)))
            gc.collect()
            trim_memory()
        yield answer


def _answer(folder: Path, prompt: str, new: int, device: str) -> Answer:
    """Load this checkpoint here and ask it, in its chat template where it has one."""
    from quantize.loader import load

    loaded = load(folder, device=device)
    if (tokenizer := loaded.tokenizer) is None:
        raise UserError("random weights have no tokenizer: chat with a real model's checkpoint")
    if templated := bool(tokenizer.chat_template):
        said = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated).to(loaded.device)
    how = {"attention_mask": asked.attention_mask, "max_new_tokens": new, "do_sample": False}
    made = loaded.model.generate(asked.input_ids, **how)
    tokens = tuple(made[0, asked.input_ids.shape[1] :].tolist())
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True), tokens)


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
    said = list(answers([one.path for one in found], options.prompt, new=options.new, device=options.device))
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
