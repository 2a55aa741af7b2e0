"""The limit of a pass is its matrix products: as many, of the sizes, and with the memory of some buffers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdcore.bench import limit
from sdcore.bench.limit import Products
from sdcore.bench.models import size_of
from sdcore.prefix import cost_of_sizes


class CountProducts(TorchDispatchMode):
    """The multiplications of every `mm` and `addmm`, and how many there were of each."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            first, second = args[-2:]
            self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def products(student: int = 40, teacher: int = 60, rows: int = 24) -> Products:
    size = size_of("quick")
    return Products.of(
        size.config(vocab=size.step_vocab),
        student_tokens=student,
        teacher_tokens=teacher,
        rows=rows,
        dtype="fp32",
        device="cpu",
    )


@pytest.mark.parametrize("head_bytes", [1, 4 * 24 * 70, 1 << 28])
def test_the_products_that_are_made_are_those_that_are_counted(
    head_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, "HEAD_BYTES", head_bytes)
    made = products()
    with CountProducts() as counted:
        made()
    assert counted.flops == made.flops


def test_the_flops_are_those_of_the_cost_model_without_attention() -> None:
    size = size_of("quick")
    config = size.config(vocab=size.step_vocab)
    counted = cost_of_sizes(config, prompt_tokens=1, context_tokens=0, completion_tokens=1, completions=1)
    one = products(student=counted.student.tokens, teacher=0, rows=1)
    hidden, vocab = one.head
    body = one.flops - 2 * 4 * hidden * vocab
    attention = counted.student.flops - body
    assert 0 < attention < 0.2 * counted.student.flops


def test_a_second_call_allocates_nothing_large() -> None:
    made = products()
    made()
    before = {name: buffer.data_ptr() for name, buffer in made.buffers.items()}
    made()
    assert {name: buffer.data_ptr() for name, buffer in made.buffers.items()} == before
    assert all(bool(torch.isfinite(buffer).all()) for buffer in made.buffers.values())
