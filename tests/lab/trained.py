"""A second trained model for the race: a small Qwen3 with grouped queries, trained here on the standard library.

`python -m tests.lab.trained OUT` makes the folder, its tokenizer included, in a few minutes; then
`python -m tests.lab.race --source OUT`. The texts that the race judges on are not among what it is trained on.
"""

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from quantize.quiet import quiet_libraries
from quantize.rounding.gram import multiplies_bfloat16
from quantize.shell import guarded

WORDS, BLOCK_TOKENS, BATCH = 8192, 256, 16
END = "<end>"


def texts() -> list[str]:
    """The modules of the standard library, in the order of their names, whole."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = ("asyncio", "collections", "concurrent", "ctypes", "email", "http", "idlelib", "importlib", "json")
    files = [*root.glob("*.py"), *(one for name in folders for one in (root / name).rglob("*.py"))]
    return [one.read_text(encoding="utf-8", errors="ignore") for one in sorted(files)]


def tokenizer_for(given: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of WORDS words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        given, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def trained(out: Path, seconds: float, device: str) -> None:
    """Train for so long, and write model and tokenizer."""
    place = torch.device(device)
    torch.manual_seed(0)
    given = texts()
    tokenizer = tokenizer_for(given)
    ids = torch.tensor([token for text in given for token in (*tokenizer(text)["input_ids"], 0)])
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    config = Qwen3Config(vocab_size=WORDS, **sizes, **heads, tie_word_embeddings=True, max_position_embeddings=2048)
    config.bos_token_id = config.eos_token_id = 0
    model, ids = Qwen3ForCausalLM(config).to(place), ids.to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began, step, half = time.perf_counter(), 0, multiplies_bfloat16(place)
    while (spent := (time.perf_counter() - began) / seconds) < 1:
        starts = torch.randint(len(ids) - BLOCK_TOKENS, (BATCH, 1))
        batch = ids[(starts + torch.arange(BLOCK_TOKENS)).to(place)]
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1 - spent)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{spent:.0%}: step {step}, loss {float(loss):.3f}", flush=True)
        step += 1
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{step} steps of {BATCH * BLOCK_TOKENS} of {len(ids)} tokens, loss {float(loss):.3f}: {out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=420.0, help="of training (default 420)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    with quiet_libraries():
        return guarded("trained", lambda: trained(**vars(arguments)))


if __name__ == "__main__":
    sys.exit(main())
