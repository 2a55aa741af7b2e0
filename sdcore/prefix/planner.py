"""Plans what has to be computed, from token ids alone: which tokens have the same past, which states are asked for.

A group is a prompt and the completions sampled from it. Under the student's weights it is a `Tree`: the prompt is
the trunk, a completion a branch. Under the teacher's it is another one, whose trunk starts with the tokens that both
prompts begin with. A strategy computes every token of a tree once; which weights do it, and whether the teacher may
read the student's states of the `shared` tokens, is not a plan's business.

What differs from the obvious: the last token of a completion is predicted and never read, so a completion of R tokens
has R rows but reads R - 1 tokens, and its first row is the last state of the prompt. Sharing is by equal ids only: what
the templates did is neither known nor needed.

Not covered: prefixes that some, but not all, completions of a group share beyond the trunk, and prefixes shared
between groups.

Letters: N completion rows, B groups, G completions of a group, P prompt, T trunk, R completion length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import ArgumentError, PlanError, PlanTypeError

TokenIds: TypeAlias = Tensor | Sequence[int]

ID_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """Is one group of completions under one set of weights: a trunk, computed once, and a branch per completion.

    What a model reads for completion i is `trunk + branches[i]`. The last `rows[i]` states of that sequence predict the
    completion's tokens: `rows[i]` is at most `len(branches[i]) + 1`, and where it is that, the first of them is the
    trunk's last state.
    """

    trunk: Tensor  # (T,) int64; empty only where every branch that has rows is non-empty
    branches: tuple[Tensor, ...]  # G of (B_i,) int64, B_i may be 0
    rows: tuple[int, ...]  # G of R_i >= 0; a completion of 0 tokens has no rows, and nothing of it is computed
    shared: int = 0  # of a teacher's tree: so many tokens the trunk and the student's prompt begin with alike, < T

    def __post_init__(self) -> None:
        for name, ids in [("trunk", self.trunk), *((f"branches[{i}]", ids) for i, ids in enumerate(self.branches))]:
            if ids.dim() != 1 or ids.dtype != torch.int64:
                raise PlanError(f"{name} must be 1-D int64, got shape {tuple(ids.shape)} and {ids.dtype}")
        length = len(self.trunk)
        if len(self.branches) != len(self.rows):
            raise PlanError(f"rows must have one entry per branch, {len(self.branches)}, got {len(self.rows)}")
        for i, (branch, rows) in enumerate(zip(self.branches, self.rows, strict=True)):
            most = len(branch) + (1 if length else 0)
            if not 0 <= rows <= most:
                raise PlanError(f"rows[{i}] must be in [0, {most}], the states that its branch can reach, got {rows}")
        if not 0 <= self.shared <= max(0, length - 1):
            raise PlanError(f"shared must be in [0, {max(0, length - 1)}], less than the trunk, got {self.shared}")

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def active(self) -> tuple[int, ...]:
        """Lists the completions that have rows; nothing needs computing for the others, and none if this is empty."""
        return tuple(i for i, rows in enumerate(self.rows) if rows)

    def sequence(self, completion: int) -> Tensor:
        """Returns (T + B_i,) what a model reads for one completion when nothing is shared."""
        return torch.cat([self.trunk, self.branches[completion]])

    def tokens(self, *, read_shared: bool) -> int:
        """Counts each token once, and the `shared` ones only unless they are read."""
        if not self.active:
            return 0
        trunk = len(self.trunk) - (self.shared if read_shared else 0)
        return trunk + sum(len(self.branches[i]) for i in self.active)

    def naive_tokens(self) -> int:
        """Counts the tokens that are computed when each completion is its own sequence."""
        return sum(len(self.trunk) + len(self.branches[i]) for i in self.active)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Holds the trees of both passes, and the tokens that their rows predict: in order group, completion, position."""

    student: tuple[Tree, ...]  # B
    teacher: tuple[Tree, ...]  # B, or none at all where no teacher's prompts were given
    target_ids: Tensor  # (N,) int64

    @property
    def num_rows(self) -> int:
        """Counts the N rows."""
        return len(self.target_ids)

    @property
    def device(self) -> torch.device:
        return self.target_ids.device

    @cached_property
    def rows(self) -> tuple[tuple[slice, ...], ...]:
        """Says, as `rows[g][i]`, where the rows of completion i of group g are among the N, in both passes."""
        return row_slices(self.student)


def row_slices(trees: Sequence[Tree]) -> tuple[tuple[slice, ...], ...]:
    """Says, as `[g][i]`, where the rows of branch i of tree g are among all. The one place that defines their order."""
    slices, start = [], 0
    for tree in trees:
        group = []
        for rows in tree.rows:
            group.append(slice(start, start + rows))
            start += rows
        slices.append(tuple(group))
    return tuple(slices)


def plan(
    student_prompts: Sequence[TokenIds],
    completions: Sequence[Sequence[TokenIds]],
    teacher_prompts: Sequence[TokenIds | Sequence[TokenIds]] | None = None,
) -> Plan:
    """Finds what the passes over these sequences share.

    `student_prompts` has a prompt per group, `completions` a list of completions per group. `teacher_prompts` has per
    group either one prompt or a list with one per completion; None plans the student's pass alone. A prompt or
    completion is a 1-D int64 or int32 tensor, on any one device, or a sequence of ints; completions may be empty,
    prompts may not. The plan keeps copies.

    The work is done on the CPU: ids on a GPU cost one synchronisation. Raises `PlanError` (a `ValueError`) or
    `PlanTypeError` (a `TypeError`), which name the argument and the index, before anything is computed.
    """
    prompts_B = [(f"student_prompts[{g}]", ids) for g, ids in entries("student_prompts", student_prompts)]
    if not prompts_B:
        raise PlanError("student_prompts must have at least one group, got none")
    completions_B_G = []
    for g, group in entries("completions", completions, groups=len(prompts_B)):
        named = [(f"completions[{g}][{i}]", ids) for i, ids in entries(f"completions[{g}]", group)]
        if not named:
            raise PlanError(f"completions[{g}] must have at least one completion (it may be empty), got none")
        completions_B_G.append(named)
    sizes = [len(group) for group in completions_B_G]
    teachers_B_G = [] if teacher_prompts is None else _teacher_entries(teacher_prompts, sizes)

    given = [*prompts_B, *(pair for group in [*completions_B_G, *teachers_B_G] for pair in group)]
    ids, host = collect_ids(given, may_be_empty=frozenset(name for group in completions_B_G for name, _ in group))

    student, teacher = [], []
    for g, (prompt_name, _) in enumerate(prompts_B):
        names = [name for name, _ in completions_B_G[g]]
        read = [ids[name][:-1] for name in names]  # the last token is predicted, never read
        rows = tuple(len(ids[name]) for name in names)
        student.append(Tree(trunk=ids[prompt_name], branches=tuple(read), rows=rows))
        if not teachers_B_G:
            continue
        prompts = [name for name, _ in teachers_B_G[g]]
        if len(prompts) == 1:
            prompts *= len(names)
        # A completion without rows is not computed, so its prompt has no say in what the others share.
        asked = [name for name, count in zip(prompts, rows, strict=True) if count] or prompts
        first = host[asked[0]]
        length = min(common_prefix(first, host[name]) for name in asked)
        branches = tuple(
            torch.cat([ids[name][length:], branch]) if count else branch
            for name, branch, count in zip(prompts, read, rows, strict=True)
        )
        shared = min(common_prefix(first[:length], host[prompt_name]), max(0, length - 1))
        teacher.append(Tree(trunk=ids[asked[0]][:length], branches=branches, rows=rows, shared=shared))
    target_ids = torch.cat([ids[name] for group in completions_B_G for name, _ in group])
    return Plan(student=tuple(student), teacher=tuple(teacher), target_ids=target_ids)


def check_against(plan: Plan, *, vocab_size: int, max_positions: int | None, device: torch.device | str) -> None:
    """Refuses a plan that does not fit a model.

    `vocab_size` is the number of ids that the model can embed, `max_positions` how many tokens it can read (None: any
    number), `device` where it takes its ids. Costs one synchronisation on a GPU. Raises `PlanError`.
    """
    want, have = torch.device(device), plan.device
    if want.type != have.type or (None not in (want.index, have.index) and want.index != have.index):
        raise PlanError(f"the plan's ids must be on the model's device, {want}, got ids on {have}")
    for kind, trees in (("student", plan.student), ("teacher", plan.teacher)):
        for g, tree in enumerate(trees):
            longest = max((len(tree.trunk) + len(tree.branches[i]) for i in tree.active), default=0)
            if max_positions is not None and longest > max_positions:
                raise PlanError(
                    f"{kind}_prompts[{g}] and its completions must have at most {max_positions} tokens, which is what "
                    f"the model has positions for, got {longest} (without the last one, which is not read)"
                )
    named = list(_plan_ids(plan))
    # One synchronisation where all is well; which of them it was is only asked when it is not.
    if bool((torch.cat([ids for _, ids in named]) < vocab_size).all()):
        return
    name, worst = next((name, int(ids.max())) for name, ids in named if len(ids) and int(ids.max()) >= vocab_size)
    raise PlanError(f"{name} must be in [0, V={vocab_size}), the model's vocabulary, got id {worst}")


def buckets(
    lengths: Sequence[int], *, most_padding: float = 0.1, free_padding: int = 0, most_tokens: int | None = None
) -> list[list[int]]:
    """Groups sequences of these lengths into batches that waste little when padded to their longest.

    Returns lists of indices, each index in one of them, ascending inside a list; the lists come longest first. In each
    the padding is at most `most_padding` of the padded batch, or at most `free_padding` tokens (a batch more costs as
    much as some padding). A padded batch has at most `most_tokens` (None: any number), unless one sequence alone has
    more. Raises `ArgumentError`.
    """
    if not 0 <= most_padding < 1:
        raise ArgumentError(f"most_padding must be in [0, 1), got {most_padding!r}")
    if free_padding < 0 or (most_tokens is not None and most_tokens < 1):
        raise ArgumentError(
            f"free_padding must be at least 0 and most_tokens at least 1, got {free_padding} and {most_tokens}"
        )
    batches: list[list[int]] = []
    longest = filled = 0
    # From the longest down, padding and its share only grow with every sequence that joins.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length < 0:
            raise ArgumentError(f"lengths[{index}] must be at least 0, got {length}")
        if batches:
            padded = longest * (len(batches[-1]) + 1)
            padding = padded - filled - length
            fits = most_tokens is None or padded <= most_tokens
            if fits and padding <= max(most_padding * padded, free_padding):
                batches[-1].append(index)
                filled += length
                continue
        batches.append([index])
        longest = filled = length
    return [sorted(batch) for batch in batches]


def common_prefix(a: Tensor, b: Tensor) -> int:
    """Counts the tokens that two sequences (L,) begin with alike."""
    length = min(len(a), len(b))
    different = (a[:length] != b[:length]).nonzero()
    return int(different[0, 0]) if len(different) else length


def entries(name: str, value: object, groups: int | None = None) -> list[tuple[int, object]]:
    """Returns the entries of a list or tuple with their indices."""
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
        raise PlanTypeError(f"{name} must be a list, got {_describe(value)}")
    if groups is not None and len(value) != groups:
        raise PlanError(f"{name} must have one entry per group, {groups} as student_prompts has, got {len(value)}")
    return list(enumerate(value))


def _teacher_entries(teacher_prompts: object, sizes: Sequence[int]) -> list[list[tuple[str, object]]]:
    """Returns per group the teacher's prompts with their names: one, or one per completion."""
    groups = []
    for g, entry in entries("teacher_prompts", teacher_prompts, groups=len(sizes)):
        name = f"teacher_prompts[{g}]"
        of_prompts = isinstance(entry, Sequence) and len(entry) > 0 and isinstance(entry[0], Tensor | Sequence)
        if not of_prompts or isinstance(entry, str):
            groups.append([(name, entry)])
            continue
        prompts: list[tuple[str, object]] = [(f"{name}[{i}]", ids) for i, ids in entries(name, entry)]
        if len(prompts) != sizes[g]:
            raise PlanError(
                f"{name} must be one prompt or have one per completion, {sizes[g]} as completions[{g}] has, "
                f"got {len(prompts)}"
            )
        groups.append(prompts)
    return groups


def collect_ids(
    given: Sequence[tuple[str, object]], *, may_be_empty: frozenset[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns name → (L,) int64 ids, checked; once on their own device and once on the CPU."""
    device: torch.device | None = None
    first = ""
    for name, ids in given:
        _check_ids(name, ids)
        length = len(ids)  # type: ignore[arg-type]  # checked above
        if length == 0 and name not in may_be_empty:
            raise PlanError(f"{name} must have at least one token, got none")
        if isinstance(ids, Tensor):
            if device is None:
                device, first = ids.device, name
            elif ids.device != device:
                raise PlanError(f"{name} must be on {device} as {first} is, got {ids.device}")
    flat = torch.cat([torch.as_tensor(ids, dtype=torch.int64, device=device) for _, ids in given])
    lengths = [len(ids) for _, ids in given]  # type: ignore[arg-type]
    host = flat.cpu()
    names = [name for name, _ in given]
    on_host = dict(zip(names, host.split(lengths), strict=True))
    if bool((host < 0).any()):
        name, lowest = next((name, int(ids.min())) for name, ids in on_host.items() if len(ids) and int(ids.min()) < 0)
        raise PlanError(f"{name} must have no negative ids (cut off padding and ignored tokens), got {lowest}")
    return dict(zip(names, flat.split(lengths), strict=True)), on_host


def _check_ids(name: str, ids: object) -> None:
    if isinstance(ids, Tensor):
        if ids.dtype not in ID_DTYPES:
            raise PlanTypeError(f"{name} must be int64 or int32 ids, got {ids.dtype}")
        if ids.dim() != 1:
            raise PlanError(f"{name} must be 1-D, one sequence without padding, got shape {tuple(ids.shape)}")
        return
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise PlanTypeError(f"{name} must be a 1-D tensor or a sequence of ints, got {_describe(ids)}")
    for position, token in enumerate(ids):
        if type(token) is not int:
            raise PlanTypeError(f"{name} must be a sequence of ints, got {_describe(token)} at position {position}")


def _plan_ids(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yields every id of a plan under the name of the argument that it came from."""
    for g, tree in enumerate(plan.student):
        yield f"student_prompts[{g}]", tree.trunk
        for i, rows in enumerate(plan.rows[g]):
            yield f"completions[{g}][{i}]", plan.target_ids[rows]
    for g, tree in enumerate(plan.teacher):
        yield f"teacher_prompts[{g}]", tree.trunk
        for i in tree.active:
            # A branch is the rest of the completion's own prompt, if it has one, and the completion but for its end.
            yield f"teacher_prompts[{g}][{i}]", tree.branches[i][: len(tree.branches[i]) - tree.rows[i] + 1]


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
