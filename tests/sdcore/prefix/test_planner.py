"""What a plan says against the sequences that it was made from, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdcore.errors import ArgumentError, PlanError, PlanTypeError, SdcoreError
from sdcore.prefix.planner import Plan, buckets, check_against, plan
from sdcore.prefix.tree import Tree
from tests.sdcore.prefix.trees import VOCAB, level, random_ids, random_plan

ids = st.lists(st.integers(0, 1), max_size=5)  # few ids, so that prefixes are often shared
prompt_ids = ids.filter(bool)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[list[list[int]], list[list[list[int]]], Any]:
    groups = draw(st.integers(1, 3))
    prompts = [draw(prompt_ids) for _ in range(groups)]
    completions = [draw(st.lists(ids, min_size=1, max_size=3)) for _ in range(groups)]
    teachers = [
        draw(st.one_of(prompt_ids, st.just(prompt), st.tuples(*[prompt_ids for _ in group]).map(list)))
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    return prompts, completions, teachers


def common(*sequences: list[int]) -> int:
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return len(list(columns))


def teacher_prompt(teachers: Any, g: int, i: int) -> list[int]:
    return teachers[g][i] if isinstance(teachers[g][0], list) else teachers[g]


def tensors(value: Any) -> Any:
    """Lists of ints as int64 tensors, however deep."""
    return torch.tensor(value, dtype=torch.int64) if not value or type(value[0]) is int else [tensors(v) for v in value]


@given(arguments())
def test_a_branch_after_its_trunk_is_what_the_model_would_read(given_: Any) -> None:
    prompts, completions, teachers = given_
    made = plan(*given_)
    for g, group in enumerate(completions):
        for i, completion in enumerate(group):
            if not completion:
                assert made.student[g].counts[i] == made.teacher[g].counts[i] == 0
                assert i not in made.student[g].active
                continue
            read = completion[:-1]
            assert made.student[g].sequence(i).tolist() == prompts[g] + read
            assert made.teacher[g].sequence(i).tolist() == teacher_prompt(teachers, g, i) + read
            assert made.student[g].counts[i] == made.teacher[g].counts[i] == len(completion)
            # Both models' last states predict the completion: the first is the last prompt token's.
            assert len(made.student[g].sequence(i)) - len(completion) == len(prompts[g]) - 1


@given(arguments(), st.randoms(use_true_random=False))
def test_masks_choose_the_rows_of_completions_and_what_is_read_of_them(given_: Any, random: Any) -> None:
    prompts, completions, teachers = given_
    masks = [[[random.random() < 0.5 for _ in ids] for ids in group] for group in completions]
    made = plan(*given_, masks=masks)
    targets = []
    for g, group in enumerate(completions):
        for i, (completion, mask) in enumerate(zip(group, masks[g], strict=True)):
            tokens = [t for t, on in enumerate(mask) if on]
            targets += [completion[t] for t in tokens]
            for tree, prompt in (
                (made.student[g], prompts[g]),
                (made.teacher[g], teacher_prompt(teachers, g, i)),
            ):
                assert tree.positions[tree.slices[i]].tolist() == [len(prompt) - 1 + t for t in tokens]
                assert not tokens or tree.sequence(i).tolist() == prompt + completion[: tokens[-1]]
    assert made.target_ids.tolist() == targets
    everything = plan(*given_, masks=[[torch.ones(len(ids), dtype=torch.bool) for ids in g] for g in completions])
    assert [tree.rows.tolist() for tree in everything.teacher] == [tree.rows.tolist() for tree in plan(*given_).teacher]


@given(arguments())
def test_rows_are_in_the_order_of_group_completion_and_position(given_: Any) -> None:
    completions = given_[1]
    made = plan(*given_)
    assert made.target_ids.tolist() == [token for group in completions for c in group for token in c]
    assert made.num_rows == len(made.target_ids)
    for g, group in enumerate(completions):
        for i, completion in enumerate(group):
            assert made.target_ids[made.rows[g][i]].tolist() == completion
    for trees in (made.student, made.teacher):
        for tree, slices in zip(trees, made.rows, strict=True):
            assert [tree.places[of].tolist() for of in tree.slices] == [list(range(s.start, s.stop)) for s in slices]


@given(arguments())
def test_trunks_are_as_long_as_they_can_be(given_: Any) -> None:
    prompts, completions, teachers = given_
    made = plan(*given_)
    for g, group in enumerate(completions):
        asked = [teacher_prompt(teachers, g, i) for i, completion in enumerate(group) if completion]
        if asked:
            assert len(level(made.student[g]).trunk) == len(prompts[g])
            assert len(level(made.teacher[g]).trunk) == common(*asked)
            # A trunk computes its last token whatever is shared: its state may be asked for.
            assert made.teacher[g].shared == max(0, min(common(*asked, prompts[g]), common(*asked) - 1))
        assert made.student[g].shared == 0


@given(arguments())
def test_lists_int32_and_int64_plan_alike(given_: Any) -> None:
    as_lists, as_tensors = plan(*given_), plan(*(tensors(v) for v in given_))
    as_int32 = plan([torch.tensor(p, dtype=torch.int32) for p in given_[0]], *(tensors(v) for v in given_[1:]))
    for made in (as_tensors, as_int32):
        for mine, other in zip((*as_lists.student, *as_lists.teacher), (*made.student, *made.teacher), strict=True):
            assert all(ids.dtype == torch.int64 for ids in other.spans)
            assert_same_tree(mine, other)


@given(arguments())
def test_tokens_count_what_is_computed(given_: Any) -> None:
    made = plan(*given_)
    for tree in (*made.student, *made.teacher):
        sequences = [tree.sequence(i).tolist() for i in tree.active]
        assert tree.naive_tokens() == sum(map(len, sequences))
        trunk = len(level(tree).trunk)
        distinct = trunk + sum(len(s) - trunk for s in sequences) if sequences else 0
        assert tree.tokens(read_shared=False) == distinct
        assert tree.tokens(read_shared=True) == (distinct - tree.shared if sequences else 0)
        assert tree.num_rows == sum(tree.counts)


def test_one_prompt_for_all_completions_is_the_same_prompt_for_each() -> None:
    arguments = random_ids(0)
    assert arguments.teacher_prompts is not None
    one = plan(*arguments)
    each = plan(
        arguments.student_prompts,
        arguments.completions,
        [[p] * len(c) for p, c in zip(arguments.teacher_prompts, arguments.completions, strict=True)],  # type: ignore[list-item]
    )
    for mine, other in zip(one.teacher, each.teacher, strict=True):
        assert_same_tree(mine, other)


def assert_same_tree(mine: Tree, other: Tree) -> None:
    assert [ids.tolist() for ids in mine.spans] == [ids.tolist() for ids in other.spans]
    for name in ("parents", "counts", "borrowed"):
        assert getattr(mine, name) == getattr(other, name)
    assert torch.equal(mine.rows, other.rows)
    assert torch.equal(mine.places, other.places)


def test_without_teacher_prompts_there_are_no_teacher_trees() -> None:
    made = random_plan(0, teacher="none")
    assert made.teacher == ()
    assert made.num_rows == 30


def test_a_plan_of_nothing_but_empty_completions_has_no_rows() -> None:
    made = plan([[1, 2]], [[[], []]], [[1, 2, 3]])
    assert made.num_rows == 0
    assert made.rows == ((slice(0, 0), slice(0, 0)),)
    assert made.student[0].active == ()
    assert made.student[0].tokens(read_shared=False) == made.teacher[0].tokens(read_shared=True) == 0


def test_the_prompt_of_an_empty_completion_does_not_shorten_the_trunk() -> None:
    made = plan([[1, 2]], [[[5], [], [6]]], [[[1, 2, 3], [9], [1, 2, 4]]])
    assert level(made.teacher[0]).trunk.tolist() == [1, 2]


def test_a_plan_keeps_copies() -> None:
    prompt, completion, context = torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([1, 5, 2])
    made = plan([prompt], [[completion]], [context])
    for given_ in (prompt, completion, context):
        given_.fill_(0)
    assert made.student[0].sequence(0).tolist() == [1, 2, 3]
    assert made.teacher[0].sequence(0).tolist() == [1, 5, 2, 3]
    assert made.target_ids.tolist() == [3, 4]


def test_the_test_plans_have_every_odd_shape() -> None:
    one, each = random_plan(0), random_plan(0, teacher="each")
    shares = [tree.shared for tree in one.teacher]
    assert min(shares) == 0
    assert max(shares) >= 7
    assert {0, 1} < {rows for tree in one.student for rows in tree.counts}
    assert 1 in [len(tree.counts) for tree in one.student]
    assert () in [tree.active for tree in one.student]
    assert 0 in [len(level(tree).trunk) for tree in each.teacher]
    # In one tree some completions' first state is the trunk's last and others' is not.
    tree = each.teacher[4]
    assert [rows - len(b) for rows, b in zip(tree.counts, level(tree).branches, strict=True)][-1] < 1


def call(**changed: Any) -> Callable[[], Plan]:
    """`plan` on two groups of two completions, with the named arguments replaced."""
    good: dict[str, Any] = {
        "student_prompts": [[1, 2], [3]],
        "completions": [[[4, 5], [6]], [[7], []]],
        "teacher_prompts": [[1, 2, 8], [[3, 9], [3, 4]]],
    }
    return lambda: plan(**(good | changed))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (call(student_prompts=[]), r"student_prompts must have at least one group, got none"),
        (call(student_prompts=[[1], []]), r"student_prompts\[1\] must have at least one token, got none"),
        (call(teacher_prompts=[[], [3]]), r"teacher_prompts\[0\] must have at least one token, got none"),
        (call(teacher_prompts=[[1], [[3], []]]), r"teacher_prompts\[1\]\[1\] must have at least one token, got none"),
        (
            call(completions=[[[4]]]),
            r"completions must have one entry per group, 2 as student_prompts has, got 1",
        ),
        (
            call(teacher_prompts=[[1], [2], [3]]),
            r"teacher_prompts must have one entry per group, 2 as student_prompts has, got 3",
        ),
        (
            call(teacher_prompts=[[1], [[3], [4], [5]]]),
            r"teacher_prompts\[1\] must be one prompt or have one per completion, 2 as completions\[1\] has, got 3",
        ),
        (call(completions=[[[4]], []]), r"completions\[1\] must have at least one completion \(it may be empty\)"),
        (
            call(student_prompts=[torch.ones(2, 3, dtype=torch.int64), [1]]),
            r"student_prompts\[0\] must be 1-D, one sequence without padding, got shape \(2, 3\)",
        ),
        (
            call(completions=[[[4]], [[5], [6, -100, -1]]]),
            r"completions\[1\]\[1\] must have no negative ids \(cut off padding and ignored tokens\), got -100",
        ),
        (call(student_prompts=[[-1], [3]]), r"student_prompts\[0\] must have no negative ids"),
        (call(teacher_prompts=[[1], [[3], [-2]]]), r"teacher_prompts\[1\]\[1\] must have no negative ids .*, got -2"),
        (
            call(
                student_prompts=[torch.tensor([1, 2]), [3]],
                completions=[[[4, 5], [6]], [torch.ones(2, dtype=torch.int64, device="meta"), []]],
            ),
            r"completions\[1\]\[0\] must be on cpu as student_prompts\[0\] is, got meta",
        ),
        (call(masks=[[[True] * 2, [True]]]), r"masks must have one entry per group, 2 as student_prompts has, got 1"),
        (call(masks=[[[True] * 2], [[True], []]]), r"masks\[0\] must have one per completion, 2, got 1"),
        (
            call(masks=[[[True] * 2, [True]], [[True], [True]]]),
            r"masks\[1\]\[1\] must have shape \(0,\) as completions\[1\]\[1\] has, got \(1,\)",
        ),
    ],
)
def test_bad_values_are_refused_by_name(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SdcoreError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            call(student_prompts=[torch.ones(2), [3]]),
            r"student_prompts\[0\] must be int64 or int32 ids, got torch.float32",
        ),
        (
            call(completions=[[torch.ones(2, dtype=torch.bool), [6]], [[7], []]]),
            r"completions\[0\]\[0\] must be int64 or int32 ids, got torch.bool",
        ),
        (call(student_prompts=[[1, 2.0], [3]]), r"student_prompts\[0\] must be .* of ints, got float at position 1"),
        (call(student_prompts=[[True], [3]]), r"student_prompts\[0\] must be .* of ints, got bool at position 0"),
        (call(student_prompts=["hello", [3]]), r"student_prompts\[0\] must be a 1-D tensor or .* of ints, got str"),
        (call(student_prompts=[None, [3]]), r"student_prompts\[0\] must be a 1-D tensor or .* of ints, got NoneType"),
        (call(teacher_prompts=["hello", [3]]), r"teacher_prompts\[0\] must be a 1-D tensor or .* of ints, got str"),
        (
            call(student_prompts=torch.ones(2, 3, dtype=torch.int64)),
            r"student_prompts must be a list, got a tensor of shape \(2, 3\)",
        ),
        (
            call(completions=[torch.ones(2, 3, dtype=torch.int64), [[7], []]]),
            r"completions\[0\] must be a list, got a tensor of shape \(2, 3\)",
        ),
        (call(completions={0: [[4]]}), r"completions must be a list, got dict"),
        (call(completions=[[4, 5], [6, 7]]), r"completions\[0\]\[0\] must be a 1-D tensor or .* of ints, got int"),
        (
            call(teacher_prompts=[[[[1]], [[2]]], [3]]),
            r"teacher_prompts\[0\]\[0\] must be a sequence of ints, got list at position 0",
        ),
        (call(masks=[[[1, 0], [True]], [[True], []]]), r"masks\[0\]\[0\] must be bool, got torch.int64"),
        (call(masks=[[None, [True]], [[True], []]]), r"masks\[0\]\[0\] must be a bool tensor or .*, got NoneType"),
    ],
)
def test_bad_types_are_refused_by_name(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(PlanTypeError, match=message) as caught:
        make()
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, SdcoreError)


def test_a_plan_that_fits_the_model_is_let_through() -> None:
    made = random_plan(0, teacher="each")
    longest = max(len(tree.sequence(i)) for tree in (*made.student, *made.teacher) for i in tree.active)
    check_against(made, vocab_size=VOCAB, max_positions=longest, device="cpu")
    check_against(made, vocab_size=VOCAB, max_positions=None, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1], [64]], [[[2]], [[3]]], None), r"student_prompts\[1\] must be in \[0, V=64\).*, got id 64"),
        (([[1]], [[[2], [3, 99]]], None), r"completions\[0\]\[1\] must be in \[0, V=64\).*, got id 99"),
        (([[1]], [[[2], [99, 3]]], [[1]]), r"completions\[0\]\[1\] must be in \[0, V=64\).*, got id 99"),
        (([[1]], [[[2]]], [[1, 70]]), r"teacher_prompts\[0\] must be in \[0, V=64\).*, got id 70"),
        (
            ([[1]], [[[2, 3], [4]]], [[[1, 5], [1, 70]]]),
            r"teacher_prompts\[0\]\[1\] must be in \[0, V=64\).*, got id 70",
        ),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_by_name(arguments: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_against(plan(*arguments), vocab_size=64, max_positions=None, device="cpu")


def test_sequences_longer_than_the_models_positions_are_refused() -> None:
    made = plan([[1, 2, 3]], [[[4, 5, 6], [7]]], [[1, 2, 3, 8]])
    check_against(made, vocab_size=64, max_positions=6, device="cpu")  # 4 + 2: the last token is not read
    with pytest.raises(PlanError, match=r"teacher_prompts\[0\] and its completions must have at most 5 .*, got 6"):
        check_against(made, vocab_size=64, max_positions=5, device="cpu")
    with pytest.raises(PlanError, match=r"student_prompts\[0\] and its completions must have at most 4 .*, got 5"):
        check_against(made, vocab_size=64, max_positions=4, device="cpu")


def test_a_plan_on_another_device_than_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match="the plan's ids must be on the model's device, cuda:0, got ids on cpu"):
        check_against(random_plan(0), vocab_size=VOCAB, max_positions=None, device="cuda:0")


def tree(**changed: Any) -> Tree:
    """Of two sequences, `0 1 2 3` and `0 1 4`, with the named fields replaced."""
    good: dict[str, Any] = {
        "spans": (tensors([0, 1]), tensors([2, 3]), tensors([4])),
        "parents": (-1, 0, 0),
        "counts": (2, 1),
        "rows": tensors([1, 3, 4]),
        "places": tensors([0, 1, 2]),
        "borrowed": (-1, -1, -1),
        "names": ("first", "second"),
    }
    return Tree(**(good | changed))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tree(parents=(-1, 0)), r"parents and borrowed must be 3 nodes', got \(-1, 0\)"),
        (lambda: tree(borrowed=(0,)), r"parents and borrowed must be 3 nodes', got .* and \(0,\)"),
        (lambda: tree(parents=(-1, -1, 0)), r"parents\[2\] must be -1 or an open node, as depth first .*, got 0"),
        (lambda: tree(parents=(-1, 2, 0)), r"parents\[1\] must be -1 or an open node, as depth first .*, got 2"),
        (lambda: tree(counts=(2, 2)), r"counts must say whose the 3 rows are, got \(2, 2\)"),
        (lambda: tree(places=tensors([0])), r"counts must say whose the 3 rows are, got \(2, 1\)"),
        (lambda: tree(rows=tensors([1, 3, 5])), r"rows must be in \[0, 5\), the tree's tokens, got \[1, 3, 5\]"),
        (
            lambda: tree(rows=tensors([3, 4, 4])),
            r"rows of sequence 0 must go down one path, not borrowed, got \[3, 4\]",
        ),
        (
            lambda: tree(rows=tensors([3, 1, 4])),
            r"rows of sequence 0 must go down one path, not borrowed, got \[3, 1\]",
        ),
        (lambda: tree(borrowed=(7, -1, -1)), r"rows of sequence 0 must go down one path, not borrowed, got \[1, 3\]"),
        (
            lambda: tree(spans=(torch.ones(2), tensors([2, 3]), tensors([4]))),
            r"spans\[0\] must be 1-D int64 of at least one token, got shape \(2,\) and torch.float32",
        ),
        (
            lambda: tree(spans=(tensors([0, 1]), tensors([]), tensors([4]))),
            r"spans\[1\] must be 1-D int64 of at least one token, got shape \(0,\)",
        ),
    ],
)
def test_a_tree_that_contradicts_itself_is_refused(make: Callable[[], Tree], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


lengths = st.lists(st.integers(0, 300), max_size=40)


@given(lengths, st.floats(0, 0.9), st.integers(0, 50), st.one_of(st.none(), st.integers(1, 500)))
def test_buckets_waste_no_more_than_they_may(
    lengths: list[int], most_padding: float, free_padding: int, most_tokens: int | None
) -> None:
    batches = buckets(lengths, most_padding=most_padding, free_padding=free_padding, most_tokens=most_tokens)
    assert sorted(i for bucket in batches for i in bucket) == list(range(len(lengths)))
    for bucket in batches:
        assert bucket == sorted(bucket)
        padded = max(lengths[i] for i in bucket) * len(bucket)
        padding = padded - sum(lengths[i] for i in bucket)
        assert padding <= max(most_padding * padded, free_padding)
        assert most_tokens is None or padded <= most_tokens or len(bucket) == 1
    longest = [max(lengths[i] for i in bucket) for bucket in batches]
    assert longest == sorted(longest, reverse=True)


@given(lengths, st.floats(0, 0.9))
def test_no_two_neighbouring_buckets_could_have_been_one(lengths: list[int], most_padding: float) -> None:
    batches = buckets(lengths, most_padding=most_padding)
    for first, second in itertools.pairwise(batches):
        joined = [*first, max(second, key=lambda i: lengths[i])]
        padded = max(lengths[i] for i in joined) * len(joined)
        assert padded - sum(lengths[i] for i in joined) > most_padding * padded


@given(st.integers(0, 300), st.integers(1, 40))
def test_sequences_of_one_length_are_one_bucket(length: int, count: int) -> None:
    assert buckets([length] * count, most_padding=0.0) == [list(range(count))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: buckets([1], most_padding=1.0), r"most_padding must be in \[0, 1\), got 1.0"),
        (lambda: buckets([1], most_tokens=0), r"most_tokens at least 1, got 0 and 0"),
        (lambda: buckets([1], free_padding=-1), r"free_padding must be at least 0 .* got -1 and None"),
        (lambda: buckets([1, -3]), r"lengths\[1\] must be at least 0, got -3"),
    ],
)
def test_bad_bucket_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


class CountOperations(TorchDispatchMode):
    """Refuses to go on after 1000 operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        assert self.count <= 1000
        return func(*args, **(kwargs or {}))


def test_long_prompts_are_compared_whole_and_not_token_by_token() -> None:
    shared = torch.arange(16_000)
    prompts: list[Tensor] = [torch.cat([shared, torch.tensor([7, i])]) for i in range(8)]
    with CountOperations():
        made = plan([shared], [[torch.tensor([1, 2])] * 8], [prompts])
    assert made.teacher[0].shared == 16_000
