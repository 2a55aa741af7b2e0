"""Gives both translations of other projects' configurations what they need: keys taken once, and templates.

A key that nobody takes is refused by name. Templates for `str.format` become Jinja that gives the same text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from string import Formatter
from typing import Any

from ..errors import ArgumentError


class Keys:
    """Holds a configuration from which every key is taken once."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._given, self._defaults, self._taken = dict(given), defaults, set[str]()

    def take(self, name: str) -> Any:
        self._taken.add(name)
        return self._given.get(name, self._defaults[name]) if name in self._defaults else self._given[name]

    def rest(self) -> dict[str, Any]:
        """Returns what is given and nobody took: arguments of transformers' own, other than their defaults."""
        left = {}
        arguments = {f.name for f in dataclasses.fields(training_arguments())}
        for name, value in self._given.items():
            if name in self._taken or value == self._defaults[name]:
                continue
            if name not in arguments:
                raise ArgumentError(f"{name}={value!r} is not known here")
            left[name] = value
        return left


def training_arguments() -> Any:
    from transformers import TrainingArguments

    return TrainingArguments


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
