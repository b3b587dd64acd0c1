"""Scales move only where trying has proven it: against autoawq's maps, against planted traps, on whole models."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantize.model.apart import take_apart
from quantize.model.architecture import Architecture, architecture_of
from quantize.model.groups import WRAPPED_TYPES, Prober, tensors_in
from quantize.model.scales import OTHER, UNSEEN, ScaleGroup, apply_scales
from quantize.quiet import quiet_libraries
from tests.quantize.building.test_architectures import SMALL as FAMILY

SMALL = {**FAMILY, "eos_token_id": None, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "phi3": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32},
    "cohere": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "falcon": {},
    "falcon-new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 32},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "gpt_oss": {
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "head_dim": 32,
        "layer_types": ["full_attention"] * 2,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
MAPPED: tuple[str, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "cohere",
    "stablelm",
    "starcoder2",
)
MAPPED += ("gpt_neox", "opt", "bloom", "mpt", "gptj")
"""Model types whose maps in autoawq fit this transformers."""


def made(kind: str) -> Any:
    """A small random model taken apart, norms and biases away from their initial values."""
    import transformers

    torch.manual_seed(0)
    with quiet_libraries():
        config = transformers.AutoConfig.for_model(kind.removesuffix("-new"), **{**SMALL, **MODELS[kind]})
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, value in values.items():
        if value.dim() == 1:
            value.add_(torch.randn_like(value) * 0.2)
        elif "embed" not in name and "wte" not in name:
            value.mul_(3)
    for name, part in take_apart(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(part.cut(values[part.parameter]).clone()))
    return model


def logits(model: Any, tokens: int = 64) -> Tensor:
    ids = torch.arange(tokens).view(1, tokens) * 7 % 500 + 3
    with torch.inference_mode():
        out: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return out


def probed(
    model: Any, index: int, wrapped: bool = False, tokens: int = 64
) -> tuple[list[ScaleGroup], dict[str, str], Prober]:
    """The groups of one decoder layer, tried on what the model calls it with."""
    architecture: Architecture = architecture_of(model)
    layer, config = architecture.layers[index], model.config
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    logits(model, tokens)
    handle.remove()
    [(args, kwargs)] = calls
    args = [one.clone() if isinstance(one, Tensor) else one for one in args]  # out of inference mode
    kwargs = {key: _cloned(value) for key, value in kwargs.items()}
    prober = Prober(layer, lambda: tensors_in(layer(args[0].clone(), *args[1:], **kwargs)))
    sizes = [getattr(config, "v_head_dim", None) or 0, getattr(config, "head_dim", None) or 32]
    groups, refused = prober.groups([size for size in sizes if size], wrapped)
    return groups, refused, prober


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_cloned, value)) if isinstance(value, tuple) else value


def linears_of(groups: Sequence[ScaleGroup]) -> dict[str, set[str]]:
    return {group.source: {consumer.name for consumer in group.consumers} for group in groups}


@pytest.mark.parametrize("kind", MODELS)
def test_random_scales_through_every_group_leave_the_logits_as_they_were(kind: str) -> None:
    model = made(kind)
    before, found = logits(model), 0
    torch.manual_seed(1)
    for index, layer in enumerate(architecture_of(model).layers):
        for group in probed(model, index, kind in WRAPPED_TYPES)[0]:
            free = torch.tensor(group.free)
            apply_scales(layer, group, torch.where(free, torch.rand(len(free)) + 0.5, 1))
            found += 1
    assert found >= 4
    assert float((logits(model) - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_saw_no_token_move_with_their_peers(kind: str) -> None:
    model = made(kind)
    before = logits(model)
    layer = architecture_of(model).layers[1]
    groups, _, prober = probed(model, 1, tokens=1)
    unseen = [name for name, _ in layer.named_modules() if name.endswith(".down_proj") and name not in prober.matrices]
    assert len(unseen) >= 2
    torch.manual_seed(1)
    for group in groups:
        apply_scales(layer, group, 2.0 ** torch.randint(-2, 3, (len(group.free),)))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", MAPPED)
def test_every_group_of_autoawqs_map_is_found(kind: str) -> None:
    with quiet_libraries():
        from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    model = made(kind)
    layer = architecture_of(model).layers[1]
    names = {module: name for name, module in layer.named_modules()}
    nothing: defaultdict[str, None] = defaultdict(lambda: None)
    theirs = AWQ_CAUSAL_LM_MODEL_MAP[kind].get_layers_for_scaling(layer, nothing, {})
    ours = linears_of(probed(model, 1, kind in WRAPPED_TYPES)[0])
    for group in theirs:
        assert {names[linear] for linear in group["layers"]} <= ours.get(names[group["prev_op"]], set())


def test_the_scales_of_a_value_reach_the_heads_that_share_it() -> None:
    groups, _, _ = probed(made("mistral"), 1)
    [group] = [one for one in groups if one.source == "self_attn.v_proj"]
    [consumer] = group.consumers
    heads = torch.tensor(consumer.channels).view(4, 32)
    assert torch.equal(heads, torch.arange(64).view(2, 1, 32).expand(2, 2, 32).reshape(4, 32))


def test_channels_that_stayed_zero_keep_their_scale() -> None:
    groups, _, _ = probed(made("opt"), 1)
    [group] = [one for one in groups if one.source == "fc1"]
    channels = torch.tensor(group.consumers[0].channels)
    dead = channels == UNSEEN
    assert 0 < int(dead.sum()) < len(channels)
    assert torch.equal(torch.tensor(group.free), ~dead)


@pytest.mark.parametrize(("kind", "one_plus"), [("gemma", True), ("gemma2", True), ("llama", False)])
def test_norms_that_add_one_to_their_weight_are_told_by_trying(kind: str, one_plus: bool) -> None:
    groups, _, _ = probed(made(kind), 0)
    assert [one.one_plus for one in groups if one.source == "input_layernorm"] == [one_plus]


class Extra(nn.Module):
    """A matrix that is no nn.Linear, on the way to a layer's output."""

    def __init__(self, layer: Any, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = layer.post_attention_layernorm
        self.use = use
        self.table = nn.Parameter(torch.randn(128, 128) / 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return self.use(out, self.table)


class Layer(nn.Module):
    """A block in which something else reads what a norm gives."""

    def __init__(self, trap: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.trap = trap
        self.extra = nn.Parameter(torch.randn(64, 64))
        self.side = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        out: Tensor = x + self.down(torch.nn.functional.silu(self.up(seen)))
        if self.trap == "extra matrix":
            out = out + seen @ self.extra
        if self.trap == "weight read and not called":
            out = out + nn.functional.linear(seen, self.side.weight)
        if self.trap == "residual after the norm":
            out = out + seen
        return out


def tried(layer: nn.Module, width: int = 64) -> tuple[dict[str, set[str]], dict[str, str]]:
    torch.manual_seed(1)
    x = torch.randn(2, 9, width)
    groups, refused = Prober(layer, lambda: tensors_in(layer(x.clone()))).groups()
    return linears_of(groups), refused


def test_a_norm_with_one_reader_is_a_group() -> None:
    assert tried(Layer("none"))[0] == {"norm": {"up"}}


@pytest.mark.parametrize("trap", ["extra matrix", "weight read and not called", "residual after the norm"])
def test_a_planted_second_reader_is_noticed(trap: str) -> None:
    groups, refused = tried(Layer(trap))
    assert "norm" not in groups
    assert refused["norm"] == "the layer's output depends on it"


class Gated(nn.Module):
    """act(gate) * up, as MLPs have it, in one projection or in two."""

    def __init__(self, act: Callable[[Tensor], Tensor], fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.fused = act, fused
        self.both = nn.Linear(64, 128) if fused else nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.down = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.both, nn.ModuleList):
            gate, up = (part(x) for part in self.both)
        else:
            gate, up = self.both(x).chunk(2, dim=-1)
        out: Tensor = self.down(self.act(gate) * up)
        return out


def test_gate_and_up_never_move_together() -> None:
    """relu(2 g) * 2 u is four times as much; either alone would do, both would not."""
    groups, _ = tried(Gated(torch.relu, fused=False))
    assert list(groups.values()) == [{"down"}]
    groups, _ = tried(Gated(torch.nn.functional.silu, fused=True))
    assert groups == {"both": {"down"}}


def test_relu_squared_is_no_place_for_scales() -> None:
    layer = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    assert tried(layer)[0] == {"0": {"2"}}

    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).square()

    layer[1] = Squared()
    groups, refused = tried(layer)
    assert groups == {}
    assert refused["0"] == "2 does not see it channel by channel"


def test_features_of_another_source_are_left_alone() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right, self.out = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(torch.cat([self.left(x), torch.sigmoid(self.right(x))], dim=-1))
            return out

    torch.manual_seed(1)
    x, layer = torch.randn(2, 9, 64), Beside()
    groups, _ = Prober(layer, lambda: tensors_in(layer(x.clone()))).groups()
    assert linears_of(groups) == {"left": {"out"}}
    assert groups[0].consumers[0].channels == (*range(32), *[OTHER] * 32)
