"""Plans of random ids for the tests of the shared-prefix scheme, with every odd shape in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from sdcore.models import Body
from sdcore.prefix.planner import Plan, plan
from sdcore.prefix.trajectories import View, plan_trajectories
from sdcore.prefix.tree import Tree

VOCAB = 61  # as the models of `models.py` have
# Completion lengths per group: one token, none, one completion alone, all of them empty.
SIZES = ((4, 1, 0, 7), (5,), (1, 1), (0, 0), (3, 6, 2))
PROMPTS = (9, 12, 1, 4, 17)  # tokens of the students' prompts


class Ids(NamedTuple):
    """The arguments of `plan`."""

    student_prompts: list[Tensor]
    completions: list[list[Tensor]]
    teacher_prompts: list[Tensor] | list[list[Tensor]] | None


def random_ids(
    seed: int,
    *,
    teacher: str = "one",
    prompts: Sequence[int] = PROMPTS,
    sizes: Sequence[Sequence[int]] = SIZES,
    context: int = 6,
    vocab: int = VOCAB,
    device: str = "cpu",
) -> Ids:
    """Groups of different P, C, R and G; `teacher` is "one" prompt per group, "each" completion its own, or "none".

    A teacher's prompt is the student's with about `context` tokens put in: in group 0 before the last two tokens, in
    group 1 before the first (nothing is shared), in group 2 after the last (with "each" before the first: the trunk is
    empty), and group 3 has none (the prompts are equal); then it starts again. With "each" the last of several prompts
    of a group has no context, so it is the student's.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(vocab, (length,), generator=draw).to(device)

    def with_context(g: int, prompt: Tensor, length: int) -> Tensor:
        place = (max(0, len(prompt) - 2), 0, 0 if teacher == "each" else len(prompt), 0)[g % 4]
        inserted = ids(0 if g % 4 == 3 else length)
        if place == 0 and len(inserted):
            inserted[0] = (prompt[0] + 1) % vocab  # not by chance alike
        return torch.cat([prompt[:place], inserted, prompt[place:]])

    student = [ids(length) for length in prompts]
    completions = [[ids(length) for length in group] for group in sizes]
    if teacher == "none":
        return Ids(student, completions, None)
    if teacher == "one":
        return Ids(student, completions, [with_context(g, p, context + g) for g, p in enumerate(student)])
    assert teacher == "each", teacher
    each = []
    for g, prompt in enumerate(student):
        count = len(sizes[g])
        contexts = [context + i if i < count - 1 or count == 1 else 0 for i in range(count)]
        each.append([with_context(g, prompt, length) for length in contexts])
    return Ids(student, completions, each)


def random_plan(
    seed: int,
    *,
    teacher: str = "one",
    prompts: Sequence[int] = PROMPTS,
    sizes: Sequence[Sequence[int]] = SIZES,
    context: int = 6,
    vocab: int = VOCAB,
    device: str = "cpu",
) -> Plan:
    """The plan of `random_ids`."""
    return plan(
        *random_ids(seed, teacher=teacher, prompts=prompts, sizes=sizes, context=context, vocab=vocab, device=device)
    )


class Level(NamedTuple):
    """A tree of one level, read as a trunk and a branch per sequence."""

    trunk: Tensor
    branches: list[Tensor]


def level(tree: Tree) -> Level:
    assert tree.depth <= 1
    tree = tree.alone
    trunk = tree.spans[0] if len(tree.children[-1]) == 1 else torch.empty(0, dtype=torch.int64)
    return Level(trunk, [tree.sequence(i)[len(trunk) :] if n else trunk[:0] for i, n in enumerate(tree.counts)])


class Conversations(NamedTuple):
    """The arguments of `plan_trajectories`."""

    trajectories: list[list[int]]
    masks: list[list[bool]]
    views: list[View]

    @property
    def plan(self) -> Plan:
        return plan_trajectories(*self)

    def rows(self) -> list[tuple[int, int]]:
        """(trajectory, position) of each token with loss."""
        return [(i, p) for i, mask in enumerate(self.masks) for p, on in enumerate(mask) if on]

    def student(self, body: Body) -> Tensor:
        """(N, H) by definition: each trajectory a sequence alone."""
        states = [body(torch.tensor([ids]))[0] for ids in self.trajectories]
        rows = [states[i][position - 1] for i, position in self.rows()]
        return torch.stack(rows) if rows else torch.empty(0, body.hidden_size)

    def teacher(self, body: Body, teacher: int = 0) -> tuple[Tensor, Tensor]:
        """(N, H) of each view alone, 0 where there is none, and (N,) bool where there is one."""
        rows = {row: n for n, row in enumerate(self.rows())}
        hidden = torch.zeros(len(rows), body.hidden_size, dtype=body.dtype)
        scored = torch.zeros(len(rows), dtype=torch.bool)
        for view in self.views:
            if view.teacher == teacher:
                states = body(torch.tensor([view.ids]))[0]
                for token, position in zip(view.tokens, view.positions, strict=True):
                    n = rows[view.trajectory, int(token)]
                    hidden[n], scored[n] = states[position - 1], True
        return hidden, scored


def conversations(
    draw: Random, depth: int, *, teachers: int = 1, unscored: float = 0.2, wide: bool = False
) -> Conversations:
    """Trees of turns of this depth, some of which end early or begin elsewhere; masks with holes, views of stretches.

    A view puts up to 4 tokens in somewhere before the tokens that it scores, and goes on a little behind them. If
    `wide`, there are more branches, and a view leaves the trajectory just before its tokens, of which the first with
    loss have none, so that deep nodes are borrowed: one in which a view has rows is borrowed by none.
    """
    most = 3 if depth < 3 or wide else 2

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(least, most))]

    def grow(before: list[int], levels: int) -> list[list[int]]:
        here = before + ids(1, 6)
        if not levels:
            return [here]
        grown: list[list[int]] = []
        for branch in range(draw.randint(1, most)):
            ends = wide and branch > 0 and draw.random() < 0.3
            grown += grow(here, 0 if ends else levels - 1)
        return [*grown, here] if draw.random() < 0.2 else grown

    trajectories = [ids for _ in range(2 if wide else draw.randint(1, 2)) for ids in grow([], depth)]
    draw.shuffle(trajectories)
    masks = [[False, *(draw.random() < 0.4 for _ in ids[1:])] for ids in trajectories]
    views = []
    last = max((position for mask in masks for position, on in enumerate(mask) if on), default=0)
    earliest = draw.randint(0, min(25, last)) if wide else 0
    for i, (own, mask) in enumerate(zip(trajectories, masks, strict=True)):
        for teacher in range(teachers):
            left = [position for position, on in enumerate(mask) if on and position >= earliest]
            while left:
                count = draw.randint(1, len(left))
                tokens, left = left[:count], left[count:]
                if draw.random() < unscored:
                    continue
                place, context = draw.randint(max(0, tokens[0] - 3) if wide else 0, tokens[0]), ids(0, 4)
                read = [*own[:place], *context, *own[place : tokens[-1] + 1 + draw.randint(0, 2)]]
                if place + len(context):
                    positions = [token + len(context) for token in tokens]
                    views.append(View(ids=read, trajectory=i, tokens=tokens, positions=positions, teacher=teacher))
    draw.shuffle(views)
    used = sorted({view.teacher for view in views})
    views = [replace(view, teacher=used.index(view.teacher)) for view in views]
    return Conversations(trajectories, masks, views)


def turns() -> Plan:
    """Trees of depth 4 with views that leave them at inner nodes."""
    return conversations(Random(5), 4).plan


def short_plan(*, teacher: bool = True) -> Plan:
    """One group, three completions of one length, and a context that comes late."""
    prompt = list(range(1, 20))
    completions = [[[21, 22, 23], [24, 25, 26], [27, 28, 29]]]
    return plan([prompt], completions, [[*prompt[:-2], 50, 51, *prompt[-2:]]] if teacher else None)
