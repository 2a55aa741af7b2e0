"""Matrix products of a call, each counted where it is done and where a head is asked for it.

    with counted_products() as products:
        linear_divergence(...).loss.backward()
    assert products.flops == 4 * 2 * N * V * H

`LiveBytes` sees every product that goes through one of torch's operators, also in backward and inside a custom
operator, where torch's own `FlopCounterMode` sees none. It cannot see one that goes past the dispatcher. So the methods
of `tile.head.Head`, through which all products with a head go, are watched too: a call in which fewer FLOPs were
seen than it was asked for is counted by what it was asked for, and listed in `opaque`.

For a new kind of product: if it is an operator, tell `sdkernels.live_bytes` (FIRST_FACTOR), and it is seen; if it is no
operator, nothing need be done; if `Head` gets another method that multiplies, it belongs into ASKED below.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sdkernels import linear_divergence
from sdkernels.live_bytes import LiveBytes
from sdkernels.testing import make_inputs
from sdkernels.tile.head import Head
from sdkernels.tile.native_backend.products import NativeHead


@dataclass
class Products:
    """What was counted, in FLOPs: a multiplication and an addition each."""

    probe: LiveBytes
    asked: int = 0  # of all heads
    unseen: int = 0  # that part of it which no operator showed
    opaque: Counter[str] = field(default_factory=Counter)  # methods of Head in which that was so, and how often
    calls: Counter[str] = field(default_factory=Counter)  # of all of them

    @property
    def seen(self) -> int:
        return sum(2 * product.m * product.k * product.n for product in self.probe.matmuls)

    @property
    def flops(self) -> int:
        return self.seen + self.unseen


def _of_projections(head: Head, sides: list[Tensor], *_: Any) -> int:
    return sum(2 * side.numel() for side in sides) * head.weight.shape[0]


def _of_hidden_gradient(head: Head, gradient: Tensor, *_: Any) -> int:
    return 2 * gradient.numel() * head.weight.shape[1]


def _of_weight_gradient(head: Head, gradient: Tensor, hidden: Tensor, *_: Any) -> int:
    return 2 * gradient.numel() * hidden.shape[1]


ASKED: dict[str, Callable[..., int]] = {
    "project": _of_projections,
    "hidden_gradient": _of_hidden_gradient,
    "weight_gradient": _of_weight_gradient,
}


@contextmanager
def counted_products() -> Iterator[Products]:
    _try_out_the_machine()
    with ExitStack() as stack:
        products = Products(stack.enter_context(LiveBytes()))
        for head, name in itertools.product((Head, NativeHead), ASKED):
            stack.enter_context(mock.patch.object(head, name, _watched(head, name, products)))
        yield products


@cache
def _try_out_the_machine() -> None:
    """The first call in a process may multiply to find out what this machine can do."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(2, 2, 2, dtype=dtype)
        linear_divergence(*inputs[:3]).loss.backward()


def _watched(kind: type[Head], name: str, products: Products) -> Callable[..., None]:
    method = getattr(kind, name)

    def call(head: Head, *args: Any) -> None:
        before, asked = products.seen, ASKED[name](head, *args)
        method(head, *args)
        missing = asked - (products.seen - before)
        products.asked += asked
        products.calls[name] += 1
        if missing > 0:
            products.unseen += missing
            products.opaque[name] += 1

    return call
