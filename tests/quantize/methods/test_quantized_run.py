"""A decoder layer in the model quantized so far: what its linear layers see, and what it gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import quantize
from quantize.building.job import BuildOptions
from quantize.methods import bnb
from quantize.methods.quantized_run import QuantizedRun
from quantize.rounding import correction

STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


class Layer(nn.Module):
    """A layer that counts how often its attention runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
        config._attn_implementation = "eager"
        self.own = LlamaDecoderLayer(config, 0).eval()
        self.positions = LlamaRotaryEmbedding(config)
        self.calls = 0
        self.own.self_attn.o_proj.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def call(self, hidden: Tensor) -> dict[str, Any]:
        return {"position_embeddings": self.positions(hidden, torch.arange(hidden.shape[1])[None])}


def seen_by(layer: nn.Module, name: str, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    found: list[Tensor] = []
    with torch.no_grad(), layer.get_submodule(name).register_forward_pre_hook(lambda m, args: found.append(args[0])):
        layer(hidden, **call)
    return found[0].flatten(0, -2)


@pytest.mark.usefixtures("single")
def test_each_linear_layer_sees_what_those_before_it_give_now() -> None:
    whole = Layer()
    layer, batches = whole.own, [torch.randn(2, 8, 32) for _ in range(3)]
    linears = [name for names in STAGES for name in names]
    before = {name: layer.get_submodule(name).weight.data.clone() for name in linears}
    calls = [whole.call(batch) for batch in batches]
    exact = {
        names[0]: [seen_by(layer, names[0], *pair) for pair in zip(batches, calls, strict=True)] for names in STAGES
    }
    drifted = [batch + 0.1 * torch.randn_like(batch) for batch in batches]
    run = QuantizedRun(layer, linears, list(drifted), calls, exact)
    run.inputs(
        "mlp.gate_proj", [before["mlp.gate_proj"]]
    )  # looked at before attention is done: nothing of it may be kept
    for names in STAGES:
        expected = [seen_by(layer, names[0], *pair) for pair in zip(drifted, calls, strict=True)]
        few = names[0] == STAGES[-1][0]
        weights = [before[name][:20] if few else before[name] for name in names]
        found = run.inputs(names[0], weights)
        assert found is not None
        stats, watched = found
        calibrated, there = torch.cat(expected[:-1]), torch.cat(exact[names[0]][:-1])
        torch.testing.assert_close(stats.gram, calibrated.t() @ calibrated / len(calibrated), rtol=1e-4, atol=1e-5)
        wanted = (there - calibrated).t() @ calibrated / len(calibrated)
        wanted = weights[0] @ wanted if few else wanted
        torch.testing.assert_close(stats.cross, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(watched.found, expected[-1])
        torch.testing.assert_close(watched.exact, exact[names[0]][-1])
        for name in names:
            run.put(name, before[name] + 0.05 * torch.randn_like(before[name]))
    with torch.no_grad():
        gives = [layer(batch, **call) for batch, call in zip(drifted, calls, strict=True)]
    whole.calls = 0
    run.finish()
    assert whole.calls == 0  # attention was done before the last stage, and gives what it gave
    torch.testing.assert_close(run.hidden, gives, rtol=0, atol=0)
    run.restore()
    assert all(torch.equal(layer.get_submodule(name).weight, before[name]) for name in linears)
    last = QuantizedRun(layer, linears, list(drifted), calls, exact, is_last=True)
    again = last.inputs("mlp.gate_proj", [before["mlp.gate_proj"]])
    assert again is not None
    assert sorted(exact) == sorted(names[0] for names in STAGES if names[0] != "mlp.gate_proj")  # no run needs it again
    last.put("mlp.gate_proj", torch.zeros(48, 32))
    last.restore()
    assert not layer.mlp.gate_proj.weight.any()


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32, whatever this CPU is good at."""
    monkeypatch.setattr("quantize.rounding.gram.multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("quantize.methods.quantized_run.multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("quantize.methods.quantized_run.WIDE", 48)


@pytest.mark.parametrize(("variant", "module"), [("awq-gemm", correction), ("bnb-4bit", bnb)])
def test_every_linear_layer_but_the_first_inputs_is_rounded_for_what_it_sees_in_the_quantized_model(
    variant: str, module: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, drifts = module.correct_rows, list[bool]()

    def note(weight: Tensor, stats: Any, watched: Any, *others: Any) -> Any:
        drifts.append(bool(stats.cross.any()) and watched is not None)
        return own(weight, stats, watched, *others)

    monkeypatch.setattr(module, "correct_rows", note)
    options = BuildOptions(blocks=4, block_tokens=32, device="cpu")
    quantize.quantize(str(tiny_llama), variant, tmp_path, options=options)
    assert drifts == [False, *[True] * (len(drifts) - 1)]  # the model's first inputs are as they were
    assert len(drifts) == 8
