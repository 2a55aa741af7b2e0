"""Adds what others say to a conversation, as the tokens that the chat template adds for it, and no token twice.

    talk = Conversation.begin(messages, ids, tokenizer, source="train.jsonl:12")     # talk.ids: the prompt
    others, talk = talk.reply(own, [{"role": "user", "content": "Too low."}])   # own: a Turn that was sampled
    talk.ids                                                                    # what is read next

Ids that were sampled are never decoded and encoded again. What comes between two turns of the student is everything
behind its last words in the conversation that is rendered with the reply and the next generation prompt.

What differs from the obvious: a template may render the past otherwise than it was sampled: Qwen3's leaves out thinking
blocks before the last user turn, DeepSeek's all of them. So the whole past is compared, up to white space, each time.
`history="as_sampled"` refuses such a template; "as_rendered" follows it: the next turn is then sampled after the
rendered conversation, and what came before is a sequence of its own. What a template puts around an answer that lacks
it, as an empty thinking block, is left out, and counted: `normalised`.

Not covered: plain text without a chat template; control tokens that a reply spells out, which are what they are
everywhere in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jinja2
import torch
from torch import Tensor

from ..errors import ContextError
from ..types import Message, Turn
from .rendering import turn_end
from .templates import opened_by

History: TypeAlias = Literal["as_sampled", "as_rendered"]
SHOWN_CHARACTERS = 60  # of two pasts where they part


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """Is what has been said, and the ids that the student reads of it. Raises `ContextError`."""

    messages: tuple[Message, ...]
    ids: Tensor  # (L,) int64, up to where the student speaks next
    text: str  # the same, as text
    tokenizer: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    history: History = "as_sampled"
    source: str = ""  # for errors
    normalised: int = 0  # turns around which the template would have more than was sampled

    @classmethod
    def begin(cls, messages: Sequence[Message], ids: Tensor, tokenizer: Any, **options: Any) -> Conversation:
        """Begins with a prompt's messages and its ids; options are the other fields."""
        begun = cls(messages=tuple(messages), ids=ids, text="", tokenizer=tokenizer, **options)
        return replace(begun, text=begun._render(begun.messages))

    def reply(self, own: Turn, said: Sequence[Message]) -> tuple[Turn, Conversation]:
        """Returns the turn of others who say this after the student's next turn, and the conversation with both."""
        common: dict[str, Any] = {"is_own": False, "messages": tuple(said)}
        common["text"] = "\n\n".join(str(message["content"]) for message in said)
        if self.history == "as_rendered":
            messages = (*self.messages, own.messages[0], *said)
            text = self._render(messages)
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            past = torch.cat([self.ids, own.ids])
            keeps = torch.equal(ids[: len(past)], past)
            added = str(self.tokenizer.decode(ids[len(past) :].tolist())) if keeps else text
            others = Turn(ids=ids[len(past) :] if keeps else ids, raw_text=added, restarts=not keeps, **common)
            return others, replace(self, messages=messages, ids=ids, text=text)
        end = end_of(own, self.tokenizer)
        content = str(self.tokenizer.decode(own.ids[: -1 if own.finished else None].tolist()))
        past_text = self.text + content
        # A template whose generation prompt opens the thinking may want to be told so.
        for opening in dict.fromkeys(["", opened_by(self.text)]):
            answer = {"role": "assistant", "content": opening + content}
            messages = (*self.messages, answer, *said)
            text = self._render(messages)
            same, parted = _position(text, past_text)
            at = same if parted is None else self._behind_all(text, answer)
            if at is not None:
                break
        else:
            found = text[max(0, same - SHOWN_CHARACTERS // 4) :][:SHOWN_CHARACTERS]
            raise ContextError(
                f"{self.source}: where the student read or said {parted!r}, the conversation with the reply has "
                f"{found!r}: the tokenizer's chat template does not keep its past. Give the tokenizer one that does "
                "(trl.chat_template_utils.get_training_chat_template knows some), or ask for history='as_rendered', "
                "which learns each turn after what the template renders"
            )
        added = text[at:]
        if end is not None and added.lstrip().startswith(end):
            added = added.lstrip().removeprefix(end)
        others = Turn(ids=added_ids(added, end, self.tokenizer), raw_text=added, **common)
        ids = torch.cat([self.ids, own.ids, others.ids])
        said_text = f"{past_text}{end or ''}{added}" if parted is None else text
        normalised = self.normalised + (parted is not None)
        return others, replace(self, messages=messages, ids=ids, text=said_text, normalised=normalised)

    def _behind_all(self, text: str, answer: Message) -> int | None:
        """Returns the position behind an answer that the template shows as it always will, with more around it."""
        end = turn_end(self.tokenizer)
        alone = self._render((*self.messages, answer), is_next=False).rstrip()
        alone = alone if end is None else alone.removesuffix(str(self.tokenizer.decode([end])))
        shown = "".join(alone.split()).endswith("".join(answer["content"].split()))
        return len(alone) if shown and text.startswith(alone) else None

    def _render(self, messages: Sequence[Message], *, is_next: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=is_next,
                    tokenize=False,
                    **self.arguments,
                )
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise ContextError(
                f"{self.source}: the chat template refused the conversation with a reply from "
                f"{messages[-1]['role']!r}: {error} (history='as_rendered' shows it answers as they are parsed)"
            ) from error


def _position(text: str, past: str) -> tuple[int, str | None]:
    """Returns the position in a text up to which it is a past, but for white space, and what the past has there."""
    places = [i for i, character in enumerate(text) if not character.isspace()]
    at = 0
    for i, character in enumerate(past):
        if character.isspace():
            continue
        if at == len(places) or text[places[at]] != character:
            return places[at] if at < len(places) else len(text), past[max(0, i - SHOWN_CHARACTERS // 4) :][
                :SHOWN_CHARACTERS
            ]
        at += 1
    return places[at - 1] + 1 if at else 0, None


def added_ids(added: str, end: str | None, tokenizer: Any) -> Tensor:
    """Returns the ids of a text behind the token that ends a turn, which some tokenizers encode otherwise alone."""
    lead = [] if end is None else tokenizer(end, add_special_tokens=False)["input_ids"]
    ids = tokenizer((end or "") + added, add_special_tokens=False)["input_ids"]
    if ids[: len(lead)] != lead:
        lead, ids = [], tokenizer(added, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[len(lead) :], dtype=torch.int64)


def end_of(own: Turn, tokenizer: Any) -> str | None:
    """Returns the text of a turn's last token, where it is the one that the chat template ends turns with."""
    last = int(own.ids[-1]) if own.finished and len(own.ids) else None
    return None if last is None or last != turn_end(tokenizer) else str(tokenizer.decode([last]))
