"""Chat templates in the style of three families, a tiny byte-level tokenizer that reads them, and groups."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from sdcore.contexts import student_prompt_ids
from sdcore.types import Example, Group, Message, Prompt, Trajectory

# System turns; the thinking of turns before the last question is taken out; thinking can be switched off.
QWEN = """\
{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}
    {%- else %}{% set content = message.content | map(attribute='text') | join %}{% endif %}
    {%- if message.role == 'assistant' and loop.index0 < last.user %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# Content is trimmed, and the text begins with a token of its own.
LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}{{ message.content | trim }}
    {%- else %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# No system turns, roles that must alternate, and the assistant is called model.
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {%- if message.content is string %}{{ message.content | trim }}
    {%- else %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

FAMILIES = {"qwen": QWEN, "llama": LLAMA, "gemma": GEMMA}
SPECIAL = [
    *("<bos>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
CORPUS = [
    "You are a careful assistant. Answer the question about numbers, and say how sure you are of the answer.",
    "What is the sum of the first ten odd numbers? The sum of the first n odd numbers is n squared, so it is 100.",
    "Write a function that reverses a list. def reverse(items): return items[::-1]  # the test of the list failed",
    "Traceback (most recent call last): AssertionError: expected 100, got 99 in the test of the function",
]


def byte_level_tokenizer(corpus: list[str], special: list[str], end: str, *, size: int) -> PreTrainedTokenizerFast:
    """Any text has ids, and there are merges, so that a cut may change its neighbours; without a template."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(corpus, BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token=end, pad_token="<pad>")


@lru_cache(maxsize=4)
def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    end = {"qwen": "<|im_end|>", "llama": "<|eot_id|>", "gemma": "<end_of_turn>"}[family]
    tokenizer = byte_level_tokenizer(CORPUS, SPECIAL, end, size=500)
    tokenizer.chat_template = FAMILIES[family]
    return tokenizer


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def example(prompt: Prompt = "What is 3 + 4?", context: str | None = None, **columns: Any) -> Example:
    return Example(prompt=prompt, privileged_context=context, columns=columns, source="train.jsonl:7")


def rollout(text: str, reward: float | None = None, feedback: str | None = None) -> Trajectory:
    return Trajectory.answer(
        completion_ids=torch.tensor([1, 2]), logprobs=None, text=text, finished=True, reward=reward, feedback=feedback
    )


def group_of(
    given: Example,
    tokenizer: Any,
    *rollouts: Trajectory,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **more: Any,
) -> Group:
    prompt_ids = student_prompt_ids(given, tokenizer, chat_template_kwargs=chat_template_kwargs, **more)
    return Group(example=given, prompt_ids=prompt_ids, rollouts=rollouts or (rollout("7"),))
