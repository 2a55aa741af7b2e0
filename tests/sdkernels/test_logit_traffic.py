"""How often the backends pass over the logits, counted: an added pass is seen, and has to be meant.

A pass is 4 bytes read or written per row and entry of the vocabulary. An element-wise operator that reads one float32
block and writes another is two, one in place is two, a sum is one, and in float64 each is double. Matrix products,
views and what touches a few entries of a row are none. Counted by a dispatch mode, so that no clock is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkernels import LogitTransform, linear_divergence, linear_logprobs, linear_topk, logit_divergence
from sdkernels.live_bytes import FIRST_FACTOR, LiveBytes
from sdkernels.testing import make_arguments, make_inputs, run_operation
from sdkernels.tile import elementwise
from sdkernels.types import Objective, TileRows

N, H, V = 24, 16, 503  # two chunks of one block each, and no other tensor with V columns

# Operators that touch K entries of a row, or none.
FEW_ENTRIES = {"gather", "scatter_", "scatter_add_", "empty", "new_empty", "empty_like", "empty_strided"}
WRITES_ONLY = {"copy_", "zero_", "fill_"}


class LogitTraffic(LiveBytes):
    """Adds up the bytes that operators read and write in blocks of logits, (rows, V) in any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = len(self.matmuls)
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        is_product = name.removesuffix("_") in FIRST_FACTOR and len(self.matmuls) > before
        if func.namespace == "aten" and not (is_product or func.is_view or name in FEW_ENTRIES):
            self.bytes += _moved(func, name, args, kwargs, result)
        return result


def _moved(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    for place, argument in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in given if isinstance(given, list | tuple) else (given,):
            if not isinstance(tensor, Tensor):
                continue
            if is_changed:
                written[id(tensor)] = tensor
            if not (argument.is_out or (is_changed and name in WRITES_ONLY)):
                read[id(tensor)] = tensor
    for tensor in result if isinstance(result, list | tuple) else (result,):
        if isinstance(tensor, Tensor):
            written[id(tensor)] = tensor
    blocks = [t for t in (*read.values(), *written.values()) if t.dim() == 2 and t.shape[1] == V]
    return sum(tensor.numel() * tensor.element_size() for tensor in blocks)


def passes(run: Callable[[], Any], rows: int = N) -> Fraction:
    with LogitTraffic() as traffic:
        run()
    return Fraction(traffic.bytes, 4 * rows * V)


def divergence(objective: str, *, noise: float = 1.0, trained: bool = True, **changes: Any) -> Callable[[], Any]:
    inputs = make_inputs(N, H, V, noise=noise, requires_grad=trained)
    arguments = make_arguments(inputs, objective, **{"token_weights": None, "backend": "torch"} | changes)
    return lambda: run_operation(linear_divergence, **arguments)


def log_probabilities(*, trained: bool) -> Callable[[], Any]:
    inputs = make_inputs(N, H, V, requires_grad=trained)

    def run() -> None:
        output = linear_logprobs(inputs.student_hidden, inputs.student_weight, inputs.target_ids, backend="torch")
        if trained:
            (output.logprobs.sum() + output.entropy.sum()).backward()

    return run


def most_likely() -> Callable[[], Any]:
    inputs = make_inputs(N, H, V)
    return lambda: linear_topk(inputs.student_hidden, inputs.student_weight, 7, backend="torch")


def of_logits(alpha: float) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, V, generator=draw).mul_(3) for _ in range(2))
    return lambda: logit_divergence(student.requires_grad_(), teacher, alpha=alpha, backend="torch").loss.backward()


# What is measured, with one head for both sides, and the passes that it takes. The sides' logits differ by more than 4
# somewhere; "close": nowhere; "near": and the loss is below 1e-2, which is summed again in float64.
PASSES: dict[str, tuple[Callable[[], Callable[[], Any]], float]] = {
    "forward KL": (lambda: divergence("forward KL"), 41),
    "forward KL, close": (lambda: divergence("forward KL", noise=0.2), 46),
    "forward KL, near": (lambda: divergence("forward KL", noise=1e-3), 74),
    "forward KL, two heads": (lambda: divergence("forward KL", teacher_weight=torch.randn(V, H)), 37),
    "reverse KL": (lambda: divergence("reverse KL"), 40),
    "reverse KL, close": (lambda: divergence("reverse KL", noise=0.2), 45),
    "reverse KL, near": (lambda: divergence("reverse KL", noise=1e-3), 69),
    "JSD": (lambda: divergence("JSD"), 54),
    "JSD, near": (lambda: divergence("JSD", noise=0.1), 103),
    "JSD, soft-cap": (lambda: divergence("JSD", student_head=LogitTransform(softcap=5.0)), 85),
    "JSD, temperature": (lambda: divergence("JSD", temperature=2.0), 60),
    "JSD, values alone": (lambda: divergence("JSD", trained=False), 54),
    "JSD, a frozen head": (lambda: divergence("JSD", student_weight=frozen_weight()), 54),
    "forward KL, entry clip": (lambda: divergence("forward KL, entry clip"), 116.75),
    "reverse KL, entry clip": (lambda: divergence("reverse KL, entry clip"), 118.75),
    "JSD, entry clip": (lambda: divergence("JSD, entry clip"), 152.75),
    "reverse KL, student top-k": (lambda: divergence("reverse KL, student top-k"), 30),
    "JSD, teacher top-k": (lambda: divergence("JSD, teacher top-k"), 30),
    "reverse KL, teacher top-k without tail": (lambda: divergence("reverse KL, teacher top-k without tail"), 27),
    "JSD, cached teacher": (lambda: divergence("JSD, cached teacher"), 12),
    "sampled": (lambda: divergence("sampled"), 27),
    "trust region": (lambda: divergence("trust region"), 53),
    "log-probabilities": (lambda: log_probabilities(trained=False), 9),
    "log-probabilities and their gradients": (lambda: log_probabilities(trained=True), 27),
    "most likely ids": (most_likely, 4),
    "JSD of logits": (lambda: of_logits(0.5), 120),
}


def frozen_weight() -> Tensor:
    return make_inputs(N, H, V).student_weight.detach()


@pytest.mark.parametrize("case", PASSES)
def test_passes_over_the_logits_are_no_more_and_no_fewer(case: str) -> None:
    make, expected = PASSES[case]
    found = passes(make())
    assert found == expected, (
        f"{case}: {float(found):g} passes over the logits, {expected:g} were agreed on. If the change is meant, show "
        "in the commit what it costs or saves in time (sdcore bench, before and after, one machine) and write the new "
        "number into PASSES. If it is not: an operator was added in torch_backend.py, elementwise.py, topk.py or "
        "chunks.py, or widens or copies a block"
    )


BLOCK = torch.ones(N, V)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: BLOCK.exp(), 2),
        (lambda: BLOCK.clone().exp_(), 4),
        (lambda: torch.mul(BLOCK, BLOCK, out=torch.empty(N, V)), 2),  # one block read, though twice
        (lambda: torch.add(BLOCK, BLOCK[:, :1]), 2),
        (lambda: BLOCK[: N // 2].sum(-1), 0.5),
        (lambda: BLOCK.double(), 3),
        (lambda: BLOCK.bfloat16(), 1.5),
        (lambda: torch.empty(N, V).copy_(BLOCK), 2),
        (lambda: torch.empty(N, V).zero_(), 1),
        (lambda: BLOCK.gather(1, torch.zeros(N, 3, dtype=torch.int64)), 0),
        (lambda: BLOCK @ torch.ones(V, 3), 0),
        (lambda: BLOCK.softmax(-1), 2),
        (lambda: torch.inference_mode()(BLOCK.reshape)(-1).view(N, V), 0),
    ],
)
def test_an_operator_counts_what_it_reads_and_writes(run: Callable[[], Any], expected: float) -> None:
    assert passes(run) == expected


def test_an_added_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = elementwise.transform_

    def with_another(z: Tensor, *rest: Any) -> None:
        transform(z, *rest)
        z.clamp_(max=1e30)

    monkeypatch.setattr(elementwise, "transform_", with_another)
    with pytest.raises(AssertionError, match="JSD: 56 passes over the logits, 54 were agreed on"):
        test_passes_over_the_logits_are_no_more_and_no_fewer("JSD")


class Launches:
    """Stands for a Triton kernel: notes what it is called with, and does nothing."""

    def __init__(self, kernel: Any, noted: list[tuple[str, dict[str, Any]]]) -> None:
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.noted.append((self.kernel.__name__, dict(zip(self.kernel.arg_names, args, strict=False)) | options))

        return launch


def bytes_per_entry(kernel: str, arguments: dict[str, Any]) -> int:
    """Bytes read and written per entry of (N, V). The candidates of a top-k are a few entries of each row."""
    if kernel == "candidates_kernel":
        return 0
    read = [name for name in ("p_student", "p_teacher", "p_logits") if _is_block(arguments.get(name))]
    gradient = arguments.get("p_gradient")
    return 4 * len(read) + (gradient.element_size() if _is_block(gradient) else 0)


def _is_block(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == (N, V)


# Bytes per entry of all launches, in float32 and with a 16-bit gradient: what the Triton kernels' headers promise.
PROMISED = {
    "forward KL": (Objective(alpha=0.0), 18),
    "reverse KL": (Objective(alpha=1.0), 18),
    "JSD": (Objective(alpha=0.5), 26),
    "reverse KL, entry clip": (Objective(alpha=1.0, entry_clip=0.1), 26),
    "JSD, student top-k": (Objective(alpha=0.5, support="topk", topk=5), 8 + 8 + 6),
    "JSD, student top-k without tail": (Objective(alpha=0.5, support="topk", topk=5, tail=False), 8),
    "sampled": (Objective(support="sampled"), 8 + 6),
}


@pytest.mark.parametrize("name", PROMISED)
def test_the_triton_kernels_pass_over_the_logits_as_often_as_their_headers_say(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from sdkernels.tile import triton_backend
    from sdkernels.tile.triton_backend import buckets, divergence, softmax_gradient, statistics, topk

    launches: list[tuple[str, dict[str, Any]]] = []
    for module in (statistics, divergence, softmax_gradient, buckets, topk):
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launches(getattr(module, kernel), launches))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    objective, promised = PROMISED[name]
    student, teacher = torch.randn(2, N, V).unbind()
    triton_backend.divergence_tile(
        student,
        teacher,
        TileRows(target_ids=torch.zeros(N, dtype=torch.int64)),
        objective,
        want_gradient=True,
        gradient_dtype=torch.bfloat16,
    )
    assert sum(bytes_per_entry(*launch) for launch in launches) == promised
