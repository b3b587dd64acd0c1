"""Which scales may move where in a decoder layer, proven by trying: no map of architectures.

AWQ multiplies the input features of linear layers by scales and divides them out of the module before (arXiv
2306.00978). Here a module's output channels are multiplied by 1 or 2, exact in floating point, in the real layer on
real inputs. A matrix whose input changes by just these factors is a consumer, and gets its old input back, as dividing
its columns would give it. When the layer then gives the same as before, to the bit, nothing else has seen the channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.apart import Expert
from quantize.model.scales import OTHER, UNSEEN, Consumer, ScaleGroup, apply_scales, is_norm

ACTIVATIONS = ("mlp.act", "mlp.gelu_impl", "ffn.act")  # wrapped with scales that no weight absorbs, as by autoawq
WRAPPED_TYPES = ("bloom", "gpt_neox", "mpt", "gptj", "gpt_bigcode", "starcoder2")  # whose checkpoints have wrappers


class _Refused(Exception):  # noqa: N818 - it says what a try has shown
    """This source's channels cannot be scaled. width: of the input that shows it, 0 where none does."""

    def __init__(self, reason: str, width: int = 0) -> None:
        super().__init__(reason)
        self.width = width


@dataclass
class _Record:
    """What one module saw and gave, a list entry a call."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)


class Prober:
    """Tries sources of one decoder layer.

    layer: with its weights, in float32. run: runs it on recorded inputs, and gives all that leaves it: always the same.
    matrices: what it calls that may be a reader, by name: linear layers, and modules that may work like one (routers).
    """

    def __init__(self, layer: nn.Module, run: Callable[[], Sequence[Tensor]]) -> None:
        self._layer = layer
        self._run = run
        modules = layer.named_modules()
        self.matrices = {name: one for name, one in modules if getattr(one._parameters.get("weight"), "ndim", 0) == 2}
        self._seen: dict[str, _Record] = {}
        self._peers = _peers(layer)
        self._output = self._record()

    def groups(self, head_sizes: Sequence[int] = (), wrapped: bool = False) -> tuple[list[ScaleGroup], dict[str, str]]:
        """Every group that holds, in the order of the layer, and why the other sources have none.

        head_sizes: channels of an attention head, which tell what rows of a fused projection to try; wrapped: whether a
        checkpoint may hold the scales of activation functions. No two groups share a consumer."""
        groups: list[ScaleGroup] = []
        refused: dict[str, str] = {}
        taken: set[str] = set()
        modules = dict(self._layer.named_modules())
        norms = [[name] for name, module in modules.items() if is_norm(module)]
        acts = [[name] for name in modules if wrapped and name in ACTIVATIONS]
        for names in (*norms, *self._peers.values(), *acts):
            try:
                found = self._try(names, head_sizes)
            except _Refused as refusal:
                refused |= dict.fromkeys(names, str(refusal))
                continue
            for group in found:
                consumers = {consumer.name for consumer in group.consumers}
                if consumers & taken:
                    refused[group.source] = "another source's scales reach the same matrix"
                else:
                    groups.append(group)
                    taken |= consumers
        return groups, refused

    def _try(self, names: list[str], head_sizes: Sequence[int]) -> list[ScaleGroup]:
        """The groups of these sources, tried together: all channels, or rows of a fused projection."""
        total, first = sum(map(self._width, names)), self._layer.get_submodule(names[0])
        if total == 0:
            raise _Refused("it is not called, or gives more than a tensor")
        free = torch.ones(total, dtype=torch.bool)
        try:
            states = self._pass(names, free)
        except _Refused as refusal:
            if len(names) > 1 or type(first) is not nn.Linear or not total > refusal.width > 0:
                raise
            free, states = self._some_rows(names[0], refusal.width, head_sizes)
        fed = {name: state for name, state in states.items() if bool((state == 2).any())}
        if not fed:
            raise _Refused("no matrix reads it")
        codes = {name: torch.zeros(len(state), dtype=torch.int64) for name, state in fed.items()}
        numbers = torch.arange(total)
        for bit in range(max(1, (total - 1).bit_length())):
            states = self._pass(names, free & (numbers >> bit & 1).bool())
            for name in codes:
                codes[name] |= (states[name] == 2).long() << bit
        for name, state in fed.items():
            codes[name][state == 1] = OTHER
            codes[name][state == 0] = UNSEEN
        groups = [self._completed(group) for group in self._split(names, free, codes)]
        if is_norm(first):
            return [replace(group, one_plus=self._is_one_plus(group.source)) for group in groups]
        return groups

    def _is_one_plus(self, name: str) -> bool:
        """Whether a norm multiplies by 1 + weight, not by weight; told by trying."""
        module = self._layer.get_submodule(name)
        wanted = 2 * self._seen[name].outputs[0][0]
        given: list[Tensor] = []
        own = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]
        for one_plus in (False, True):
            given.clear()
            try:
                apply_scales(self._layer, ScaleGroup(name, (), (), one_plus), torch.tensor(0.5))
                with module.register_forward_hook(lambda module, args, output: given.append(output)):
                    self._run_once()
            finally:
                for parameter, data in own:
                    parameter.data = data
            if torch.allclose(given[0], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())):
                return one_plus
        raise _Refused("its weight is no factor of what it gives")

    def _split(self, names: list[str], free: Tensor, codes: dict[str, Tensor]) -> list[ScaleGroup]:
        """A group for each source of those that were tried together."""
        stop, groups = 0, []
        for name in names:
            start, stop = stop, stop + self._width(name)
            consumers = []
            own_free = free[start:stop].clone()
            for consumer, code in codes.items():
                inside = (code >= start) & (code < stop)
                if bool(inside.any()):
                    own = torch.where(inside, code - start, torch.where(code >= 0, OTHER, code))
                    consumers.append(Consumer(consumer, tuple(own.tolist())))
                    if bool((own == UNSEEN).any()):  # an unseen one may come from any channel that is not seen
                        own_free &= torch.isin(torch.arange(len(own_free)), own)
            if consumers:
                groups.append(ScaleGroup(name, tuple(own_free.tolist()), tuple(consumers)))
        return groups + self._uncalled(groups, [name for name in names if not self._width(name)])

    def _completed(self, group: ScaleGroup) -> ScaleGroup:
        """The group with the experts that saw no token: their layers read what their peers' read."""
        if any(group.source in peers for peers in self._peers.values() if len(peers) > 1):
            return group  # inside one expert
        found = {consumer.name: consumer.channels for consumer in group.consumers}
        for peers in self._peers.values():
            read = {found[name] for name in peers if name in found}
            if len(peers) == 1 or not read:
                continue
            if len(read) > 1 or any(name in self.matrices and name not in found for name in peers):
                raise _Refused("experts do not read it alike")
            found |= dict.fromkeys(peers, read.pop())
        return replace(group, consumers=tuple(Consumer(name, channels) for name, channels in found.items()))

    def _uncalled(self, groups: Sequence[ScaleGroup], names: Sequence[str]) -> list[ScaleGroup]:
        """The groups of experts that saw no token: those of their peers, which must all be alike."""
        if not names or not groups:
            return []
        first, home = groups[0], groups[0].source.rpartition(".")[0]
        (consumer, *more) = first.consumers
        channels = {(group.free, *(one.channels for one in group.consumers)) for group in groups}
        if more or not consumer.name.startswith(f"{home}.") or len(channels) > 1:
            return []
        readers = [name.rpartition(".")[0] + consumer.name.removeprefix(home) for name in names]
        own = [(Consumer(reader, consumer.channels),) for reader in readers]
        return [ScaleGroup(name, first.free, consumers) for name, consumers in zip(names, own, strict=True)]

    def _width(self, name: str) -> int:
        outputs = self._seen[name].outputs if name in self._seen else []
        return int(outputs[0][0].shape[-1]) if outputs and len(outputs[0]) == 1 else 0

    def _some_rows(self, name: str, target: int, head_sizes: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows of a fused projection that can be scaled while others cannot, and what `_pass` gives for them."""
        for rows in _row_choices(self._width(name), target, head_sizes):
            with suppress(_Refused):
                if states := self._pass([name], rows):
                    return rows, states
        raise _Refused("no part of its rows can be scaled by themselves")

    def _pass(self, names: list[str], doubled: Tensor) -> dict[str, Tensor]:
        """Run with these channels doubled: consumer -> int8 [in], 2 doubled, 1 as it was, 0 all zeros; or _Refused."""
        factors = torch.split(doubled.to(torch.float32) + 1, [self._width(name) for name in names])
        states: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, own in zip(names, factors, strict=True):
                module = self._layer.get_submodule(name)
                hooks.enter_context(module.register_forward_hook(partial(_scaled, own)))
            for name, module in self.matrices.items():
                if name not in names:
                    hook = partial(self._compare, name, count(), states)
                    hooks.enter_context(module.register_forward_pre_hook(hook))
                    if type(module) is nn.Linear:  # what it gave to the input that it gets back
                        given = iter(self._seen[name].outputs)
                        module.forward = lambda *args, given=given: next(given)[0].clone()  # type: ignore[method-assign]
                        hooks.callback(delattr, module, "forward")
            output = self._run_once()
        if not _same(output, self._output):
            raise _Refused("the layer's output depends on it")
        return states

    def _compare(
        self, name: str, calls: "count[int]", states: dict[str, Tensor], module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Whether a matrix sees its recorded input, doubled in whole channels; which it then gets back."""
        number, x, record = next(calls), args[0], self._seen[name]
        if number >= len(record.inputs) or record.inputs[number].shape != x.shape:
            raise _Refused(f"{name} is then called in another way")
        before = record.inputs[number]
        same, twice, zero = _channelwise(x == before), _channelwise(x == 2 * before), _channelwise(before == 0)
        if not bool((same | twice).all()):
            raise _Refused(f"{name} does not see it channel by channel", x.shape[-1])
        state = torch.where(zero & same, 0, torch.where(same, 1, 2)).to(torch.int8)
        plain = type(module) is nn.Linear or bool(same.all())
        if not plain and not self._divides(module, args, state, record.outputs[number]):
            raise _Refused(f"{name} is no plain product", x.shape[-1])
        state = state.cpu()
        earlier = states.get(name, state)
        if bool(((earlier != state) & (earlier != 0) & (state != 0)).any()):  # zeros tell nothing
            raise _Refused(f"{name} sees it in one call as it does not in another")
        states[name] = torch.maximum(earlier, state)
        return before, *args[1:]

    def _divides(self, module: Any, args: tuple[Any, ...], state: Tensor, recorded: list[Tensor]) -> bool:
        """Whether dividing this module's columns makes up for its input."""
        weight = module.weight.data
        if weight.shape[-1] != len(state):
            return False
        module.weight.data = weight / state.clamp(min=1).to(weight)
        try:
            with torch.no_grad():
                given = tensors_in(type(module).forward(module, *args))
        except (RuntimeError, TypeError):
            return False
        finally:
            module.weight.data = weight
        return _same(given, recorded)

    def _record(self) -> Sequence[Tensor]:
        """What every matrix and every source sees and gives, and what the layer gives."""

        def remember(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record = self._seen.setdefault(name, _Record())
            if args and isinstance(args[0], Tensor):
                record.inputs.append(args[0].clone())
            record.outputs.append([tensor.clone() for tensor in tensors_in(output)])

        with ExitStack() as hooks:
            for name, module in self._layer.named_modules():
                if name in self.matrices or is_norm(module) or name in ACTIVATIONS:
                    hooks.enter_context(module.register_forward_hook(partial(remember, name)))
            output = self._run_once()
        called = {name for name, record in self._seen.items() if record.inputs}
        self.matrices = {name: module for name, module in self.matrices.items() if name in called}
        return output

    def _run_once(self) -> Sequence[Tensor]:
        with torch.no_grad():
            return [tensor.clone() for tensor in self._run()]


def _scaled(factors: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output * factors.to(output) if len(factors) else output


def _peers(layer: nn.Module) -> dict[str, list[str]]:
    """The linear layers of a layer, experts' layers of one name together."""
    experts = {name for name, module in layer.named_modules() if isinstance(module, Expert)}
    found: dict[str, list[str]] = {}
    for name, module in layer.named_modules():
        parent, _, leaf = name.rpartition(".")
        if type(module) is nn.Linear:
            found.setdefault(f"{parent.rpartition('.')[0]}.*.{leaf}" if parent in experts else name, []).append(name)
    return found


def _channelwise(flags: Tensor) -> Tensor:
    return flags.reshape(-1, flags.shape[-1]).all(dim=0)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a nested output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in tensors_in(one)] if isinstance(value, list | tuple) else []


def _same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, two) for one, two in zip(left, right, strict=True))


def _row_choices(total: int, target: int, head_sizes: Sequence[int]) -> Iterator[Tensor]:
    """Rows of a fused projection to try: parts one after another, alternating rows, the last part of each head."""
    number = torch.arange(total)
    if total == 2 * target:
        yield from (number >= target, number < target, number % 2 == 1, number % 2 == 0)
    elif total % 3 == 0:
        yield number >= total // 3 * 2
    for size in dict.fromkeys(head_sizes):
        heads = target // size if size and target % size == 0 else 0
        for groups in (divisor for divisor in range(heads, 0, -1) if heads % divisor == 0):
            if total % groups == 0 and size < total // groups:
                yield number % (total // groups) >= total // groups - size
            if size * groups < total:
                yield number >= total - size * groups
