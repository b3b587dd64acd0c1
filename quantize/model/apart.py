"""Matrices that a transformers model keeps in other forms, stacked experts above all, taken apart into nn.Linear.

A checkpoint holds one 4-bit weight a linear layer, as the hub's have it (`...mlp.experts.0.gate_proj.qweight`), so the
empty model gets the same layers before it is quantized and before it is loaded. What the model computes stays the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Cut = Callable[[Tensor], Tensor]  # a parameter as transformers keeps it -> the part that one linear layer has
AS_IS: Cut = nn.Identity()
LIKE_LINEAR: dict[str, Cut] = {"Conv1D": Tensor.t, "FalconLinear": AS_IS}  # class -> its weight as nn.Linear has it


@dataclass(frozen=True)
class Part:
    """Where a parameter of the model taken apart comes from: the parameter of the model as transformers has it."""

    parameter: str
    cut: Cut


@dataclass(frozen=True)
class StackedForm:
    """How a module stacks its experts' matrices, in the terms of transformers.integrations.moe.

    has_gate:        `gate_up_proj` holds two matrices, else `up_proj` one.
    is_concatenated: gate above up, else their rows alternate.
    is_transposed:   [experts, in, out], else [experts, out, in].
    has_bias:        `..._bias` [experts, out] beside each.
    by_block:        called with every expert's input one above the other, and with no choice of experts.
    has_identity:    numbers beyond those of the experts stand for one that gives back its input."""

    has_gate: bool = True
    is_concatenated: bool = True
    is_transposed: bool = False
    has_bias: bool = False
    by_block: bool = False
    has_identity: bool = False

    @property
    def first(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def cut(self, number: int, layer: str, leaf: str, stack: Tensor) -> Tensor:
        """One expert's matrix [out, in] or bias [out] out of a stack."""
        own = stack[number].t() if leaf == "weight" and self.is_transposed else stack[number]
        if layer == "down_proj" or not self.has_gate:
            return own
        place = int(layer != "gate_proj")
        return own.chunk(2)[place] if self.is_concatenated else own[place::2]


UNDECORATED = {  # classes that do not say their own form
    "Llama4TextExperts": StackedForm(is_transposed=True, by_block=True),
    "LongcatFlashExperts": StackedForm(has_identity=True),
}


def stacked_form(module: nn.Module) -> StackedForm | None:
    """The form of a module that stacks experts, None for any other."""
    form = UNDECORATED.get(type(module).__name__)
    if form is None and hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):
        own = ("has_gate", "is_concatenated", "is_transposed", "has_bias")
        form = StackedForm(**{key: bool(getattr(module, key)) for key in own})
    if form is None:
        return None
    stacks = [module._parameters.get(name) for name in (form.first, "down_proj")]
    return form if all(stack is not None and stack.dim() == 3 for stack in stacks) else None


class Expert(nn.Module):
    """One expert: linear layers `gate_proj` (where it has one), `up_proj`, `down_proj`.

    forward(x [n, hidden], gate) -> [n, hidden]; gate: gate and up outputs, as the stack has them -> down_proj's input.
    """

    def __init__(self, form: StackedForm, sizes: tuple[int, int, int], empty: Callable[..., nn.Linear]) -> None:
        super().__init__()
        hidden, inner, out = sizes
        if form.has_gate:
            self.gate_proj = empty(hidden, inner, bias=form.has_bias)
        self.up_proj = empty(hidden, inner, bias=form.has_bias)
        self.down_proj = empty(inner, out, bias=form.has_bias)
        self._form = form

    def forward(self, x: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        up = self.up_proj(x)
        if self._form.has_gate:
            both = [self.gate_proj(x), up]
            up = torch.cat(both, dim=-1) if self._form.is_concatenated else torch.stack(both, dim=-1).flatten(-2)
        out: Tensor = self.down_proj(gate(up))
        return out


def experts_of(module: nn.Module) -> list[Expert]:
    """The experts of a module that was taken apart, in order; none for any other."""
    return [child for child in module.children() if isinstance(child, Expert)]


def _forward_chosen(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' stacked experts give: each token's experts' outputs, weighted, added up."""
    out = torch.zeros_like(hidden_states)
    for number, expert in enumerate(experts_of(self)):
        tokens, places = torch.where(top_k_index == number)
        if len(tokens):
            made = expert(hidden_states[tokens], self._gate)
            if getattr(self, "has_post_expert_norm", False):
                made = self.post_expert_norm(made)
            out.index_add_(0, tokens, (made * top_k_weights[tokens, places, None]).to(out.dtype))
    if self._has_identity:
        kept = torch.where(top_k_index >= len(experts_of(self)), top_k_weights, 0).sum(dim=-1, keepdim=True)
        out += (hidden_states * kept).to(out.dtype)
    return out


def _forward_blocks(self: Any, hidden_states: Tensor) -> Tensor:
    """Every expert's own block of rows; rows of zeros were not chosen and give zeros."""
    experts = experts_of(self)
    blocks = hidden_states.view(len(experts), -1, hidden_states.shape[-1])
    out = torch.zeros_like(blocks)
    for expert, block, made in zip(experts, blocks, out, strict=True):
        chosen = block.any(dim=-1)
        if bool(chosen.any()):
            made[chosen] = expert(block[chosen], self._gate).to(made.dtype)
    return out.view(-1, hidden_states.shape[-1])


def take_apart(model: nn.Module) -> dict[str, Part]:
    """Take the matrices of a model on the meta device apart, in place; returns where the new parameters come from."""
    parts: dict[str, Part] = {}
    for name, module in list(model.named_modules()):
        if (form := stacked_form(module)) is not None:
            parts |= _experts_apart(f"{name}." if name else "", module, form)
        elif (cut := LIKE_LINEAR.get(type(module).__name__)) is not None:
            held = dict(module.named_parameters(recurse=False))
            rows, columns = cut(held["weight"]).shape
            how: dict[str, Any] = {"bias": "bias" in held, "device": "meta", "dtype": held["weight"].dtype}
            model.set_submodule(name, nn.Linear(columns, rows, **how))
            parts |= {f"{name}.{leaf}": Part(f"{name}.{leaf}", cut if leaf == "weight" else AS_IS) for leaf in held}
    return parts


def _experts_apart(prefix: str, module: Any, form: StackedForm) -> dict[str, Part]:
    stacks = {key: p for key, p in module.named_parameters(recurse=False) if key.endswith(("_proj", "_proj_bias"))}
    inner, hidden = form.cut(0, "up_proj", "weight", stacks[form.first]).shape
    out = len(form.cut(0, "down_proj", "weight", stacks["down_proj"]))
    empty = partial(nn.Linear, device="meta", dtype=stacks[form.first].dtype)
    for key in stacks:
        del module._parameters[key]
    parts = {}
    for number in range(len(stacks["down_proj"])):
        expert = Expert(form, (hidden, inner, out), empty)
        module.add_module(str(number), expert)
        for key, _ in expert.named_parameters():
            layer, _, leaf = key.rpartition(".")
            stack = layer if layer == "down_proj" else form.first
            stack += "_bias" if leaf == "bias" else ""
            parts[f"{prefix}{number}.{key}"] = Part(prefix + stack, partial(form.cut, number, layer, leaf))
    default = lambda both: module.act_fn(both.chunk(2, dim=-1)[0]) * both.chunk(2, dim=-1)[1]  # noqa: E731
    module._gate = getattr(module, "_apply_gate", default) if form.has_gate else module.act_fn
    module._has_identity = form.has_identity
    module.forward = MethodType(_forward_blocks if form.by_block else _forward_chosen, module)
    return parts
