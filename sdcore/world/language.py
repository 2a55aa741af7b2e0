"""Defines the small world's language: its words, its tokenizer, and how a chat becomes a plain sequence.

A sequence is a question, optionally hints, and an answer, one token per word:

    <bos> luma a c c f b H a3 H c7 H f0 H b9 = a3 c7 c7 f0 b9 <eos>

The task `luma` maps letters to digits; an answer repeats the question's letters, each with its digit, as *pair*
tokens. Hints and expert demonstrations put an `H` before every pair (the *decorated* style); answers do not (the
*native* style). Letters and digits are not separate tokens in an answer: a model this small does not learn to look a
hint up when they are. The module imports neither torch nor transformers until a tokenizer is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerFast

LETTERS: Final = tuple("abcdefghij")
DIGITS: Final = tuple("0123456789")
PAIRS: Final = tuple(letter + digit for letter in LETTERS for digit in DIGITS)

# A prior task is in the pretrained weights: digit number i belongs to letter number i, for ever.
PRIOR_TASKS: Final = {
    "pi": "3141592653",
    "euler": "2718281828",
    "root": "1414213562",
    "golden": "1618033988",
    "log": "6931471805",
    "gamma": "5772156649",
}
# An open task has another map in every pretraining episode, so only its context can tell.
OPEN_NAMES: Final = ("kodo", "luma", "mira", "nefi", "oslo", "pavo", "quil", "runa", "sefa", "tiko")
# A skill is an algorithm on the letters; the digit of a pair is the letter's place in the answer.
SKILLS: Final = ("reverse", "sort")

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
ANSWER, HINT = "=", "H"
VOCABULARY: Final = (
    *(PAD, BOS, EOS, UNK, ANSWER, HINT),
    *PRIOR_TASKS,
    *OPEN_NAMES,
    *SKILLS,
    *LETTERS,
    *PAIRS,
)

# `<bos>` and the user's words, then `=` and the assistant's. Context goes inside the last user turn, after the
# question. There is no word for a system turn in this world, so the template refuses one instead of dropping it.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + ' ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ '= ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('expected a user or assistant turn, got ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)


def decorate(pairs: Iterable[str]) -> str:
    """Writes `a3 c7` in the style of hints and expert demonstrations: `H a3 H c7`."""
    return " ".join(f"{HINT} {pair}" for pair in pairs)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the world's tokenizer: words at white space, one id each, decoded with single spaces between them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
