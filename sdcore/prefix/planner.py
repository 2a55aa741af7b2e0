"""Plans what has to be computed, from token ids alone: which tokens have the same past, which states are asked for.

A group is a prompt and the completions sampled from it. Under the student's weights it is a `Tree` of one level: the
prompt is its root, the completions are its leaves. Under the teacher's it is another one, whose root is what the
teacher's prompts begin with alike. A strategy computes every token of a tree once; which weights do it, and whether the
teacher may borrow the student's states of the `shared` tokens, is not a plan's business.

What differs from the obvious: the last token of a completion is predicted and never read, so a completion of R tokens
has R rows but reads R - 1 tokens, and its first row is the last state of the prompt. With a mask it has a row for each
token that carries loss, and reads up to the last of them. Sharing is by equal ids only: what the templates did is
neither known nor needed.

Not covered: prefixes that some, but not all, completions of a group share beyond the prompt, and prefixes shared
between groups. `plan_trajectories` finds these.

Letters: N rows, B groups, G completions of a group, P prompt, T what the teacher's prompts have in common, R completion
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import ArgumentError, PlanError, PlanTypeError
from .tree import Tree

TokenIds: TypeAlias = Tensor | Sequence[int]

ID_DTYPES = (torch.int64, torch.int32)
# What errors call the ids that only teachers read begins so.
OF_TEACHERS = ("teacher_prompts", "views")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Holds the trees of both passes, and the tokens that their rows predict: in order group, completion, position."""

    student: tuple[Tree, ...]  # B
    # Of each teacher that is told apart, B, which may borrow from the student's; none where there is no teacher's pass.
    teachers: tuple[tuple[Tree, ...], ...]
    target_ids: Tensor  # (N,) int64
    counts: tuple[tuple[int, ...], ...]  # per group of attempts at one task: of each completion how many of the N rows
    given: tuple[tuple[str, Tensor], ...]  # the ids as they were given, with what errors call them

    @property
    def teacher(self) -> tuple[Tree, ...]:
        """Are the trees of the only teacher, or of the first; none without."""
        return self.teachers[0] if self.teachers else ()

    def sides(self, *, teacher_shares: bool) -> list[tuple[tuple[Tree, ...], bool]]:
        """Lists the trees of the student and of each teacher, and whether they are run after the student's states.

        Only the last teacher may have the student's weights: `teacher_shares`.
        """
        reads = [False] * len(self.teachers) + [teacher_shares and len(self.teachers) > 0]
        return list(zip((self.student, *self.teachers), reads, strict=True))

    @property
    def num_rows(self) -> int:
        """Counts the N rows."""
        return len(self.target_ids)

    @property
    def device(self) -> torch.device:
        return self.target_ids.device

    @cached_property
    def scored(self) -> Tensor | None:
        """Says, (N,) bool, which rows all teachers have; None: all of them."""
        places = [torch.cat([tree.places for tree in trees]) for trees in self.teachers]
        if all(len(of_teacher) == self.num_rows for of_teacher in places):
            return None
        counts = torch.bincount(torch.cat(places), minlength=self.num_rows)
        return (counts == len(self.teachers)).to(self.device)

    @cached_property
    def rows(self) -> tuple[tuple[slice, ...], ...]:
        """Says, as `rows[g][i]`, where the rows of completion i of group g are among the N."""
        ends = list(accumulate((count for group in self.counts for count in group), initial=0))
        slices = iter(map(slice, ends, ends[1:]))
        return tuple(tuple(next(slices) for _ in group) for group in self.counts)


def plan(
    student_prompts: Sequence[TokenIds],
    completions: Sequence[Sequence[TokenIds]],
    teacher_prompts: Sequence[TokenIds | Sequence[TokenIds]] | None = None,
    *,
    masks: Sequence[Sequence[Tensor | Sequence[bool]]] | None = None,
) -> Plan:
    """Finds what the passes over these sequences share.

    `student_prompts` has a prompt per group, `completions` a list of completions per group. `teacher_prompts` has per
    group either one prompt or a list with one per completion; None plans the student's pass alone. A prompt or
    completion is a 1-D int64 or int32 tensor, on any one device, or a sequence of ints; completions may be empty,
    prompts may not. `masks` says of each completion, bool, which of its tokens carry loss, where a tool's output is
    among them; None: all. The plan keeps copies.

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

    names_B_G = [[name for name, _ in group] for group in completions_B_G]
    with_loss = _with_loss(masks, names_B_G, {name: len(ids[name]) for group in names_B_G for name in group})
    student, teacher, first = [], [], 0
    asked_names = [name for name, _ in prompts_B] + [name for group in names_B_G for name in group]
    for g, (names, (prompt_name, _)) in enumerate(zip(names_B_G, prompts_B, strict=True)):
        tokens = [with_loss[name] for name in names]
        # The last token with loss is predicted, never read.
        read = [ids[name][: int(own[-1]) if len(own) else 0] for name, own in zip(names, tokens, strict=True)]
        student.append(_one_level(ids[prompt_name], read, tokens, first, name=prompt_name))
        if teachers_B_G:
            prompts = [name for name, _ in teachers_B_G[g]]
            if len(prompts) == 1:
                prompts *= len(names)
            # A completion without rows is not computed, so its prompt has no say in what the others share.
            asked = [name for name, own in zip(prompts, tokens, strict=True) if len(own)] or prompts
            asked_names += dict.fromkeys(asked)
            prompt = host[asked[0]]
            length = min(common_prefix(prompt, host[name]) for name in asked)
            branches = [
                torch.cat([ids[name][length:], branch]) if len(own) else branch
                for name, branch, own in zip(prompts, read, tokens, strict=True)
            ]
            # The last of what is common is computed in any case: its state may be asked for.
            shared = min(common_prefix(prompt[:length], host[prompt_name]), max(0, length - 1))
            trunk = ids[asked[0]][:length]
            teacher.append(_one_level(trunk, branches, tokens, first, shared=shared, name=f"teacher_prompts[{g}]"))
        first += student[-1].num_rows
    return Plan(
        student=tuple(student),
        teachers=(tuple(teacher),) if teachers_B_G else (),
        target_ids=torch.cat([ids[name][own.to(ids[name].device)] for name, own in with_loss.items()]),
        counts=tuple(tree.counts for tree in student),
        given=tuple((name, ids[name]) for name in asked_names),
    )


def _with_loss(masks: object, names_B_G: Sequence[Sequence[str]], lengths: dict[str, int]) -> dict[str, Tensor]:
    """Returns of each completion, by name, (n,) which of its tokens carry loss."""
    if masks is None:
        return {name: torch.arange(length) for name, length in lengths.items()}
    by_name = {}
    for g, group in entries("masks", masks, groups=len(names_B_G)):
        of_group = entries(f"masks[{g}]", group)
        if len(of_group) != len(names_B_G[g]):
            raise PlanError(f"masks[{g}] must have one per completion, {len(names_B_G[g])}, got {len(of_group)}")
        for name, (i, mask) in zip(names_B_G[g], of_group, strict=True):
            by_name[name] = supervised(f"masks[{g}][{i}]", mask, lengths[name], name)
    return by_name


def supervised(name: str, mask: object, length: int, of: str) -> Tensor:
    """Returns (n,) the positions of the tokens with loss; `of` is whose mask this is."""
    if not isinstance(mask, Tensor) and (isinstance(mask, str) or not isinstance(mask, Sequence)):
        raise PlanTypeError(f"{name} must be a bool tensor or a sequence of bools, got {type(mask).__name__}")
    with_loss = torch.as_tensor(mask).cpu() if len(mask) else torch.empty(0, dtype=torch.bool)
    if with_loss.dtype != torch.bool:
        raise PlanTypeError(f"{name} must be bool, got {with_loss.dtype}")
    if with_loss.shape != (length,):
        raise PlanError(f"{name} must have shape ({length},) as {of} has, got {tuple(with_loss.shape)}")
    return with_loss.nonzero()[:, 0]


def _one_level(
    trunk: Tensor, branches: Sequence[Tensor], tokens: Sequence[Tensor], first: int, *, shared: int = 0, name: str
) -> Tree:
    """Makes the tree of sequences `trunk + branches[i]`, whose last states are asked for, from row `first` on.

    `tokens` are those with loss of each completion, of which a branch ends before the last. Of the trunk the first
    `shared` tokens are the student's too.
    """
    spans = [piece for piece in (trunk[:shared], trunk[shared:]) if len(piece)]
    parents, borrowed = list(range(-1, len(spans) - 1)), [0 if i == 0 and shared else -1 for i in range(len(spans))]
    last, start, rows = len(spans) - 1, len(trunk), [torch.empty(0, dtype=torch.int64)]
    for branch, own in zip(branches, tokens, strict=True):
        positions = own - own[-1:] + len(trunk) + len(branch) - 1
        rows.append(torch.where(positions < len(trunk), positions, positions + start - len(trunk)))
        if len(branch):
            spans.append(branch)
            parents.append(last)
            borrowed.append(-1)
        start += len(branch)
    counts = tuple(map(len, tokens))
    return Tree(
        spans=tuple(spans),
        parents=tuple(parents),
        counts=counts,
        rows=torch.cat(rows),
        places=torch.arange(first, first + sum(counts)),
        borrowed=tuple(borrowed),
        names=(f"{name} and its completions",) * len(counts),
    )


def check_against(plan: Plan, *, vocab_size: int, max_positions: int | None, device: torch.device | str) -> None:
    """Refuses a plan that does not fit a model.

    `vocab_size` is the number of ids that the model can embed, `max_positions` how many tokens it can read (None: any
    number), `device` where it takes its ids. Costs one synchronisation on a GPU. Raises `PlanError`.
    """
    want, have = torch.device(device), plan.device
    if want.type != have.type or (None not in (want.index, have.index) and want.index != have.index):
        raise PlanError(f"the plan's ids must be on the model's device, {want}, got ids on {have}")
    for trees, _ in plan.sides(teacher_shares=False):
        for tree in trees:
            for name, length in zip(tree.names, tree.lengths, strict=True):
                if max_positions is not None and length > max_positions:
                    raise PlanError(
                        f"{name} must have at most {max_positions} tokens, which is what the model has positions for, "
                        f"got {length} (without the last one, which is not read)"
                    )
    named = [(name, ids) for name, ids in plan.given if plan.teachers or not name.startswith(OF_TEACHERS)]
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


def filled(loads: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Puts things into few bins, of each of whose loads none holds more than `most`; what has more is alone in one.

    `loads` says of each thing what it adds to the bin's loads. Returns lists of indices: first fit, the largest first.
    """
    bins: list[tuple[list[int], list[int]]] = []  # of each its loads, and what is in it
    for index in sorted(range(len(loads)), key=lambda i: -max(loads[i])):
        for held, members in bins:
            together = [before + own for before, own in zip(held, loads[index], strict=True)]
            if max(together) <= most:
                held[:] = together
                members.append(index)
                break
        else:
            bins.append((list(loads[index]), [index]))
    return sorted(sorted(members) for _, members in bins)


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


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
