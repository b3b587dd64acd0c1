"""Layers fed from files: the model stays on the meta device and its layers pass through memory in turn."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.building.held_out import HeldOutCheck, HeldOutResult
from quantize.building.inputs import layer_calls, spilled
from quantize.building.layer import BATCH_TOKENS, FromInputs, LayerResult, quantize_layer
from quantize.errors import UserError
from quantize.model.architecture import architecture_of
from quantize.model.names import parameters_by_file_name, put
from quantize.process_memory import trim_memory
from quantize.rounding.options import AwqOptions
from quantize.source import TensorReader, check_finite


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

    def quantized(
        self,
        blocks: Tensor,
        options: AwqOptions | None,
        *,
        start: int = 0,
        hidden: Sequence[Tensor] = (),
        before: Mapping[str, FromInputs] | None = None,
        held_out: HeldOutCheck | None = None,
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
        calls = [kwargs for _, kwargs in self._record(blocks[:1])]  # a batch of one broadcasts over larger ones
        inputs = hidden or (self._record(one)[0][0] for one in batches_of(blocks))
        if spill is None:
            hidden = [batch.to(self._device) for batch in inputs]
        else:
            spill.mkdir(parents=True, exist_ok=True)
            hidden = [spilled(batch, spill / f"{number:06d}.bin") for number, batch in enumerate(inputs)]
        if held_out is not None:
            held_out.begin(lambda ids: self._record(ids)[0][0], self._device)
        self._drop_embeddings()
        for index in range(start, len(calls)):
            layer, prefix = self.architecture.layers[index], f"{self._layers_prefix}{index}."
            self._fill(layer, prefix, recurse=True)
            if held_out is not None:
                held_out.before(layer, calls[index])
            result = quantize_layer(self.architecture, index, hidden, calls[index], options, before)
            if held_out is not None:
                held_out.after(self.architecture.linears(index), prefix, calls[index], layer, result)
            yield result, hidden
            layer.to("meta")
            trim_memory()

    def judge(self, held_out: HeldOutCheck) -> HeldOutResult:
        """What the held-out text shows after the last layer."""
        self._materialise_outer()
        head = self.model.get_output_embeddings()
        names = {module: name for name, module in self.model.named_modules()}
        self._fill(head, f"{names[head]}.", recurse=False)
        self.model.tie_weights()
        return held_out.judge(self.model, self.architecture)

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
        return layer_calls(self.model, self.architecture, blocks.to(self._device))

    def _materialise_outer(self) -> None:
        """Load what the model runs before its layers: all but the layers and an untied output head."""
        head = self.model.get_output_embeddings()
        tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(self._layers_prefix) and (tied or module is not head):
                self._fill(module, f"{name}." if name else "", recurse=False)

    def _drop_embeddings(self) -> None:
        """Free the embeddings' weights once their outputs are there; buffers that no file holds stay."""
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)

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
