"""Translates what both of the other projects' configurations have: the fields of SDPO's context, and its texts.

Templates for `str.format` become Jinja that gives the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any, Final

from ..errors import ArgumentError

# Fields of SDPO's context: their names → ours.
SHOWN: Final = {
    "max_reprompt_len": "max_teacher_prompt_length",
    "success_reward_threshold": "success_threshold",
    "include_environment_feedback": "use_feedback",
    "dont_reprompt_on_self_success": "dont_reprompt_on_self_success",
    "environment_feedback_only_without_solution": "environment_feedback_only_without_solution",
    "remove_thinking_from_demonstration": "remove_thinking",
}


def refuse(values: Mapping[str, Any], refused: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raises `ArgumentError` for a value that has no counterpart; `refused` has the harmless ones and what to do."""
    for name, (harmless, reason) in refused.items():
        if name in values and values[name] not in harmless:
            raise ArgumentError(f"{name}={values[name]!r} has no counterpart here: {reason}")


def attempt_template(reprompt: str, solution: str, feedback: str) -> str:
    """Returns SDPO's three texts as one template of ours."""
    shown = jinja_of("solution_template", solution, {"successful_previous_attempt": "{{ attempt }}"}, last=False)
    said = jinja_of("feedback_template", feedback, {"feedback_raw": "{{ feedback }}"}, last=False)
    fields = {
        "prompt": "{{ prompt }}",
        "solution": "{% if attempt %}" + shown + "{% endif %}",
        "feedback": "{% if feedback %}" + said + "{% endif %}",
    }
    return jinja_of("reprompt_template", reprompt, fields)


def jinja_of(name: str, text: str, fields: Mapping[str, str], *, last: bool = True) -> str:
    """Returns a Jinja template that gives the same as a text for `str.format`. `last`: it is the template's end."""
    parts = []
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ArgumentError(f"{name} must be a text for str.format, got {text!r}: {error}") from error
    for literal, field, form, conversion in pieces:
        marked = any(mark in literal for mark in ("{{", "{%", "{#"))
        # A brace at the end of the text would be read together with that of a variable.
        safe = "{% raw %}" + literal + "{% endraw %}" if marked or literal.endswith("{") else literal
        parts.append(safe)
        if field is None:
            continue
        if field not in fields or form or conversion:
            known = ", ".join(f"{{{field}}}" for field in fields)
            raise ArgumentError(f"{name} may have the fields {known}, without formats, got {{{field}}} in {text!r}")
        parts.append(fields[field])
    # Jinja drops one newline at the end.
    return "".join(parts) + ("\n" if last and text.endswith("\n") else "")
