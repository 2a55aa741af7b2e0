"""Liger's fused loss is asked for by the name of its inner kernel, so a row is what it says it is."""

from __future__ import annotations

import pytest

from sdcore.bench import peers
from sdcore.bench.peers import LIGER_CUTE, LIGER_CUTE_KERNEL, LIGER_TRITON, LIGER_TRITON_KERNEL, Contender, Unavailable
from sdcore.bench.plot import COLOURS, MARKERS
from sdcore.bench.shapes import JSD, QUICK_SHAPE, TOP_K, Divergence, make_case_inputs


def test_the_kernels_that_are_asked_for_are_there_in_the_installed_liger() -> None:
    dispatch = pytest.importorskip("liger_kernel.backends.dispatch")
    import liger_kernel.functional  # noqa: F401  # says where the implementations are

    for operation in ("fused_linear_jsd", "jsd_loss_and_grad"):
        found = set(dispatch.all_impls(operation))
        assert LIGER_TRITON_KERNEL in found
    # Its inner kernel is registered where CUTLASS can be imported only.
    assert LIGER_CUTE_KERNEL in dispatch.all_impls("fused_linear_jsd")


@pytest.mark.parametrize("contender", [LIGER_TRITON, LIGER_CUTE], ids=lambda one: one.name)
@pytest.mark.parametrize(("divergence", "reason"), [(JSD, "needs a GPU"), (TOP_K, "no top-k")], ids=str)
def test_without_a_gpu_the_rows_say_so(contender: Contender, divergence: Divergence, reason: str) -> None:
    pytest.importorskip("liger_kernel")
    with pytest.raises(Unavailable, match=reason):
        peers.prepare(contender, make_case_inputs(QUICK_SHAPE, "fp32", noise=1.0), divergence)


def test_every_contender_has_a_colour_and_a_marker() -> None:
    for contender in peers.CONTENDERS:
        assert contender.name in COLOURS
        assert contender.name in MARKERS
