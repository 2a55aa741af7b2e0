"""Trees of any depth: what is planned against brute force, and what strategies compute against single sequences."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sdcore.errors import ArgumentError, PlanError, PlanTypeError
from sdcore.losses import PolicyTerm, Tilted
from sdcore.models import Body, find_body
from sdcore.prefix.choice import STRATEGIES
from sdcore.prefix.costs.count import cost
from sdcore.prefix.planner import Plan, check_against, plan
from sdcore.prefix.runner import run
from sdcore.prefix.trajectories import View, plan_trajectories
from sdcore.step import distill_step, imitate_step, policy_gradient_step, tilt_step, token_logprobs
from sdcore.teachers import Frozen, Live, TrustRegion
from tests.sdcore.prefix.models import (
    CONFIGS,
    HEADS,
    HYBRIDS,
    assert_same_gradients,
    checkpointed,
    double_precision,
    gradients,
    tiny,
    tokens_of,
)
from tests.sdcore.prefix.trees import VOCAB, Conversations, conversations, random_ids

DEEP = ["packed", "cached"]
REFUSED = {"packed": HYBRIDS}  # models that a strategy refuses
CASES = [
    pytest.param(strategy, name, id=f"{strategy}-{name}")
    for strategy in DEEP
    for name in [*CONFIGS, *HEADS]
    if name not in REFUSED.get(strategy, ())
]


# Every token is the same, so that no gradient reaches the keys.
ALIKE = Conversations([[0] * n for n in range(7, 0, -1)], [[False] + [True] * (n - 1) for n in range(7, 0, -1)], [])


@st.composite
def drawn(draw: st.DrawFn) -> Conversations:
    random = draw(st.randoms(use_true_random=False))
    return conversations(random, draw(st.integers(0, 6)), teachers=draw(st.integers(1, 2)))


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))}


def read_of(given_: Conversations) -> list[list[int]]:
    """Of each trajectory what has to be computed: up to the token before the last one with loss."""
    return [
        ids[: max((p for p, on in enumerate(mask) if on), default=0)]
        for ids, mask in zip(given_.trajectories, given_.masks, strict=True)
    ]


@given(drawn())
def test_every_token_with_another_past_is_computed_once(given_: Conversations) -> None:
    made, read = given_.plan, read_of(given_)
    assert sum(tree.tokens(read_shared=False) for tree in made.student) == len(prefixes(read))
    assert sum(tree.naive_tokens() for tree in made.student) == sum(map(len, read))
    for teacher, trees in enumerate(made.teachers):
        views = [view for view in given_.views if view.teacher == teacher]
        asked = [(view, view.ids[: view.positions[-1]]) for view in views]
        everything = {(read[view.trajectory][0], own) for view, ids in asked for own in prefixes([ids])}
        assert sum(tree.tokens(read_shared=False) for tree in trees) == len(everything)
        # Borrowed is what the student has below the same root, up to the first state that a view asks for.
        students = prefixes(read)
        rows = {(read[view.trajectory][0], tuple(view.ids[: view.positions[0]])) for view in views}
        borrowed = {
            (root, own)
            for root, own in everything
            if own[0] == root and own in students and not any((root, own[:n]) in rows for n in range(1, len(own) + 1))
        }
        assert sum(tree.shared for tree in trees) == len(borrowed)


@given(drawn())
def test_rows_are_what_predicts_the_tokens_with_loss(given_: Conversations) -> None:
    made, wanted = given_.plan, given_.rows()
    assert made.target_ids.tolist() == [given_.trajectories[i][position] for i, position in wanted]
    assert [at.stop - at.start for at in made.rows[0]] == [sum(mask) for mask in given_.masks]
    places = torch.cat([tree.places for tree in made.student])
    assert sorted(places.tolist()) == list(range(made.num_rows))
    for tree in made.student:
        for name, of, i in zip(tree.names, tree.slices, range(len(tree.counts)), strict=True):
            own = given_.trajectories[int(name.removeprefix("trajectories[").removesuffix("]"))]
            assert tree.sequence(i).tolist() == own[: tree.lengths[i]]
            assert [own[p + 1] for p in tree.positions[of].tolist()] == made.target_ids[tree.places[of]].tolist()
    scored = torch.ones(made.num_rows, dtype=torch.bool)
    for teacher, trees in enumerate(made.teachers):
        mine = torch.zeros(made.num_rows, dtype=torch.bool)
        for tree in trees:
            mine[tree.places] = True
            for name, of, i in zip(tree.names, tree.slices, range(len(tree.counts)), strict=True):
                view = given_.views[int(name.removeprefix("views[").removesuffix("]"))]
                assert view.teacher == teacher
                assert tree.sequence(i).tolist() == view.ids[: view.positions[-1]]
                assert (tree.positions[of] + 1).tolist() == view.positions
        scored &= mine
    assert (made.scored is None) == bool(scored.all())
    assert made.scored is None or torch.equal(made.scored, scored)


@given(drawn())
def test_borrowed_nodes_are_the_students_tokens(given_: Conversations) -> None:
    made = given_.plan
    for trees in made.teachers:
        for student, teacher in zip(made.student, trees, strict=True):
            flat = torch.cat([*student.spans, torch.empty(0, dtype=torch.int64)])
            for ids, place in zip(teacher.spans, teacher.borrowed, strict=True):
                assert place < 0 or torch.equal(flat[place : place + len(ids)], ids)
            joined = teacher.alone
            assert joined.shared == 0
            assert torch.equal(torch.cat([*joined.spans, flat[:0]]), torch.cat([*teacher.spans, flat[:0]]))
            assert [joined.sequence(i).tolist() for i in joined.active] == [
                teacher.sequence(i).tolist() for i in teacher.active
            ]
            # No node has an only child: what has no branching is one node.
            assert all(len(children) != 1 for children in joined.children[:-1])


def states_and_gradients(body: Body, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(len(hidden)), dtype=torch.float64)
    (hidden * weights).sum().backward()
    grads = gradients(body.causal_lm)
    body.causal_lm.zero_grad()
    return hidden.detach(), grads


def assert_exact(strategy: str, given_: Conversations, model: Any, plain: Any) -> None:
    """The student's states and gradients, a live teacher's and one's with other weights, against single sequences."""
    made, module, body, alone = given_.plan, STRATEGIES[strategy], find_body(model), find_body(plain)
    if not made.num_rows:
        return
    with double_precision():
        expected, expected_grads = states_and_gradients(alone, given_.student(alone))
        record = [tree.reads for tree in made.teacher] if made.teacher and strategy != "naive" else False
        hidden, prompts = module.hidden_states(body, made.student, record=record)
        if made.teacher:
            with torch.no_grad():
                of_views, scored = given_.teacher(alone)
                live, _ = module.hidden_states(body, made.teacher, prompts=prompts)
                other, _ = module.hidden_states(body, made.teacher)
            assert _most(live - of_views[scored]) < 1e-10
            assert _most(other - of_views[scored]) < 1e-10
        hidden, grads = states_and_gradients(body, hidden)
    assert _most(hidden - expected) < 1e-10
    largest = max(float(grad.norm()) for grad in expected_grads.values())
    for parameter in grads.keys() | expected_grads.keys():
        # An expert that no token was sent to may have no gradient. What one token alone sees, and keys that are all
        # alike, have none but rounding, which is of the others' size.
        mine, other = (of_all.get(parameter, torch.zeros(())) for of_all in (grads, expected_grads))
        assert float((mine - other).norm()) <= 1e-9 * float(other.norm()) + 1e-12 * largest, parameter


def _most(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("strategy", "name"), CASES)
def test_trees_of_each_depth_are_exact(strategy: str, name: str, checkpointing: bool) -> None:
    plain, model = tiny(name), tiny(name)
    if checkpointing:
        checkpointed(model)
    for depth in range(1, 7):
        assert_exact(strategy, conversations(Random(depth), depth), model, plain)


@pytest.mark.parametrize("strategy", ["naive", *DEEP])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_drawn_trees_are_exact(strategy: str, name: str) -> None:
    plain, model = tiny(name), tiny(name)

    @given(drawn())
    @example(ALIKE)
    def check(given_: Conversations) -> None:
        assert_exact(strategy, given_, model, plain)

    check()


def test_packed_gives_the_model_the_tries_tokens_and_no_other() -> None:
    model, frozen = tiny("llama"), tiny("llama", seed=1)
    seen, of_frozen = tokens_of(model), tokens_of(frozen)
    for depth in range(1, 7):
        given_ = conversations(Random(depth), depth)
        made, read = given_.plan, read_of(given_)
        counted = cost(made, model.config)
        for live in (True, False):
            seen.clear()
            of_frozen.clear()
            run(model, made, Live() if live else Frozen(frozen), strategy="packed", verify="off")
            student = len(prefixes(read))
            teacher = sum(tree.tokens(read_shared=live) for tree in made.teacher)
            assert sum(seen) + sum(of_frozen) == student + teacher
        assert counted.teacher is not None
        assert (counted.student.tokens, counted.student.naive_tokens) == (student, sum(map(len, read)))
        assert counted.teacher.tokens == sum(tree.tokens(read_shared=True) for tree in made.teacher)


def one_trajectory(count: int) -> Conversations:
    """A conversation of so many turns with loss, each with a view that has a hint before the turn."""
    draw = Random(0)
    ids, mask, views = [draw.randrange(VOCAB) for _ in range(10)], [False] * 10, []
    for _ in range(count):
        turn = [draw.randrange(VOCAB - 1) for _ in range(8)]
        hint = [VOCAB - 1] * 5  # no turn begins so
        tokens = range(len(ids), len(ids) + len(turn))
        views.append(
            View(
                ids=[*ids, *hint, *turn],
                trajectory=0,
                tokens=list(tokens),
                positions=[token + len(hint) for token in tokens],
            )
        )
        ids, mask = [*ids, *turn, *(draw.randrange(VOCAB - 1) for _ in range(4))], [*mask, *[True] * 8, *[False] * 4]
    return Conversations([ids], [mask], views)


def test_views_of_turns_cost_their_own_tokens_only() -> None:
    """T turns with a view each: T hints and T turns, not T times the trajectory."""
    made = one_trajectory(12).plan
    (student,), (teacher,) = made.student, made.teacher
    assert len(student.spans) == 1
    assert teacher.tokens(read_shared=True) == 12 * (5 + 8 - 1)
    assert teacher.naive_tokens() > 5 * teacher.tokens(read_shared=True)


def test_one_level_is_planned_alike_by_both() -> None:
    arguments = random_ids(3, teacher="none")
    groups = [g for g, group in enumerate(arguments.completions) if any(len(c) > 0 for c in group)]
    one = plan([arguments.student_prompts[g] for g in groups], [arguments.completions[g] for g in groups])
    sequences, masks = [], []
    for g in groups:
        for completion in arguments.completions[g]:
            sequences.append(torch.cat([arguments.student_prompts[g], completion]))
            masks.append(torch.arange(len(sequences[-1])) >= len(arguments.student_prompts[g]))
    sizes = [len(arguments.completions[g]) for g in groups]
    two = plan_trajectories(sequences, masks, groups=sizes)
    assert torch.equal(one.target_ids, two.target_ids)
    assert one.counts == two.counts
    assert one.rows == two.rows
    for mine, other in zip(one.student, two.student, strict=True):
        assert mine.tokens(read_shared=False) == other.tokens(read_shared=False)
        assert torch.equal(mine.places, other.places)


def test_thousands_of_tokens_and_hundreds_of_sequences_are_compared_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(1000, (4000,), generator=draw)
    turns = [torch.randint(1000, (500,), generator=draw) for _ in range(8)]
    sequences = [torch.cat([prompt, *turns[: i % 8], torch.tensor([i])]) for i in range(200)]
    masks = [torch.arange(len(ids)) == len(ids) - 1 for ids in sequences]
    operations = Operations()
    with operations:
        made = plan_trajectories(sequences, masks)
    assert made.student[0].tokens(read_shared=False) == 4000 + 7 * 500
    assert operations.count < 200 * 200


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_without_a_token_with_loss_there_is_nothing_to_compute() -> None:
    model = tiny("llama")
    made = plan_trajectories([[1, 2, 3], [4, 5]], [[False] * 3, [False] * 2], [])
    assert made.num_rows == 0
    assert made.rows == ((slice(0, 0), slice(0, 0)),)
    for strategy in STRATEGIES:
        model.zero_grad()
        out = imitate_step(model, made, strategy=strategy, verify="off")  # type: ignore[arg-type]
        assert float(out.loss) == 0
        assert all(not grad.any() for grad in gradients(model.base_model).values())
    views = [View(ids=[7, 2, 3], trajectory=0, tokens=[], positions=[])]
    nothing = plan_trajectories([[1, 2, 3]], [[False] * 3], views)
    assert float(distill_step(model, nothing, verify="off").loss) == 0


def call(**changed: Any) -> Callable[[], Plan]:
    good: dict[str, Any] = {
        "trajectories": [[1, 2, 3, 4], [1, 2, 5]],
        "masks": [[False, False, True, True], [False, True, True]],
        "views": [View(ids=[9, 2, 3, 4], trajectory=0, tokens=[2, 3], positions=[2, 3])],
    }
    return lambda: plan_trajectories(**(good | changed))


def view(**changed: Any) -> list[View]:
    good: dict[str, Any] = {"ids": [9, 2, 3, 4], "trajectory": 0, "tokens": [2, 3], "positions": [2, 3]}
    return [View(**(good | changed))]


@pytest.mark.parametrize("teacher", [0, 1])
def test_a_teacher_without_views_in_a_batch_is_there_all_the_same(teacher: int) -> None:
    planned = call(views=view(teacher=teacher), teachers=2)()
    assert [sum(tree.num_rows for tree in trees) for trees in planned.teachers] == [2 - 2 * teacher, 2 * teacher]
    assert not planned.scored.any()  # a step of two teachers needs both
    assert len(call(views=[], teachers=1)().teachers) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (call(trajectories=[], masks=[]), "trajectories must have at least one trajectory, got none"),
        (call(trajectories=[[1, 2, 3, 4], []]), r"trajectories\[1\] must have at least one token, got none"),
        (call(trajectories=[[1, -2, 3, 4], [1, 2, 5]]), r"trajectories\[0\] must have no negative ids .*, got -2"),
        (call(masks=[[False] * 4]), "masks must have one entry per trajectory, 2, got 1"),
        (call(masks=[[False] * 4, [False, True]]), r"masks\[1\] must have shape \(3,\) as trajectories\[1\] .* \(2,\)"),
        (call(masks=[[True] * 4, [False] * 3]), r"masks\[0\] must not be true at position 0"),
        (call(groups=[1, 2]), r"groups must add up to the 2 trajectories, got \[1, 2\]"),
        (call(views=view(trajectory=2)), r"views\[0\] must have a trajectory in \[0, 2\), got 2"),
        (call(views=view(teacher=-1)), r"views must have teachers counted from 0, got \[-1\]"),
        (call(views=view(teacher=1)), r"views must have teachers counted from 0, got \[1\]"),
        (call(views=view(teacher=2), teachers=2), r"views must have a teacher below teachers=2, got \[2\]"),
        (call(views=view(positions=[3])), r"views\[0\] must have as many positions as tokens, .* \(2,\) and \(1,\)"),
        (call(views=view(tokens=[3, 2])), r"views\[0\] must have tokens in \[1, 4\), ascending, got \[3, 2\]"),
        (call(views=view(positions=[3, 4])), r"views\[0\] must have positions in \[1, 4\), ascending, got \[3, 4\]"),
        (call(views=view(positions=[0, 3])), r"views\[0\] must have positions in \[1, 4\), ascending, got \[0, 3\]"),
        (
            call(views=view(tokens=[1, 3], positions=[1, 3])),
            r"views\[0\] must score tokens with loss, got token 1, where masks\[0\] is false",
        ),
        (
            call(views=view(ids=[9, 2, 3, 8])),
            r"views\[0\] must have at position 3 token 3 of trajectories\[0\], which is id 4, got id 8",
        ),
        (
            call(views=[*view(), *view(tokens=[3], positions=[3])]),
            r"views\[1\] must not score token 3 of trajectories\[0\], as views\[0\] of the same teacher does",
        ),
    ],
)
def test_bad_trajectories_are_refused_with_their_index(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (call(trajectories=[[1, 2.0, 3, 4], [1, 2, 5]]), r"trajectories\[0\] must be .* of ints, got float"),
        (call(masks=[[0, 0, 1, 1], [False] * 3]), r"masks\[0\] must be bool, got torch.int64"),
        (call(masks=["0011", [False] * 3]), r"masks\[0\] must be a bool tensor or a sequence of bools, got str"),
        (call(views=[[1, 2]]), r"views\[0\] must be a View, got list"),
        (call(views=view(ids="abc")), r"views\[0\] must be a 1-D tensor or .* of ints, got str"),
    ],
)
def test_bad_types_are_refused_with_their_index(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(PlanTypeError, match=message):
        make()


def test_what_the_model_has_no_positions_or_ids_for_is_refused_by_name() -> None:
    made = call(views=view(ids=[9, 9, 9, 2, 3, 4], positions=[4, 5]))()
    check_against(made, vocab_size=10, max_positions=5, device="cpu")
    with pytest.raises(PlanError, match=r"views\[0\] must have at most 4 tokens, .*, got 5"):
        check_against(made, vocab_size=10, max_positions=4, device="cpu")
    with pytest.raises(PlanError, match=r"trajectories\[0\] must have at most 2 tokens, .*, got 3"):
        check_against(made, vocab_size=10, max_positions=2, device="cpu")
    with pytest.raises(PlanError, match=r"views\[0\] must be in \[0, V=9\), the model's vocabulary, got id 9"):
        check_against(made, vocab_size=9, max_positions=None, device="cpu")


def logits_of(model: Any, sequences: list[list[int]], rows: list[tuple[int, int]]) -> Tensor:
    """(n, V) what predicts the token at each (sequence, position), of the whole model, one sequence at a time."""
    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]
    return torch.stack([logits[i][position - 1] for i, position in rows])


def teacher_rows_of(given_: Conversations, teacher: int = 0) -> dict[int, tuple[int, int]]:
    """Row → (view, position), of what this teacher scores."""
    rows = {row: n for n, row in enumerate(given_.rows())}
    return {
        rows[view.trajectory, int(token)]: (v, int(position))
        for v, view in enumerate(given_.views)
        if view.teacher == teacher
        for token, position in zip(view.tokens, view.positions, strict=True)
    }


def log_probs(model: Any, given_: Conversations, rows: dict[int, tuple[int, int]], which: list[int]) -> Tensor:
    with torch.no_grad():
        return logits_of(model, [view.ids for view in given_.views], [rows[n] for n in which]).log_softmax(-1)


def assert_step(model: Any, out: Any, loss: Tensor, expected: dict[str, Tensor]) -> None:
    assert float(out.loss) == pytest.approx(float(loss), rel=1e-9)
    assert_same_gradients(gradients(model), expected, 1e-8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_of_distillation_is_that_of_its_scored_tokens(strategy: Any) -> None:
    given_ = conversations(Random(3), 3)
    made = given_.plan
    assert made.scored is not None
    which = made.scored.nonzero()[:, 0].tolist()
    plain, model = tiny("llama"), tiny("llama")
    with double_precision():
        log_p = logits_of(plain, given_.trajectories, [given_.rows()[n] for n in which]).log_softmax(-1)
        log_q = log_probs(plain, given_, teacher_rows_of(given_), which)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss.backward()
        out = distill_step(model, made, strategy=strategy, verify="off")
        assert_step(model, out, loss, gradients(plain))
    assert float(out.metrics["loss/active_tokens"]) == len(which)
    assert float(out.metrics["loss/unscored_tokens"]) == made.num_rows - len(which) > 0
    unscored = torch.ones(made.num_rows, dtype=torch.bool)
    unscored[which] = False
    assert not out.rows["per_token"][unscored].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_teachers_read_views_of_their_own(strategy: Any) -> None:
    """A trust region mixes the logits of what its reference reads with those of what the student itself reads."""
    given_ = conversations(Random(8), 2, teachers=2, unscored=0.1)
    made = given_.plan
    assert made.scored is not None
    assert len(made.teachers) == 2
    which = made.scored.nonzero()[:, 0].tolist()
    plain, model, reference = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    with double_precision():
        log_p = logits_of(plain, given_.trajectories, [given_.rows()[n] for n in which]).log_softmax(-1)
        of_reference = log_probs(reference, given_, teacher_rows_of(given_, 0), which)
        of_live = log_probs(plain, given_, teacher_rows_of(given_, 1), which)
        log_q = (0.7 * of_reference + 0.3 * of_live).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss.backward()
        out = distill_step(model, made, teacher=TrustRegion(Frozen(reference), 0.3), strategy=strategy, verify="off")
        assert_step(model, out, loss, gradients(plain))
    with pytest.raises(ArgumentError, match="plan must have views of one teacher or 1, got 2"):
        distill_step(model, made, strategy=strategy, verify="off")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_other_steps_take_trees_of_turns(strategy: Any) -> None:
    given_ = conversations(Random(5), 3)
    made = plan_trajectories(given_.trajectories, given_.masks, groups=[3, len(given_.trajectories) - 3])
    plain, model, reference = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    options: dict[str, Any] = {"strategy": strategy, "verify": "off"}
    targets = made.target_ids[:, None]

    def logprobs(model: Any) -> Tensor:
        return logits_of(model, given_.trajectories, given_.rows()).log_softmax(-1).gather(1, targets)[:, 0]

    with double_precision():
        own = logprobs(plain)
        assert _most(token_logprobs(model, made, **options) - own.detach()) < 1e-9
        loss = -own.mean()
        loss.backward()
        assert_step(model, imitate_step(model, made, **options), loss, gradients(plain))

        for each in (plain, model):
            each.zero_grad()
        advantages = torch.linspace(-1, 1, made.num_rows, dtype=torch.float64)
        loss = -(advantages * (logprobs(plain) - own.detach()).exp()).mean()
        loss.backward()
        policy = PolicyTerm(advantages=advantages, old_logprobs=own.detach(), clip_low=None, clip_high=None)
        out = policy_gradient_step(model, made, policy, **options)
        assert_same_gradients(gradients(model), gradients(plain), 1e-8)

        for each in (plain, model):
            each.zero_grad()
        rewards = torch.linspace(0, 1, len(given_.trajectories), dtype=torch.float64)
        target = Tilted(inv_temperature=1.5)
        out = tilt_step(model, made, rewards, target=target, reference=Frozen(reference), **options)
        with torch.no_grad():
            of_reference = logprobs(reference)
        sums = [
            torch.stack([x[at].sum() for at in made.rows[0] + made.rows[1]]) for x in (logprobs(plain), of_reference)
        ]
        active = torch.tensor([any(mask) for mask in given_.masks])
        loss = target.loss(*sums, rewards, [len(group) for group in made.rows], active=active).loss
        loss.backward()
        assert_step(model, out, loss, gradients(plain))
