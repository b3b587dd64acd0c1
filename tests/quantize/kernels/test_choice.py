"""Which kernel runs: by name, by what the layout stood for, or the fastest by a probe that is remembered."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantize.errors import UserError
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.kernels import KERNELS, choice
from quantize.kernels.base import Int4Linear, Kernel, KernelFault
from quantize.kernels.choice import PROBE_S, PROBE_SAMPLES, KernelTiming, LayerShape, best, choose_kernel, probe_kernel
from quantize.variant import KERNEL_NAMES

CPU = torch.device("cpu")


@pytest.fixture
def shapes() -> list[LayerShape]:
    torch.manual_seed(0)
    return [
        LayerShape(round_to_nearest(torch.randn(64, 128), 64), 3),
        LayerShape(round_to_nearest(torch.randn(128, 64), 64), 1),
    ]


def choose(wanted: str | None, shapes: list[LayerShape], cache: Path | None = None, version: str = "GEMM") -> str:
    return choose_kernel(wanted, shapes, version, CPU, torch.float32, cache=cache).name


def test_every_kernel_can_be_asked_for() -> None:
    assert tuple(KERNELS) == KERNEL_NAMES


def test_a_kernel_asked_for_is_taken(shapes: list[LayerShape]) -> None:
    assert choose("dequantize", shapes) == "dequantize"
    assert choose("torch-cpu", shapes) == "torch-cpu"


def test_what_cannot_run_here_says_why(shapes: list[LayerShape]) -> None:
    with pytest.raises(UserError, match=r"autoawq-gemm: runs on CUDA.*use --kernel auto"):
        choose("native", shapes)
    with pytest.raises(UserError, match=r"autoawq-gemv: runs on CUDA; triton-gemv: runs on CUDA"):
        choose("native", shapes, version="GEMV")
    with pytest.raises(UserError, match="unknown kernel 'marlin'; there are: auto, native, torch-cpu"):
        choose("marlin", shapes)


def test_native_is_the_first_of_the_layouts_kernels_that_runs(
    shapes: list[LayerShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("native", shapes, version="GEMV") == "triton-gemv"


def test_the_best_loses_least_over_both_phases() -> None:
    assert best({"a": KernelTiming(1.0, 1.0), "b": KernelTiming(0.9, 1.2)}) == "a"
    assert best({"a": KernelTiming(1.0, 1.0), "b": KernelTiming(0.5, 1.2)}) == "b"


def test_the_probe_weighs_each_shape_by_its_layers(shapes: list[LayerShape], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def seconds(layer: Int4Linear, x: Tensor, flushed: Tensor | None) -> float:
        calls.append((layer.in_features, len(x)))
        return float(layer.in_features) * (1 if len(x) == 1 else 10)

    monkeypatch.setattr(choice, "call_seconds", seconds)
    found = probe_kernel(KERNELS["dequantize"], shapes, CPU, torch.float32)
    assert found == KernelTiming(3 * 128 + 64, 10 * (3 * 128 + 64))
    assert len(calls) == 2 * 2 * (1 + PROBE_SAMPLES)  # one warm-up each


def test_what_else_runs_beside_a_probe_decides_nothing(
    shapes: list[LayerShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([9.0, *(PROBE_S / 20 * (1 + number % 7) for number in range(10_000))])
    monkeypatch.setattr(choice, "call_seconds", lambda layer, x, flushed: next(taken))
    found = probe_kernel(KERNELS["dequantize"], shapes[:1], CPU, torch.float32)
    assert found is not None
    assert found.decode_s == pytest.approx(shapes[0].count * PROBE_S / 20)


def test_the_fastest_is_remembered_and_another_machine_is_not(
    shapes: list[LayerShape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[str] = []

    def fake(kernel: Kernel, *_: object) -> KernelTiming:
        probed.append(kernel.name)
        return KernelTiming(1.0, 1.0) if kernel.name == "dequantize" else KernelTiming(2.0, 1.0)

    monkeypatch.setattr(choice, "probe_kernel", fake)
    cache = tmp_path / "deep" / "kernels.json"
    assert choose(None, shapes, cache) == "dequantize"
    assert {"torch-cpu", "dequantize"} <= set(probed)
    count = len(probed)
    assert choose("auto", shapes, cache) == "dequantize"
    assert len(probed) == count
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["kernel"] == "dequantize"
    assert entry["seconds"]["torch-cpu"] == [2.0, 1.0]
    monkeypatch.setattr(choice, "version_of", lambda name: "another")
    assert choose("auto", shapes, cache) == "dequantize"
    assert len(probed) == 2 * count
    monkeypatch.setattr(choice, "PROBE_S", 0.5)  # what another way to measure found is not trusted
    assert choose("auto", shapes, cache) == "dequantize"
    assert len(probed) == 3 * count
    for damaged in ("no JSON", "[]", "{}", "NaN"):
        cache.write_text(damaged)
        assert choose("auto", shapes, cache) == "dequantize"
    (key,) = json.loads(cache.read_text())
    for entry in ("3", "{}", '{"kernel": 1, "seconds": {}}', '{"kernel": "dequantize", "seconds": {"a": [1.0]}}'):
        count = len(probed)
        cache.write_text(f'{{"{key}": {entry}}}')
        assert choose("auto", shapes, cache) == "dequantize"
        assert len(probed) > count


def test_a_kernel_that_fails_or_errs_is_passed_over(shapes: list[LayerShape], monkeypatch: pytest.MonkeyPatch) -> None:
    good = KERNELS["dequantize"]

    def swapped(weight: Int4Weight, *rest: object) -> Int4Linear:
        flipped = weight.codes.view(len(weight.codes), -1, 2).flip(-1).reshape(weight.codes.shape)
        return good.prepare(Int4Weight(flipped, weight.scales, weight.zeros), *rest)  # type: ignore[arg-type]

    def crashing(*_: object) -> Int4Linear:
        raise RuntimeError("no such instruction")

    faulty = {
        "swapped": replace(good, name="swapped", prepare=swapped),
        "crashing": replace(good, name="crashing", prepare=crashing),
    }
    monkeypatch.setattr(choice, "KERNELS", {**faulty, "dequantize": good})
    assert choose("auto", shapes) == "dequantize"
    monkeypatch.setattr(choice, "KERNELS", faulty)
    with pytest.raises(KernelFault, match="no kernel gives right results"):
        choose("auto", shapes)
