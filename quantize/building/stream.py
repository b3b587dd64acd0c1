"""Layers fed from files: the model stays on the meta device and its layers pass through memory in turn.

A little held-out text runs beside the calibration, through the layers as they were and as they become. At the end it
tells what the quantization costs, without ever holding the whole model in memory.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.building.inputs import layer_calls, layers_give_tuples, replace_layers, run_layer, spilled
from quantize.building.layer import BATCH_TOKENS, FromInputs, LayerResult, quantize_layer
from quantize.errors import UserError
from quantize.model.architecture import architecture_of
from quantize.model.names import parameters_by_file_name, put
from quantize.process_memory import trim_memory
from quantize.rounding.options import AwqOptions
from quantize.weights import TensorReader, check_finite

JUMP = 2.0
"""Perplexity ratio from which on a checkpoint is broken, not quantized."""


@dataclass(frozen=True)
class HeldOutResult:
    """What the held-out text showed, over `tokens` predicted tokens.

    perplexity_source: of the source.
    perplexity:        of the quantized model.
    divergence:        mean KL(source || quantized) in nats a token.
    tokens:            predicted ones.
    """

    perplexity_source: float
    perplexity: float
    divergence: float
    tokens: int

    def check(self) -> None:
        """Raise UserError when the quantized model has lost what the source knows."""
        ratio = self.perplexity / self.perplexity_source
        if not math.isfinite(ratio) or ratio > JUMP:
            raise UserError(
                f"the quantized model is broken: perplexity {self.perplexity:.4g} on held-out text, the source has "
                f"{self.perplexity_source:.4g}; use more --blocks or other --calibration text, or a bnb variant"
            )


@dataclass
class HeldOut:
    """Held-out text on its way through the layers.

    blocks: token ids, int64 [n, t], t as in the calibration.
    states: between two layers, of the source and of the quantized model; empty before the first layer.
    """

    blocks: Tensor
    states: list[Tensor]


class LayerStream:
    """Goes through the decoder layers of a model whose weights are in files, quantizing each.

    model:        the transformers model, its weights on the meta device but for the layer at work.
    architecture: where its layers are.
    """

    def __init__(self, model: Any, weights: TensorReader, device: torch.device) -> None:
        self._weights = weights
        self._device = device
        self.model = model
        self.architecture = architecture_of(self.model)
        self._layers_prefix = f"{self.architecture.layers_name}."
        self._file_names = self._find_file_names()
        self._in_tuples = False

    def quantized(
        self,
        blocks: Tensor,
        options: AwqOptions | None,
        *,
        start: int = 0,
        hidden: Sequence[Tensor] = (),
        before: Mapping[str, FromInputs] | None = None,
        held_out: HeldOut | None = None,
        spill: Path | None = None,
    ) -> Iterator[tuple[LayerResult, list[Tensor]]]:
        """Yield each decoder layer from `start` on, quantized, with the inputs of the layer after it.

        blocks:   calibration token ids, int64 [blocks, block_tokens].
        hidden:   the inputs of layer `start` as an earlier run yielded them, [batch, block_tokens, hidden] each; none,
                  and they are computed.
        before:   by variant, called with each layer before its scales move.
        held_out: text to run along, once `options` quantize something.
        spill:    a folder for files that hold the inputs in place of memory.

        A layer's weights are freed when the next one is asked for.
        """
        self._materialise_outer()
        self._in_tuples = layers_give_tuples(self.model, self.architecture, blocks[:1].to(self._device))
        sizes = {len(batch): batch for batch in (*batches_of(blocks), *([held_out.blocks] if held_out else []))}
        of_size = {size: [kwargs for _, kwargs in self._record(batch)] for size, batch in sizes.items()}
        calls = [{size: each[n] for size, each in of_size.items()} for n in range(len(self.architecture.layers))]
        inputs = hidden or (self._record(one)[0][0] for one in batches_of(blocks))
        if spill is None:
            hidden = [batch.to(self._device) for batch in inputs]
        else:
            spill.mkdir(parents=True, exist_ok=True)
            hidden = [spilled(batch, spill / f"{number:06d}.bin") for number, batch in enumerate(inputs)]
        if held_out is not None:
            states = held_out.states or [self._record(held_out.blocks)[0][0]] * 2
            held_out.states = [state.to(self._device) for state in states]
        for module in self.model.modules():  # their outputs are there; buffers that no file holds stay
            if isinstance(module, nn.Embedding):
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
        for index in range(start, len(calls)):
            layer, prefix = self.architecture.layers[index], f"{self._layers_prefix}{index}."
            self._fill(layer, prefix, recurse=True)
            if held_out is not None:  # through the layer as the source has it
                held_out.states[0] = next(run_layer(layer, held_out.states[:1], calls[index]))
            result = quantize_layer(self.architecture, index, hidden, calls[index], options, before)
            if held_out is not None:  # through the scaled layer with its quantized weights
                for name, linear in self.architecture.linears(index).items():
                    linear.weight.data = result.weights[prefix + name].dequantize().to(linear.weight.device)
                held_out.states[1] = next(run_layer(layer, held_out.states[1:], calls[index]))
            yield result, hidden
            layer.to("meta")
            trim_memory()

    @torch.no_grad()
    def judge(self, held_out: HeldOut) -> HeldOutResult:
        """Compare what source and quantized model predict, after the last layer."""
        self._materialise_outer()
        head = self.model.get_output_embeddings()
        names = {module: name for name, module in self.model.named_modules()}
        self._fill(head, f"{names[head]}.", recurse=False)
        self.model.tie_weights()

        def log_probabilities(ids: Tensor, last: Tensor) -> Tensor:
            """Of the next token at every position but the last, float32 [t - 1, vocabulary]."""
            with replace_layers(self.architecture, lambda *_: last[None], in_tuples=self._in_tuples):
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            return torch.log_softmax(logits.float(), dim=-1)

        losses, divergence, tokens = [0.0, 0.0], 0.0, 0
        for ids, *states in zip(held_out.blocks.to(self._device), *held_out.states, strict=True):
            exact, other = (log_probabilities(ids, last) for last in states)
            for row, predicted in enumerate((exact, other)):
                losses[row] -= float(predicted.gather(1, ids[1:, None]).double().sum())
            divergence += float((exact.exp() * (exact - other)).sum().double())
            tokens += len(ids) - 1
        source, quantized = (torch.tensor(losses, dtype=torch.float64) / tokens).exp().tolist()
        return HeldOutResult(source, quantized, divergence / tokens, tokens)

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor outside the decoder layers, one after the other, by its name in the model."""
        for name, file_name in self._file_names.items():
            if not name.startswith(self._layers_prefix):
                yield name, self._read(file_name)

    def _find_file_names(self) -> dict[str, str]:
        """Model name -> file name of every parameter and persistent buffer that has its own tensor.

        Raises UserError for one that files hold in several tensors (experts of a mixture).
        """
        files: dict[str, list[str]] = {}
        ties: dict[str, str] = self.model.all_tied_weights_keys
        for file_name, name in parameters_by_file_name(self.model, self._weights.names()).items():
            files.setdefault(name, []).append(file_name)
        for target, source in ties.items():
            if target in files:
                files.setdefault(source, files[target])
        for name, found in files.items():
            if len(found) > 1:
                raise UserError(f"AWQ cannot quantize {name}, which stands in {len(found)} tensors of the files")
        return {name: files[name][0] for name in self.model.state_dict() if name not in ties and name in files}

    def _record(self, blocks: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        return layer_calls(self.model, self.architecture, blocks.to(self._device), in_tuples=self._in_tuples)

    def _materialise_outer(self) -> None:
        """Load what the model runs before its layers: all but the layers and an untied output head."""
        head = self.model.get_output_embeddings()
        tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(self._layers_prefix) and (tied or module is not head):
                self._fill(module, f"{name}." if name else "", recurse=False)

    def _fill(self, module: nn.Module, prefix: str, *, recurse: bool) -> None:
        """Put the module on the device: its parameters as float32 copies of the file's tensors, its buffers moved."""
        for name, buffer in list(module.named_buffers(recurse=recurse, remove_duplicate=False)):
            put(module, name, buffer.to(self._device))
        for name, _ in list(module.named_parameters(recurse=recurse)):
            file_name = self._file_names.get(prefix + name)
            if file_name is not None:  # else tied to another parameter
                put(module, name, self._read(file_name).to(self._device, torch.float32))

    def _read(self, name: str) -> Tensor:
        tensor = self._weights.get(name)
        check_finite(name, tensor)
        return tensor


@contextlib.contextmanager
def tensor_core_products(device: torch.device) -> Iterator[None]:
    """Let CUDA multiply float32 matrices in TF32 inside the block: ten bits of mantissa choose the same scales."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def batches_of(blocks: Tensor) -> list[Tensor]:
    """Calibration blocks in batches of about BATCH_TOKENS tokens, as they go through a layer."""
    return list(torch.split(blocks, max(1, BATCH_TOKENS // blocks.shape[1])))
