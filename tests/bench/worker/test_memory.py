import os
from pathlib import Path

import pytest
import torch

from bench.worker.memory import CudaAllocatorView, RssView, memory_view
from quantize.loading.device_map import decode_bytes, weights_bytes

MB = 10**6
BLOCK_BYTES = 400 * MB


def allocate(size_bytes: int) -> torch.Tensor:
    return torch.ones(size_bytes // 4, dtype=torch.float32)


def test_a_known_allocation_is_seen_within_a_few_percent() -> None:
    view = RssView()
    view.reset_peak()
    before = view.current_bytes()
    block = allocate(BLOCK_BYTES)
    held = view.current_bytes()
    assert before is not None
    assert held is not None
    assert held - before == pytest.approx(BLOCK_BYTES, rel=0.03)
    peak = view.peak_bytes()
    assert peak is not None
    assert peak - before == pytest.approx(BLOCK_BYTES, rel=0.03)

    del block
    after_peak, after_held = view.peak_bytes(), view.current_bytes()
    assert after_peak is not None
    assert after_held is not None
    assert after_peak - before == pytest.approx(BLOCK_BYTES, rel=0.03)
    assert abs(after_held - before) < 0.03 * BLOCK_BYTES


def test_a_reset_forgets_the_earlier_peak() -> None:
    view = RssView()
    block = allocate(BLOCK_BYTES)
    del block
    view.reset_peak()
    before, quarter = view.current_bytes(), allocate(BLOCK_BYTES // 4)
    peak = view.peak_bytes()
    assert peak is not None
    assert before is not None
    assert peak - before == pytest.approx(quarter.nbytes, rel=0.05)


def write_status(folder: Path, peak_kb: int, held_kb: int) -> None:
    (folder / "status").write_text(f"Name:\tpython\nVmHWM:\t {peak_kb} kB\nVmRSS:\t {held_kb} kB\n")


def test_where_the_peak_cannot_be_reset_only_a_new_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").mkdir()
    view = RssView(tmp_path)
    write_status(tmp_path, 5000, 3000)
    assert (view.peak_bytes(), view.current_bytes()) == (5000 * 1024, 3000 * 1024)
    view.reset_peak()
    assert view.peak_bytes() is None
    write_status(tmp_path, 5001, 3000)
    assert view.peak_bytes() == 5001 * 1024


def test_where_there_is_no_proc_psutil_tells_the_current_size_alone(tmp_path: Path) -> None:
    view = RssView(tmp_path / "none")
    view.reset_peak()
    assert view.peak_bytes() is None
    held = view.current_bytes()
    assert held is not None
    assert held == pytest.approx(RssView().current_bytes(), rel=0.05)


def test_each_device_has_its_view() -> None:
    assert memory_view("cpu").source == "RSS"
    assert memory_view("cuda").source == "CUDA allocator"


class Tied(torch.nn.Module):
    """An embedding of 1000 x 64 that is the head as well, a norm, a buffer and a view into that buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(1000, 64, dtype=torch.float16)
        self.head = torch.nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = torch.nn.LayerNorm(64)
        table = torch.zeros(10, 8, dtype=torch.int32)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("row", table[0], persistent=False)


def test_weights_are_exact_with_tied_ones_once() -> None:
    assert weights_bytes(Tied()) == 1000 * 64 * 2 + 2 * 64 * 4 + 10 * 8 * 4


def test_untied_weights_count_each() -> None:
    model = Tied()
    model.head.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
    assert weights_bytes(model) == 2 * 1000 * 64 * 2 + 2 * 64 * 4 + 10 * 8 * 4


class Decoding(Tied):
    """The same as a model that names its input embedding."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding


def test_a_decode_step_reads_everything_once_but_an_embedding_that_is_no_head() -> None:
    model = Decoding()
    assert decode_bytes(model) == weights_bytes(model)
    model.head.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
    assert decode_bytes(model) == weights_bytes(model) - 1000 * 64 * 2
    assert decode_bytes(Tied()) is None


@pytest.mark.parametrize("double", [False, True])
def test_the_scales_beside_a_4_bit_weight_count(double: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(256, 128, bias=False, quant_type="nf4", compress_statistics=double)
    layer.to("cpu")
    blocks, sixteen_levels, byte_levels = 256 * 128 // 64, 16 * 4, 256 * 4
    scales = blocks + 2 * 4 + 4 + byte_levels if double else 4 * blocks
    assert weights_bytes(layer) == 256 * 128 // 2 + sixteen_levels + scales


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_cuda_allocator_tells_known_sizes() -> None:
    view = CudaAllocatorView()
    view.reset_peak()
    before = view.current_bytes()
    block = torch.ones(BLOCK_BYTES // 4, device="cuda")
    del block
    peak = view.peak_bytes()
    assert peak is not None
    assert before is not None
    assert peak - before == pytest.approx(BLOCK_BYTES, rel=0.01)
    view.reset_peak()
    assert view.peak_bytes() == before


def test_reset_needs_no_privilege_here() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak cannot be reset on this system")
    view = RssView()
    view.reset_peak()
    assert view.peak_bytes() is not None
