from pathlib import Path
import quantize
from quantize.building.job import BuildOptions
from quantize.checkpoint import find_checkpoints
from quantize.rounding.options import BnbOptions
import dataclasses

def test_hash(tiny_llama: Path, tmp_path: Path) -> None:
    for n, o in enumerate((BuildOptions(blocks=4, block_tokens=64, device="cpu"), BuildOptions(blocks=4, block_tokens=64, device="cpu", rounding="nearest"))):
        quantize.quantize(str(tiny_llama), ["all", "rtn"], tmp_path / str(n), options=o)
        for c in find_checkpoints(tmp_path / str(n)):
            print("HASH", n, c.manifest.name, c.content_sha256)
