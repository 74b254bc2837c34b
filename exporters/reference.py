# SPDX-License-Identifier: Apache-2.0
"""The PyTorch original, called with numpy arrays."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ..contracts.errors import InputError
from .blame import place, quiet
from .exported import Arrays


class TorchReference:
    """PyTorch eager, in inference mode.

    Args:
        module: Returns a tensor, a tuple of tensors or a mapping; takes the inputs in the order of `input_names`.
        input_names: Names under which `run` finds the inputs.
        output_names: Names that `run` gives the outputs.
        name: The variant's name in tables.
    """

    def __init__(
        self, module: torch.nn.Module, input_names: Sequence[str], output_names: Sequence[str], *, name: str
    ) -> None:
        self.module, self.name = module.eval(), name
        self.input_names, self.output_names = tuple(input_names), tuple(output_names)
        self.device = "cpu"
        self.bfloat16 = False
        self._writes: bool | None = (
            None  # whether the module changes its inputs in place; unknown before the first call
        )

    @torch.inference_mode()
    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs as numpy arrays; bfloat16 comes back as float32."""
        outputs = [t.float() if t.dtype == torch.bfloat16 else t for t in self.call(feeds)]
        return dict(zip(self.output_names, (t.cpu().numpy() for t in outputs), strict=True))

    def call(self, feeds: Arrays) -> list[torch.Tensor]:
        """Return the output tensors where they are, without waiting for the device.

        Raises:
            InputError: The module's own code refuses these inputs.
        """
        tensors = [self._tensor(feeds[name]) for name in self.input_names]
        kept = tensors if self._writes is False else [tensor.clone() for tensor in tensors]
        try:
            outputs = flat_outputs(self.module(*kept))
        except Exception as error:  # the user's own code
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in zip(self.input_names, tensors, strict=True))
            first = (str(error).splitlines() or [""])[0][:200]
            raise InputError(
                f"the original fails on {shapes}: {type(error).__name__}: {first}{place(error)}",
                next_step="Give axes that must be equal one name in dynamic_axes, and leave out what is fixed.",
            ) from error
        if self._writes is None:
            self._writes = any(not _same(before, after) for before, after in zip(tensors, kept, strict=True))
        return outputs

    def in_bfloat16(self) -> TorchReference:
        """A copy with weights and float inputs in bfloat16: the peer that people forget."""
        with quiet():  # torch warns about the gradients of a script's weights, which have none
            twin = TorchReference(copy.deepcopy(self.module), self.input_names, self.output_names, name="pytorch-bf16")
            return twin.to(self.device).cast_to_bfloat16()

    def cast_to_bfloat16(self) -> TorchReference:
        """Turn the weights and, from now on, float inputs into bfloat16."""
        self.module.to(torch.bfloat16)
        self.bfloat16 = True
        return self

    def to(self, device: str) -> TorchReference:
        """Move the module and, from now on, its inputs; outputs are copied back to the CPU, which waits for them."""
        self.module.to(device)
        self.device = device
        return self

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.asarray(array, order="C")).to(self.device)
        return tensor.to(torch.bfloat16) if self.bfloat16 and tensor.is_floating_point() else tensor


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def named_outputs(result: object, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a module's result with their names: `output`, `output_1_0`, `logits`, `states_0`.

    Raises:
        TypeError: It holds something that is neither a tensor nor a container of tensors.
    """
    if isinstance(result, torch.Tensor):
        yield name, result
    elif isinstance(result, Mapping):  # transformers' ModelOutput too
        for key, value in result.items():
            yield from named_outputs(value, _readable(str(key)) or name)
    elif isinstance(result, tuple | list):
        for number, value in enumerate(result):
            yield from named_outputs(value, f"{name}_{number}" if len(result) > 1 else name)
    elif result is not None:  # what an option turned off
        raise TypeError(f"the module returns {type(result).__name__}, not tensors")


def _readable(name: str) -> str:
    """A name without line ends and what else cannot be printed."""
    return "".join(letter if letter.isprintable() else "_" for letter in name).strip()


def flat_outputs(result: object) -> list[torch.Tensor]:
    """The tensors of a module's result, in order; TypeError when there are none."""
    tensors = [tensor for _, tensor in named_outputs(result)]
    if not tensors:
        raise TypeError("the module returns no tensors")
    return tensors


def bfloat16_is_native() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, so that timing it says something."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(torch.backends.mkldnn.is_available())
