"""The two backends that a CPU has, of which the compiled one hides the other; and a GPU's products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sdkernels.driver import backends
from sdkernels.tile import head, native_backend


@pytest.fixture(scope="module", params=["torch", "native"])
def each_cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with either; is its name."""
    if request.param == "native" and not native_backend.is_available():
        pytest.skip("this machine has no C compiler")
    # Not by another fixture, which would stay until the end of the module, for the other backend too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_can_compile", lambda: request.param == "native")
        yield request.param


@pytest.fixture
def mixed_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does as a GPU: products of 16-bit factors, summed in float32."""
    mm, addmm = torch.mm, torch.addmm

    def mixed_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor) -> Tensor:
        if out_dtype is None:
            assert a.dtype == b.dtype
            assert a.element_size() > 2
            return mm(a, b, out=out)
        assert a.element_size() == b.element_size() == 2
        return mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def mixed_addmm(
        c: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, beta: float, alpha: float, out: Tensor
    ) -> Tensor:
        assert a.element_size() == b.element_size() == 2
        return addmm(c, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha, out=out)

    monkeypatch.setattr(torch, "mm", mixed_mm)
    monkeypatch.setattr(torch, "addmm", mixed_addmm)
    monkeypatch.setattr(head, "has_mixed_products", lambda weight: weight.element_size() == 2)
