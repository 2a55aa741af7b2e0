"""Renders, in a sandbox, the texts that put privileged context beside a question.

A template is Jinja. It sees `prompt`, the text of the last user turn; what the builder shows (`privileged_context`, or
`attempt` and `feedback`), each None where there is none; and every column of the row that is plain data. What comes
first in it stays shared between student and teacher, so the default texts begin with the question and add to it:

    {{ prompt }} {{ privileged_context }}

What differs from the obvious: a variable that nobody set is an error, not an empty string, and so is a template that
does not show the question (`{prompt}`, in single braces, is plain text to Jinja). Values are data: braces in a question
or in a verifier's output are never rendered again. One newline at the very end of a template is dropped, as Jinja does,
so that a YAML block works as it looks.

Templates may come with data and configurations, so they run in Jinja's `ImmutableSandboxedEnvironment`: attributes that
begin with an underscore, the insides of functions, and changes to what they are given are refused, and objects that
are not plain data are not given to them. Not covered: the time and memory that a template takes.

The default texts are our own words for what the papers' prompts say: SDFT (arXiv:2601.19897) shows a demonstration and
asks for an answer of one's own; SDPO (arXiv:2601.20802) shows a correct attempt and the environment's feedback and asks
to solve the original question; OPSD (arXiv:2601.18734) shows a reference solution and asks to derive it in one's own
way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any, Final

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ArgumentError, ContextError

PLAIN: Final = """\
{{ prompt }}

{{ privileged_context }}"""

DEMONSTRATION: Final = """\
{{ prompt }}

To show what is wanted, here is how an expert responds to this:

{{ privileged_context }}

Now give your own response, in your own way."""

SOLUTION: Final = """\
{{ prompt }}

For reference, a solution that is known to be right:

{{ privileged_context }}

Understand why each of its steps holds. Then work out the answer yourself, with your own reasoning and without \
mentioning this reference."""

SUCCESS_OR_FEEDBACK: Final = """\
{{ prompt }}
{%- if attempt %}

An earlier attempt that solved this:

{{ attempt }}
{%- endif %}
{%- if feedback %}

What came back from checking another attempt of yours:

{{ feedback }}
{%- endif %}

Now solve the question at the top."""

TURN: Final = """\
{{ prompt }}

(What came of the answer that you gave to this: {{ feedback }})"""

# A whole block; what comes before an end whose beginning is in the prompt, as some chat templates have it; and a block
# that the length limit cut.
_BEGIN, _END = r"(?:<think>|\[THINK\]|◁think▷)", r"(?:</think>|\[/THINK\]|◁/think▷)"
_THINKING: Final = (
    re.compile(rf"{_BEGIN}.*?{_END}", re.DOTALL),
    re.compile(rf"\A.*{_END}", re.DOTALL),
    re.compile(rf"{_BEGIN}.*\Z", re.DOTALL),
)
_ATOMS: Final = (str, int, float, bool, type(None), date, datetime, time)


def without_thinking(text: str) -> str:
    """Returns a text without its thinking blocks: what it says after `</think>`, or around `<think>…</think>`.

    `[THINK]` and `◁think▷` are such tags too.
    """
    for pattern in _THINKING:
        text = pattern.sub("", text)
    return text.strip()


def unopened(text: str, before: str) -> str:
    """Returns a text without the thinking tag that it begins with, where the text `before` it ends with that tag."""
    tag = opened_by(before).strip()
    return text.lstrip().removeprefix(tag).lstrip() if tag and text.lstrip().startswith(tag) else text


def opened_by(before: str) -> str:
    """Returns the thinking tag that a text ends with, and the white space behind it; nothing where there is none."""
    opened = re.search(rf"{_BEGIN}\s*\Z", before)
    return opened[0] if opened else ""


def check_template(name: str, text: str, *, must_show: tuple[str, ...] = ()) -> None:
    """Raises `ArgumentError` where a template is no Jinja, or lacks the question or what else it must show."""
    if not isinstance(text, str):
        raise ArgumentError(f"{name} must be text, got {type(text).__name__}")
    try:
        variables = variables_of(text)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ArgumentError(f"{name} must be a Jinja template, got an error in line {line}: {error}") from error
    missing = [variable for variable in ("prompt", *must_show) if variable not in variables]
    if missing:
        shown = ", ".join(f"{{{{ {variable} }}}}" for variable in missing)
        single = any(f"{{{variable}}}" in text for variable in missing)
        hint = "; Jinja's braces are double" if single else ""
        raise ArgumentError(f"{name} must show {shown}, got one that reads {_listed(variables)}{hint}")


@lru_cache(maxsize=64)
def variables_of(text: str) -> frozenset[str]:
    """Returns the variables that a template may read. Raises `jinja2.TemplateSyntaxError`."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(text)))


def render(text: str, variables: Mapping[str, Any], columns: Mapping[str, Any], *, source: str) -> str:
    """Renders a template with its variables, which win over columns of the same name. Raises `ContextError`."""
    given = {name: value for name, value in columns.items() if _is_plain(value)} | dict(variables)
    try:
        return _compiled(text).render(given)
    except jinja2.UndefinedError as error:
        odd = frozenset(columns.keys() - given.keys())
        raise ContextError(
            f"{source}: the template reads what there is none of: {error.message}; there are {_listed(given)}"
            + (f"; left out, since they are no plain data: {_listed(odd)}" if odd else "")
        ) from error
    except jinja2.TemplateError as error:  # SecurityError is one
        raise ContextError(f"{source}: the template was refused: {type(error).__name__}: {error.message}") from error
    except Exception as error:  # an operation of the template's own: 1 / 0, a missing key, a wrong type
        raise ContextError(f"{source}: the template raised {type(error).__name__}: {error}") from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    # They draw from Python's global generator, so that a prompt, and every seeded number after it, would change.
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


def _is_plain(value: object) -> bool:
    """True where a value has nothing but data in it. Exact types: a subclass may have methods that do something."""
    if type(value) is list or type(value) is tuple:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(entry) for key, entry in value.items())
    return type(value) in _ATOMS


def _listed(names: Mapping[str, Any] | frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "no variable"
