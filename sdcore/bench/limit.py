"""Makes the limit of a whole pass or step: its matrix products alone, timed in the same run as the rows they limit.

    products = Products.of(config, student_tokens=1536, teacher_tokens=1792, rows=512, dtype="fp32", device="cpu")
    products()          # every linear layer: a forward and two gradients of the student, a forward of the teacher

They go into buffers that are there before. What differs from the pass: no attention, no norms, no loss between the
products, so no implementation can be expected to reach it. Not covered: the experts of a mixture (the limit is then
lower still).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .shapes import DTYPES, MIB

SHARED, NAIVE = "matmuls alone, shared", "matmuls alone, naive"
LIMITS = (SHARED, NAIVE)
# Columns of the output layer at a time: whole logits would be the largest tensor of the run.
HEAD_BYTES = 256 * MIB


@dataclass(frozen=True, eq=False)
class Products:
    """Makes the products once when it is called. `layers` counts the linear layers of each (inputs, outputs)."""

    layers: tuple[tuple[tuple[int, int], int], ...]
    head: tuple[int, int]  # (H, V)
    student_tokens: int  # 0: no pass of the student
    teacher_tokens: int
    rows: int  # N; 0: no output layer
    dtype: torch.dtype
    device: torch.device
    buffers: dict[str, Tensor] = field(default_factory=dict)  # made in the first call

    @classmethod
    def of(
        cls, config: Any, *, student_tokens: int, teacher_tokens: int, rows: int, dtype: str, device: str | torch.device
    ) -> Products:
        """Reads the layers off a transformers' configuration, whose model is made on the meta device."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        counted = Counter((layer.in_features, layer.out_features) for layer in linear)
        return cls(
            tuple(sorted(counted.items())),
            (head.in_features, head.out_features),
            student_tokens,
            teacher_tokens,
            rows,
            DTYPES[dtype],
            torch.device(device),
        )

    @property
    def flops(self) -> int:
        """Counts the FLOPs of one call, a multiplication and an addition each."""
        body = sum(count * inputs * outputs for (inputs, outputs), count in self.layers)
        hidden, vocab = self.head
        return 2 * (body * (3 * self.student_tokens + self.teacher_tokens) + 4 * self.rows * hidden * vocab)

    def __call__(self) -> None:
        for (inputs, outputs), count in self.layers:
            for _ in range(count):
                if self.student_tokens:
                    self._layer(inputs, outputs, self.student_tokens, gradients=True)
                if self.teacher_tokens:
                    self._layer(inputs, outputs, self.teacher_tokens, gradients=False)
        if self.rows:
            self._output_layer()

    def _layer(self, inputs: int, outputs: int, tokens: int, *, gradients: bool) -> None:
        states, weight = self._buffer("states", tokens, inputs), self._buffer("weight", outputs, inputs)
        out = self._buffer("out", tokens, outputs)
        torch.mm(states, weight.T, out=out)
        if gradients:
            torch.mm(out, weight, out=self._buffer("gradient of states", tokens, inputs))
            torch.mm(out.T, states, out=self._buffer("gradient of weight", outputs, inputs))

    def _output_layer(self) -> None:
        """Makes student's and teacher's projection and the two gradients, some columns at a time."""
        hidden, vocab = self.head
        columns = max(1, min(vocab, HEAD_BYTES // (self.rows * self.dtype.itemsize)))
        states = self._buffer("states", self.rows, hidden)
        gradient = self._buffer("gradient of states", self.rows, hidden)
        for start in range(0, vocab, columns):
            width = min(columns, vocab - start)
            weight, logits = self._buffer("weight", width, hidden), self._buffer("out", self.rows, width)
            torch.mm(states, weight.T, out=logits)
            torch.mm(states, weight.T, out=logits)
            torch.addmm(gradient, logits, weight, out=gradient, beta=float(start > 0))
            torch.mm(logits.T, states, out=self._buffer("gradient of weight", width, hidden))

    def _buffer(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            # Not zeros, which are less work for a GPU's power limit, nor what memory held, which may be denormal.
            self.buffers[name] = torch.randn(size, dtype=self.dtype, device=self.device)
        return self.buffers[name][:size].view(shape)
