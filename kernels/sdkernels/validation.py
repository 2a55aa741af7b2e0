"""Raises every argument error of the public functions, before any work is done.

What shapes, dtypes and scalars say is checked in the public function; what only values say (ids in range, weights not
NaN) is checked inside the operator, so that a compiled graph checks it too. On a GPU that is one read by the host,
which also brings what the pass has to know of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .types import (
    ImportanceClip,
    LogitTransform,
    Operands,
    Options,
    TeacherMix,
    TopK,
    TopKLogprobs,
    Weighed,
    float64_device,
    on_host,
)

# The most that a row of teacher probabilities may add up to: 16-bit log-probabilities of a server are a little off.
MOST_MASS = 1.02
# The most logits (rows times V) that the reference is run on: each of its dozen tensors then takes 64 MiB.
MOST_REFERENCE_LOGITS = 1 << 23
BACKENDS = ("auto", "torch", "native", "triton")
DIVERGENCE_BACKENDS = (*BACKENDS, "reference")  # of `linear_divergence`
INTEGER_DTYPES = (torch.int64, torch.int32)


def check_tensor(name: str, tensor: object, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Refuses all but a floating-point tensor of this shape (None: any size) on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"{name} must be a plain tensor, got a sharded DTensor: gather it first, {name}.full_tensor()")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    _check_shape(name, tensor, shape)
    if like is not None:
        _check_device(name, tensor, like)


def check_ids(name: str, tensor: object, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Refuses all but int64 or int32 of this shape on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, like)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a word that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuses all but a real number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    inside = (value > low if open_low else value >= low) and value <= high and value < math.inf
    if not inside:
        bound = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name} must be a finite number in {bound}, got {value!r}")


def check_count(name: str, value: object, low: int, high: int | None, meaning: str) -> None:
    """Refuses all but an int in [low, high]; `high` is None where it is not known yet."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bound = meaning if high is None else f"{meaning}={high}"
        raise ValueError(f"{name} must be in [{low}, {bound}], got {value}")


def check_head(name: str, head: LogitTransform | None, rows: int, like: Tensor) -> None:
    """Refuses a transform that a head of so many rows cannot have."""
    if head is None:
        return
    if not isinstance(head, LogitTransform):
        raise TypeError(f"{name} must be a LogitTransform, got {type(head).__name__}")
    if head.bias is not None:
        check_tensor(f"{name}.bias", head.bias, (rows,), like)
    check_number(f"{name}.scale", head.scale, 0.0, open_low=True)
    if head.softcap is not None:
        check_number(f"{name}.softcap", head.softcap, 0.0, open_low=True)
    if head.temperature is not None:
        check_number(f"{name}.temperature", head.temperature, 0.0, open_low=True)


def check_options(options: Options, backends: tuple[str, ...] = DIVERGENCE_BACKENDS) -> None:
    """Refuses scalar options of a divergence that has these backends."""
    check_number("alpha", options.alpha, 0.0, 1.0)
    if not isinstance(options.normalize, bool):
        raise TypeError(f"normalize must be a bool, got {type(options.normalize).__name__}")
    check_number("temperature", options.temperature, 0.0, open_low=True)
    check_choice("reduction", options.reduction, ("mean", "sum", "none"))
    check_choice("gradient", options.gradient, ("auto", "in_forward", "recompute"))
    check_choice("on_nonfinite", options.on_nonfinite, ("propagate", "raise"))
    if options.gradient_tolerance is not None:
        check_number("gradient_tolerance", options.gradient_tolerance, 0.0, 1.0, open_low=True)
        if options.gradient == "recompute":
            raise ValueError(
                "gradient_tolerance must be None with gradient='recompute': it is for gradients formed in forward, got "
                f"{options.gradient_tolerance}"
            )
    _check_machine(options, backends)


def check_support(options: Options, vocab: int | None) -> None:
    """Refuses what may not be compared of a row, as far as no tensor has a say; `vocab` is None where it is unknown."""
    support = options.support
    if isinstance(support, TopK):
        check_choice("support.of", support.of, ("student", "teacher"))
        check_count("support.k (topk)", support.k, 1, vocab, "V")
    elif support == "sampled":
        if options.alpha != 1.0 or options.normalize:
            raise ValueError(
                "support='sampled' is the score-function form of the reverse KL: alpha must be 1 and normalize False, "
                f"got alpha={options.alpha!r}, normalize={options.normalize!r}"
            )
    elif support is not None:
        raise ValueError(f"support must be None, TopK(...) or 'sampled', got {support!r}")
    if options.entry_clip is not None:
        check_number("entry_clip", options.entry_clip, 0.0, open_low=True)
        if support is not None:
            raise ValueError(f"entry_clip is for the full vocabulary, got support={support!r}")


def check_vocab_size(vocab_size: int | None, columns: int | None) -> None:
    """Refuses a size beyond the head's own; `columns` is None where that is not known yet."""
    if vocab_size is not None:
        check_count("vocab_size", vocab_size, 1, columns, "V")


def check_linear_divergence(given: Operands, options: Options, whole_vocab: int) -> None:
    """Refuses arguments of `linear_divergence`; `whole_vocab` is 0 unless the heads are slices of a larger one."""
    _check_sides(given, options, whole_vocab)
    hidden, weight = given.student_hidden, given.weight
    check_options(options)
    _check_rows(given, options, options.vocab_size or whole_vocab or weight.shape[0])
    check_head("student_head", options.student_head, weight.shape[0], hidden)
    teachers = weight if given.teacher_weight is None else given.teacher_weight
    check_head("teacher_head", options.teacher_head, teachers.shape[0], hidden)
    trained = weight.requires_grad or (given.student_bias is not None and given.student_bias.requires_grad)
    if options.gradient == "in_forward" and options.reduction == "none" and trained and torch.is_grad_enabled():
        raise ValueError(
            "gradient must be 'auto' or 'recompute' for reduction='none' with a head that is trained (its gradient "
            "depends on each token's upstream gradient), got 'in_forward'"
        )
    if options.gradient_tolerance is not None:
        # Each row's upstream gradient would come after the columns have been chosen.
        for came, is_refused in {
            "reduction='none'": options.reduction == "none",
            "a process_group": whole_vocab,
        }.items():
            if is_refused:
                raise ValueError(f"gradient_tolerance must be None with {came}, got {options.gradient_tolerance}")


def check_logit_divergence(given: Operands, options: Options) -> None:
    """Refuses arguments of `logit_divergence`."""
    student, teacher, cached = given.student_hidden, given.teacher_hidden, options.teacher
    check_tensor("student_logits", student, (None, None))
    if student.shape[1] == 0:
        raise ValueError(f"student_logits must have at least one column, got shape {tuple(student.shape)}")
    check_vocab_size(options.vocab_size, student.shape[1])
    if cached is not None and not isinstance(cached, TopKLogprobs):
        raise TypeError(f"teacher must be a TopKLogprobs or None (mix logits yourself), got {type(cached).__name__}")
    if (cached is None) == (teacher is None):
        came = "both" if cached is not None else "neither"
        raise ValueError(f"teacher_logits or teacher=TopKLogprobs(...) must be given, and only one, got {came}")
    if teacher is not None:
        check_tensor("teacher_logits", teacher, tuple(student.shape), student)
    check_options(options, BACKENDS)
    _check_rows(given, options, student.shape[1] if options.vocab_size is None else options.vocab_size)
    check_head("teacher_head", options.teacher_head, student.shape[1], student)


def check_head_call(given: Operands, options: Options, whole_vocab: int, k: int | None = None) -> None:
    """Refuses arguments of `linear_logprobs` and, with `k`, of `linear_topk`; `whole_vocab` as above."""
    hidden, weight = given.student_hidden, given.student_weight
    check_tensor("hidden", hidden, (None, None))
    check_tensor("weight", weight, (None, hidden.shape[1]), hidden)
    rows = given.weight.shape[0]
    if rows == 0:
        raise ValueError(f"weight must have at least one row, got shape {tuple(given.weight.shape)}")
    check_vocab_size(options.vocab_size, whole_vocab or rows)
    if given.target_ids is not None:
        check_ids("target_ids", given.target_ids, (hidden.shape[0],), hidden)
    check_head("head", options.student_head, rows, hidden)
    check_number("temperature", options.temperature, 0.0, open_low=True)
    if k is not None:
        check_count("k (topk)", k, 1, options.vocab_size or whole_vocab or rows, "V")
    _check_machine(options, BACKENDS)


def check_reference(given: Operands, options: Options, process_group: object, normalizer_group: object) -> None:
    """Refuses what the reference does not know, and inputs too large for it."""
    unknown = {
        "gradient": options.gradient != "auto",
        "gradient_tolerance": options.gradient_tolerance is not None,
        "workspace_mb": options.workspace_mb is not None,
        "on_nonfinite": options.on_nonfinite != "propagate",
        "process_group": process_group is not None,
        "normalizer_group": normalizer_group is not None,
    }
    for name, is_set in unknown.items():
        if is_set:
            raise ValueError(f"{name} must be left at its default with backend='reference', which has no such thing")
    device = given.student_hidden.device
    if float64_device(device) != device:
        raise ValueError(
            f"backend='reference' needs tensors on a device that has float64, such as the CPU, got {device}"
        )
    rows, vocab = given.student_hidden.shape[0], given.weight.shape[0]
    if rows * vocab > MOST_REFERENCE_LOGITS:
        raise ValueError(
            f"backend='reference' holds all logits in float64 and takes at most {MOST_REFERENCE_LOGITS} of them, got "
            f"{rows * vocab}: student_hidden has {rows} rows, student_weight V={vocab}"
        )


def _check_sides(given: Operands, options: Options, whole_vocab: int) -> None:
    """Refuses hidden states and heads of either side that do not fit together."""
    student_hidden, student_weight, teacher = given.student_hidden, given.student_weight, options.teacher
    check_tensor("student_hidden", student_hidden, (None, None))
    rows, width = student_hidden.shape
    check_tensor("student_weight", student_weight, (None, width), student_hidden)
    vocab = given.weight.shape[0]
    if vocab == 0:
        raise ValueError(f"student_weight must have at least one row, got shape {tuple(given.weight.shape)}")
    check_vocab_size(options.vocab_size, whole_vocab or vocab)
    if isinstance(teacher, TopKLogprobs):
        for name, tensor in (("teacher_hidden", given.teacher_hidden), ("teacher_weight", given.teacher_weight)):
            if tensor is not None:
                raise ValueError(f"{name} must be None where the teacher is TopKLogprobs, got {_describe(tensor)}")
        return
    if teacher is not None and not isinstance(teacher, TeacherMix):
        raise TypeError(f"teacher must be a TeacherMix, a TopKLogprobs or None, got {type(teacher).__name__}")
    if given.teacher_hidden is None:
        raise ValueError("teacher_hidden must be a tensor unless the teacher is TopKLogprobs, got None")
    check_tensor("teacher_hidden", given.teacher_hidden, (rows, None), student_hidden)
    if given.teacher_weight is None:
        check_tensor("teacher_hidden (without a teacher_weight)", given.teacher_hidden, (rows, width))
    else:
        _check_other_head("teacher_weight", given.teacher_weight, given.teacher_hidden, given, options, whole_vocab)
    if isinstance(teacher, TeacherMix):
        check_number("teacher.share", teacher.share, 0.0, 1.0)
        check_tensor("teacher.hidden", teacher.hidden, (rows, None), student_hidden)
        if teacher.weight is None:
            check_tensor("teacher.hidden (without a weight)", teacher.hidden, (rows, given.teacher_hidden.shape[1]))
        else:
            _check_other_head("teacher.weight", teacher.weight, teacher.hidden, given, options, whole_vocab)


def _check_other_head(
    name: str, weight: Tensor, hidden: Tensor, given: Operands, options: Options, whole_vocab: int
) -> None:
    """Refuses a teacher's head with other rows than the student's, unless `vocab_size` says how many are real."""
    check_tensor(name, weight, (None, hidden.shape[1]), given.student_hidden)
    rows, own, real = weight.shape[0], given.weight.shape[0], options.vocab_size
    if rows == own:
        return
    if whole_vocab or real is None:
        hint = "all slices are cut alike" if whole_vocab else "where the padding differs, give vocab_size"
        raise ValueError(f"{name} must have a row for each of the student's V={own}, got {rows}: {hint}")
    check_count("vocab_size", real, 1, rows, f"rows of {name}")


def _check_rows(given: Operands, options: Options, vocab: int) -> None:
    """Refuses operands with one entry a row that do not fit, and combinations of options that contradict each other."""
    like, teacher, support, importance = given.student_hidden, options.teacher, options.support, options.importance
    rows = like.shape[0]
    if given.token_weights is not None:
        check_tensor("token_weights", given.token_weights, (rows,), like)
    if given.target_ids is not None:
        check_ids("target_ids", given.target_ids, (rows,), like)
    if importance is not None:
        if not isinstance(importance, ImportanceClip):
            raise TypeError(f"importance must be an ImportanceClip, got {type(importance).__name__}")
        check_tensor("importance.old_logprobs", importance.old_logprobs, (rows,), like)
        check_number("importance.clip", importance.clip, 0.0, open_low=True)
        if given.target_ids is None:
            raise ValueError("importance needs target_ids, the tokens that its old_logprobs belong to; got None")
    if isinstance(teacher, TopKLogprobs):
        check_ids("teacher.ids", teacher.ids, (rows, None), like)
        check_tensor("teacher.logprobs", teacher.logprobs, tuple(teacher.ids.shape), like)
        check_count("the number of columns of teacher.ids", teacher.ids.shape[1], 1, vocab, "V")
    check_support(options, vocab)
    if support == "sampled" and given.target_ids is None:
        raise ValueError("support='sampled' needs target_ids, got None")
    if not isinstance(teacher, TopKLogprobs):
        return
    if isinstance(support, TopK) and (support.of != "teacher" or support.k != teacher.ids.shape[1]):
        raise ValueError(
            f"support must be None or TopK({teacher.ids.shape[1]}, of='teacher') where the teacher is TopKLogprobs "
            f"with {teacher.ids.shape[1]} ids a row, got {support}"
        )
    if support == "sampled":
        raise ValueError("support='sampled' needs the teacher's full distribution, got TopKLogprobs")
    if options.entry_clip is not None:
        raise ValueError(f"entry_clip is for the full vocabulary, got teacher={type(teacher).__name__}")


def check_values(operands: Operands, vocab_size: int, reduction: str) -> Weighed | None:
    """Refuses what only the values of tensors say; the operators call it. Returns what their weights say, for the pass.

    All is read at once, and what is wrong is looked for only where something is.
    """
    vocab, weights = vocab_size or operands.vocab, operands.token_weights
    checks: list[tuple[Tensor, Callable[[], str]]] = []  # whether something is wrong, and what
    if weights is not None:
        checks.append((~weights.isfinite().all(), partial(_first_not_finite, weights)))
    for name, ids in (("target_ids", operands.target_ids), ("teacher.ids", operands.teacher_ids)):
        if ids is not None:
            outside = _outside(ids, weights, vocab)
            checks.append((outside.any(), partial(_first_outside, name, ids, outside, vocab)))
    if operands.teacher_ids is not None:
        ordered = operands.teacher_ids.sort(dim=-1).values
        repeats = (ordered[:, 1:] == ordered[:, :-1]).any()
        checks.append((repeats, lambda: "teacher.ids must not repeat an id within a row"))
    for name, logprobs in (
        ("importance.old_logprobs", operands.old_logprobs),
        ("teacher.logprobs", operands.teacher_logprobs),
    ):
        if logprobs is not None:
            checks.append((logprobs.isnan().any(), partial("{} must not be NaN".format, name)))
    if operands.teacher_logprobs is not None:
        masses = operands.teacher_logprobs.float().exp().sum(-1)
        checks.append(((masses > MOST_MASS).any(), partial(_largest_mass, masses)))
    found = on_host([is_wrong for is_wrong, _ in checks] + (Weighed.to_read(weights) if weights is not None else []))
    for is_wrong, (_, message) in zip(found, checks, strict=False):
        if is_wrong:
            raise ValueError(message())
    if weights is None:
        return None
    weighed = Weighed(int(found[-2]), found[-1])
    if reduction == "mean" and weighed.active and weighed.total <= 0:
        raise ValueError(f"token_weights must have a positive sum for reduction='mean', got {weighed.total:g}")
    return weighed


def _first_not_finite(weights: Tensor) -> str:
    row = int((~weights.isfinite()).nonzero()[0, 0])
    return f"token_weights must be finite, got {float(weights[row])} in row {row}"


def _outside(ids: Tensor, weights: Tensor | None, vocab: int) -> Tensor:
    """Says which ids are none of the vocabulary's: of rows without weight, which are never looked up, none."""
    outside = (ids < 0) | (ids >= vocab)
    return outside if weights is None else outside & (weights != 0).view(-1, *[1] * (ids.dim() - 1))


def _first_outside(name: str, ids: Tensor, outside: Tensor, vocab: int) -> str:
    position = tuple(int(i) for i in outside.nonzero()[0])
    return f"{name} must be in [0, V={vocab}), got {int(ids[position])} at {position}"


def _largest_mass(masses: Tensor) -> str:
    return (
        "teacher.logprobs must be over the full vocabulary, with probabilities that add up to at most 1, "
        f"got {float(masses.max()):.3g} in row {int(masses.argmax())}"
    )


def _check_machine(options: Options, backends: tuple[str, ...]) -> None:
    check_choice("backend", options.backend, backends)
    if options.workspace_mb is not None:
        check_number("workspace_mb", options.workspace_mb, 0.0, open_low=True)


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    matches = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(tensor.shape)}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the student's tensors are, got {tensor.device}")
