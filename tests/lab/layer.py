"""How long a decoder layer of a large model takes to quantize, and how much memory: random weights in its shape.

`python -m tests.lab.layer` prints seconds a phase, in all, and the highest resident set size. An older checkout runs
the same file, so that before and after can be taken in turn.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from quantize.building.stream import LayerStream
from quantize.dummy import dummy_blocks, dummy_weights
from quantize.model.layer_calls import runnable
from quantize.model.pretrained import empty_model
from quantize.model.skeleton import Skeleton
from quantize.process_memory import peak_resident_bytes
from quantize.rounding.options import AwqOptions
from quantize.source import open_source

WORDS = 2000  # of the vocabulary: what lies outside the layer is not asked about


def some_layers(source: str, layers: int, group_size: int, blocks: int, block_tokens: int) -> None:
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(open_source(source).folder, Path(place) / "model")
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": layers, "vocab_size": WORDS}
        (folder / "config.json").write_text(json.dumps(config))
        model = empty_model(folder)
    skeleton = Skeleton.of(model, dummy_weights(model, cpu))
    stream = LayerStream(skeleton, runnable(skeleton, cpu).with_group_size(group_size), cpu)
    tokens, began = dummy_blocks(WORDS, blocks, block_tokens), time.perf_counter()
    with torch.inference_mode():
        for result, _ in stream.quantized(tokens, AwqOptions(group_size, rounding="gptq")):
            print(", ".join(f"{phase} {spent:.1f} s" for phase, spent in result.seconds.items()))
    spent = time.perf_counter() - began
    print(f"{source}: {spent / layers:.1f} s a layer, {spent:.1f} in all, at most {peak_resident_bytes() / 1e9:.2f} GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default="dummy:mistral-7b")
    for name, value in {"layers": 2, "group-size": 128, "blocks": 48, "block-tokens": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    some_layers(**vars(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
