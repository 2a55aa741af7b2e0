"""What a report says of a plan, and that a person can read it."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from sdcore.prefix.costs.count import cost
from sdcore.prefix.costs.sizes import ModelSizes
from sdcore.prefix.planner import plan
from sdcore.prefix.report import Choice, Fallback, Report
from sdcore.prefix.trajectories import plan_trajectories
from tests.sdcore.prefix.trees import conversations, random_plan, turns

SIZES = ModelSizes.dense(layers=2, hidden=8, intermediate=16, heads=2, vocab=61)


def test_a_report_has_the_numbers_of_its_cost() -> None:
    made = random_plan(0)
    counted = cost(made, SIZES, teacher_shares=True)
    report = Report.of(made, counted, student=Choice("packed"), teacher_shares=True)
    assert report.teacher is not None
    assert counted.teacher is not None
    for mine, its in ((report.student, counted.student), (report.teacher, counted.teacher)):
        assert (mine.tokens, mine.naive_tokens) == (its.tokens, its.naive_tokens)
        assert (mine.flops, mine.naive_flops) == (its.flops, its.naive_flops)
    assert report.speedup == counted.speedup
    assert report.step_speedup == counted.step_speedup
    assert report.shared_tokens == tuple(tree.shared for tree in made.teacher)
    assert report.shared_fractions == tuple(
        t.shared / len(s.spans[0]) for t, s in zip(made.teacher, made.student, strict=True)
    )
    assert math.isclose(report.metrics["prefix/shared_fraction"], sum(report.shared_tokens) / (9 + 12 + 1 + 4 + 17))
    assert report.metrics["prefix/student_tokens"] == counted.student.tokens


def test_a_pass_that_fell_back_to_naive_is_counted_as_naive() -> None:
    made = random_plan(0)
    counted = cost(made, SIZES)
    report = Report.of(
        made, counted, student=Choice("packed"), teachers=[Choice("naive", "it is wrapped")], teacher_shares=True
    )
    assert report.teacher is not None
    assert counted.teacher is not None
    assert report.teacher.tokens == report.teacher.naive_tokens == counted.teacher.naive_tokens
    assert report.teacher.flops == counted.teacher.naive_flops
    assert report.speedup == counted.naive_flops / (counted.student.flops + counted.teacher.naive_flops)
    assert "Teacher pass: naive (it is wrapped), 184 tokens, as many as a naive pass computes." in str(report)
    assert "60 % of the student's (0 % to 100 % over 5 groups), but a naive pass computed them again." in str(report)


def test_a_report_reads_as_a_paragraph() -> None:
    shared = list(range(40))
    made = plan([shared], [[[1] * 10, [2] * 10]], [[*shared[:38], 60, 60, *shared[38:]]])
    counted = cost(made, SIZES)
    assert counted.teacher is not None
    report = Report.of(
        made,
        counted,
        student=Choice("cached", "the fastest on this device", padding=0.104),
        teacher_shares=True,
        fallbacks=[Fallback("packed", "layer 3 is recurrent")],
    )
    assert str(report) == (
        "Student pass: cached (the fastest on this device), 58 tokens where a naive pass computes 98, "
        f"{counted.student.speedup:.1f}× fewer FLOPs, 10 % of its batches is padding. "
        "Teacher pass: cached (the fastest on this device), 22 tokens where a naive pass computes 102, "
        f"{counted.teacher.speedup:.1f}× fewer FLOPs, 10 % of its batches is padding. "
        "The teacher's prompts begin with 95 % of the student's, which it read from the student's pass. "
        f"Together {counted.speedup:.1f}× fewer FLOPs than naive, {counted.step_speedup:.1f}× with the lm_head. "
        "Not packed: layer 3 is recurrent."
    )


def test_a_report_of_turns_says_how_deep_they_fork_and_what_the_views_read() -> None:
    made = turns()
    report = Report.of(made, cost(made, SIZES), student=Choice("packed"), teacher_shares=True)
    assert report.student.depth == made.student[0].depth > 1
    assert f"(trees of depth {report.student.depth})" in str(report)
    assert report.prompt_tokens == tuple(tree.starts[-1] for tree in made.student)
    assert "The teacher's views begin with " in str(report)
    assert report.teacher is not None
    assert report.teacher.tokens == sum(tree.tokens(read_shared=True) for tree in made.teacher)


def test_a_report_counts_every_teacher() -> None:
    made = conversations(Random(8), 2, teachers=2, unscored=0.1).plan
    counted = cost(made, SIZES)
    teachers = [Choice("naive"), Choice("packed")]
    report = Report.of(made, counted, student=Choice("packed"), teachers=teachers, teacher_shares=True)
    sides = zip(made.teachers, (False, True), strict=True)
    read = [sum(tree.tokens(read_shared=shared) for tree in trees) for trees, shared in sides]
    naive = [sum(tree.naive_tokens() for tree in trees) for trees in made.teachers]
    assert read[0] < naive[0]
    assert [of_teacher.tokens for of_teacher in counted.teachers] == read
    assert counted.tokens == counted.student.tokens + sum(read)
    assert [of_teacher.tokens for of_teacher in report.teachers] == [naive[0], read[1]]
    assert report.metrics["prefix/teacher_tokens"] == naive[0] + read[1]
    assert report.teacher is report.teachers[1]
    one = cost(replace(made, teachers=made.teachers[:1]), SIZES)
    hidden, vocab = SIZES.hidden, SIZES.vocab
    assert counted.head_flops - one.head_flops == 2 * made.num_rows * hidden * vocab
    assert counted.naive_flops - one.naive_flops == counted.teachers[1].naive_flops > 0
    assert f"Teacher 0 pass: naive, {naive[0]:,} tokens" in str(report)
    assert f"Teacher 1 pass: packed, {read[1]:,} tokens" in str(report)


def test_a_report_says_why_little_or_nothing_was_read_from_the_student() -> None:
    made = plan([[1, 2, 3, 4], [5]], [[[1]], [[1]]], [[1, 9, 2, 3, 4], [6, 5]])
    frozen = Report.of(made, None, student=Choice("packed"), teacher_shares=False)
    live = Report.of(made, None, student=Choice("packed"), teacher_shares=True)
    assert "begin with 20 % of the student's (0 % to 25 % over 2 groups), but it has other weights" in str(frozen)
    assert "context that comes later in the prompt shares more" in str(live)


def test_without_a_cost_or_a_teacher_the_rest_is_reported() -> None:
    made = random_plan(0, teacher="none")
    report = Report.of(made, None, student=Choice("naive", "asked for"))
    assert report.teacher is None
    assert report.speedup is report.step_speedup is None
    assert report.shared_fractions == ()
    assert "prefix/speedup" not in report.metrics
    assert "prefix/shared_fraction" not in report.metrics
    assert str(report) == "Student pass: naive (asked for), 113 tokens, as many as a naive pass computes."


def test_a_plan_without_rows_can_be_reported() -> None:
    made = plan([[1, 2]], [[[]]], [[1, 2]])
    report = Report.of(made, cost(made, SIZES), student=Choice("packed"))
    assert (report.student.tokens, report.speedup) == (0, None)
    assert str(report)


def test_trajectories_of_which_no_token_has_a_loss_can_be_reported() -> None:
    made = plan_trajectories([[1, 2, 3]], [[False] * 3], [], teachers=1)
    report = Report.of(made, cost(made, SIZES), student=Choice("packed"), teacher_shares=True)
    assert report.shared_fractions == (0.0,)
    assert report.metrics["prefix/shared_fraction"] == 0.0
    assert "0 tokens" in str(report)
