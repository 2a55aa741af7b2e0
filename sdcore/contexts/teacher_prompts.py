"""Builds contexts: what the teacher of each completion of a group reads beside the question.

    conditioned = Demonstration().condition(group, tokenizer)          # → teacher's prompts, active, counts
    plan(prompts, completions, [list(c.teacher_prompts) for c in conditioned_B])

| builder | `c_ext` | one per |
|---|---|---|
| `No` | nothing: the teacher reads what the student reads | group |
| `Demonstration`, `Solution`, `Template` | the row's privileged context, in a template | group |
| `SuccessOrFeedback` | another completion's successful attempt, the environment's feedback on this one | completion |
| `Custom` | what a function of the group says | completion |

The context goes to the end of the last user turn, so that the two prompts begin alike: `counts` has how many of the
student's tokens the teacher's prompt begins with. Completions whose teacher reads the same have the same tensor.

What differs from the obvious: a completion for which there is nothing privileged to say is not an error. It is not
`active`, its "teacher's prompt" is the student's, and it is counted: `context/missing`, or `context/dropped` where
there was something and no room for it. With `anchor`, rows without context are active: the teacher's weights answer the
question as it stands, which is for what must not change. `check_examples` finds, before any work, data that would leave
nothing active.

Not covered: contexts as several turns, and other completions' prompts (`Group` knows only its own).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..errors import ArgumentError, ContextError, DataError
from ..prefix.planner import common_prefix
from ..types import Conditioned, Example, Group
from . import templates
from .overflow import Fitted, Overflow, Shown, check_overflow, fit, split_feedback
from .rendering import prompt_ids, template_arguments, with_context

# What a group's counts always have, so that a chart has its zeros.
COUNTS = (
    "context/prompt_tokens",  # of the student's prompts of active completions
    "context/shared_tokens",  # of these, those that the teacher's prompt begins with too
    "context/teacher_tokens",  # of the teacher's prompts of active completions
    "context/missing",  # completions without anything privileged
    "context/anchored",  # completions without it whose teacher reads what the student reads
    "context/with_solution",  # completions whose teacher sees privileged context of the row, or a successful attempt
    "context/with_feedback",  # completions whose teacher sees feedback
    "context/overflow",  # completions whose teacher's prompt was too long
    "context/truncated_tokens",  # that these prompts lost
    "context/dropped_feedback",  # entries of feedback that these prompts lost
    "context/dropped",  # completions for whose context there was no room
    "context/skipped",  # completions whose context a run refused and left out, with on_bad_row="skip"
)


def count_fitted(counts: Counter[str], teacher: Fitted, student: Tensor) -> None:
    """Counts what a teacher reads in place of the student's prompt."""
    counts["context/overflow"] += teacher.overflow
    counts["context/truncated_tokens"] += teacher.truncated_tokens
    counts["context/dropped_feedback"] += teacher.dropped_feedback
    counts["context/dropped"] += teacher.ids is None
    if teacher.ids is not None:
        counts["context/prompt_tokens"] += len(student)
        # The state of the teacher's last token is always its own.
        counts["context/shared_tokens"] += min(common_prefix(student, teacher.ids), len(teacher.ids) - 1)
        counts["context/teacher_tokens"] += len(teacher.ids)
        counts["context/with_solution"] += bool(teacher.shown.privileged_context or teacher.shown.attempt)
        counts["context/with_feedback"] += bool(teacher.shown.feedback)


def successes(group: Group, threshold: float, edit: Callable[[str], str] = str.strip) -> dict[int, str]:
    """Returns index → text of the attempts that succeeded, in order; one that says nothing teaches nothing."""
    won = {i: one for i, one in enumerate(group.rollouts) if one.reward is not None and one.reward >= threshold}
    return {i: text for i, one in won.items() if (text := one.transcript(edit))}


class ContextBuilder(Protocol):
    """Says what the teacher reads."""

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        """Returns the teacher's prompts of a group's completions. Raises `ContextError`."""


@dataclass(frozen=True, kw_only=True)
class No:
    """Shows nothing: the teacher reads the student's prompt. For targets of rewards alone, and for other teachers."""

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        """Returns the student's prompt; every completion is active."""
        del tokenizer
        size, student, counts = len(group.rollouts), group.prompt_ids, Counter(dict.fromkeys(COUNTS, 0))
        for _ in range(size):
            count_fitted(counts, Fitted(ids=student, shown=Shown()), student)
        return Conditioned(teacher_prompts=(student,) * size, active=(True,) * size, counts=dict(counts))


@dataclass(frozen=True, kw_only=True)
class InTemplate:
    """Renders and fits what builders with a template show."""

    overflow: Overflow = "error"
    max_teacher_prompt_length: int | None = None  # tokens; None: as many as there are
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # the student's, see `student_prompt_ids`

    own_text: ClassVar[str] = templates.PLAIN  # where no template is given
    given_as: ClassVar[str] = "template"  # the field that has one
    must_show: ClassVar[tuple[str, ...]] = ("privileged_context",)
    shows_feedback: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_overflow(self.overflow, self.max_teacher_prompt_length, shows_feedback=self.shows_feedback)
        templates.check_template(self.given_as, self._text, must_show=self.must_show)

    @property
    def _text(self) -> str:
        given: str | None = getattr(self, self.given_as)
        return self.own_text if given is None else given

    def _place(self, example: Example, shown: Shown, question: str) -> str:
        """Returns the question, or what else was said last, with what is shown."""
        given = {**shown.variables, "prompt": question}
        return templates.render(self._text, given, example.columns, source=example.source)

    def _prompt(self, example: Example, tokenizer: Any, shown: Shown) -> Tensor:
        """Returns the ids of the prompt that shows this."""
        prompt = with_context(example.prompt, partial(self._place, example, shown))
        kwargs = template_arguments(example, self.chat_template_kwargs)
        return prompt_ids(prompt, tokenizer, chat_template_kwargs=kwargs, source=example.source)

    def _fit(
        self, example: Example, tokenizer: Any, shown: Shown, student: Tensor, render: Callable[[Shown], Tensor]
    ) -> Fitted:
        """Returns what fits of it, where the student reads so much."""
        limit = self.max_teacher_prompt_length
        options: Any = {"overflow": self.overflow, "limit": limit, "source": example.source}
        return fit(shown, render, tokenizer, student_length=len(student), **options)

    def _condition(self, group: Group, tokenizer: Any, shown_G: Sequence[Shown | None]) -> Conditioned:
        """Returns the prompts that show these; None is a completion without anything to show."""
        example, student = group.example, group.prompt_ids
        # Most completions of a group show the same, and looking for what fits asks for the same prompt twice.
        render = cache(partial(self._prompt, example, tokenizer))
        fitted: dict[Shown, Fitted] = {}
        prompts_G, active, counts = [], [], Counter(dict.fromkeys(COUNTS, 0))
        for shown in shown_G:
            if shown is None:
                counts["context/missing"] += 1
                prompts_G.append(student)
                active.append(False)
                continue
            if shown not in fitted:
                fitted[shown] = self._fit(example, tokenizer, shown, student, render)
            teacher = fitted[shown]
            count_fitted(counts, teacher, student)
            prompts_G.append(student if teacher.ids is None else teacher.ids)
            active.append(teacher.ids is not None)
        return Conditioned(teacher_prompts=tuple(prompts_G), active=tuple(active), counts=dict(counts))


@dataclass(frozen=True, kw_only=True)
class _OfRow(InTemplate):
    """Shows the row's privileged context, in one prompt for the group."""

    remove_thinking: bool = False  # take thinking blocks out of the privileged context
    anchor: bool = False  # where there is none the teacher reads what the student reads, and every completion is active

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor and not self.needs_privileged_context:
            raise ArgumentError("anchor must be False with a template that does not show {{ privileged_context }}")

    @property
    def needs_privileged_context(self) -> bool:
        return "privileged_context" in templates.variables_of(self._text)

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        """Returns one prompt for all; none is active where the row lacks the context that the template reads."""
        size = len(group.rollouts)
        if not self.needs_privileged_context:
            return self._condition(group, tokenizer, [Shown()] * size)
        context = group.example.privileged_context or ""
        if self.remove_thinking:
            context = templates.without_thinking(context)
        shown = Shown(privileged_context=context) if context.strip() else None
        if shown is None and self.anchor:
            seen = No().condition(group, tokenizer)
            return replace(seen, counts={**seen.counts, "context/anchored": size})
        return self._condition(group, tokenizer, [shown] * size)


@dataclass(frozen=True, kw_only=True)
class Template(_OfRow):
    """Shows the row's privileged context and other columns in a Jinja template of one's own.

    A template that does not read `privileged_context`, such as a fixed instruction after the question, or one that
    reads other columns, is active for every row; `overflow` then has nothing that it may cut. None: question and
    context with a blank line between them. Raises `ArgumentError`.
    """

    text: str | None = field(default=None, kw_only=False)

    given_as: ClassVar[str] = "text"
    must_show: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class Demonstration(_OfRow):
    """Shows an expert's answer to this question as an example: SDFT (arXiv:2601.19897). Raises `ArgumentError`."""

    template: str | None = None  # Jinja; None: `own_text`

    own_text: ClassVar[str] = templates.DEMONSTRATION


@dataclass(frozen=True, kw_only=True)
class Solution(_OfRow):
    """Shows a reference solution to derive in one's own way: OPSD (arXiv:2601.18734). Raises `ArgumentError`."""

    template: str | None = None  # Jinja; None: `own_text`

    own_text: ClassVar[str] = templates.SOLUTION


@dataclass(frozen=True, kw_only=True)
class SuccessOrFeedback(InTemplate):
    """Shows an attempt that succeeded, feedback on this completion, or both: SDPO (arXiv:2601.20802).

    A completion is active when another one of its group reached the success threshold, or when it has feedback. The
    attempt is the group's first that succeeded, as in the authors' code; the completion itself, failed or not, is not
    in its teacher's prompt. Raises `ArgumentError`.
    """

    template: str | None = None  # Jinja, with `attempt` and `feedback`; None: `own_text`
    success_threshold: float = 0.5  # reward from which a completion is a successful attempt
    use_solution: bool = True  # show successful attempts
    use_feedback: bool = True  # show the feedback about the completion itself
    dont_reprompt_on_self_success: bool = True  # False: a completion may be shown itself, if it succeeded
    environment_feedback_only_without_solution: bool = True  # False: both, where there are both
    remove_thinking: bool = True  # take thinking blocks out of attempts

    own_text: ClassVar[str] = templates.SUCCESS_OR_FEEDBACK

    def __post_init__(self) -> None:
        if not (self.use_solution or self.use_feedback):
            raise ArgumentError("use_solution or use_feedback must be true, got neither: there would be no context")
        if math.isnan(self.success_threshold):
            raise ArgumentError("success_threshold must be a number, got nan")
        check_overflow(self.overflow, self.max_teacher_prompt_length, shows_feedback=self.use_feedback)
        used = {"attempt": self.use_solution, "feedback": self.use_feedback}
        templates.check_template("template", self._text, must_show=tuple(name for name, use in used.items() if use))

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        """Returns a prompt per completion, the same tensor where they show the same."""
        edit = templates.without_thinking if self.remove_thinking else str.strip
        attempts = successes(group, self.success_threshold, edit) if self.use_solution else {}
        shown_G = [self._shown(group, i, attempts) for i in range(len(group.rollouts))]
        return self._condition(group, tokenizer, shown_G)

    def _shown(self, group: Group, index: int, attempts: Mapping[int, str]) -> Shown | None:
        others = (text for i, text in attempts.items() if i != index or not self.dont_reprompt_on_self_success)
        attempt = next(others, None)
        feedback = split_feedback(group.rollouts[index].feedback) if self.use_feedback else ()
        if attempt is not None and self.environment_feedback_only_without_solution:
            feedback = ()
        return Shown(attempt=attempt, feedback=feedback) or None


@dataclass(frozen=True, kw_only=True)
class Custom(InTemplate):
    """Shows what a function says: `function(group)` gives a text or None for the teacher of each completion.

    Raises `ArgumentError`, and `ContextError` for a function that does not give one text or None per completion.
    """

    function: Callable[[Group], Sequence[str | None]] = field(kw_only=False)
    template: str | None = None  # Jinja; None: question and text with a blank line between them

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError(f"function must be callable, got {type(self.function).__name__}")
        super().__post_init__()

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        """Returns a prompt per completion; those whose text is None or blank are not active."""
        try:
            texts_G: object = self.function(group)
        except Exception as error:
            raise ContextError(
                f"{group.example.source}: the context function raised {type(error).__name__}: {error}"
            ) from error
        size = len(group.rollouts)
        if isinstance(texts_G, str) or not isinstance(texts_G, Sequence) or len(texts_G) != size:
            got = f"{len(texts_G)}" if isinstance(texts_G, list | tuple) else type(texts_G).__name__
            raise ContextError(
                f"{group.example.source}: the context function must give a list with one entry per completion, {size}, "
                f"got {got}"
            )
        odd = next((entry for entry in texts_G if not (entry is None or isinstance(entry, str))), None)
        if odd is not None:
            raise ContextError(
                f"{group.example.source}: the context function must give text or None, got {type(odd).__name__}"
            )
        shown_G = [Shown(privileged_context=text) if text and text.strip() else None for text in texts_G]
        return self._condition(group, tokenizer, shown_G)


def columns_of(builder: ContextBuilder) -> frozenset[str]:
    """Returns the names that a builder's template may read, a row's columns among them."""
    return templates.variables_of(builder._text) if isinstance(builder, InTemplate) else frozenset()


def check_examples(builder: ContextBuilder, examples: Sequence[Example]) -> int:
    """Counts the examples that lack the privileged context that the builder reads; they carry no loss but as anchors.

    Raises `DataError` where all of them do, which is a column of another name, not data with gaps.
    """
    if not examples or not getattr(builder, "needs_privileged_context", False):
        return 0
    missing = sum(example.privileged_context is None for example in examples)
    if missing == len(examples):
        first = examples[0]
        columns = ", ".join(f"`{name}`" for name in first.columns) or "none"
        raise DataError(
            f"{first.source}: {type(builder).__name__} needs a column `privileged_context` (or `teacher_prompt`, or "
            f"`solution`), got no row that has one; other columns: {columns}"
        )
    return missing
