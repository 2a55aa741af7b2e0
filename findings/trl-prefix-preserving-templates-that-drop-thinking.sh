#!/usr/bin/env bash
# Chat templates that TRL calls prefix-preserving take the thinking out of earlier answers.
#
# trl 1.16.0. `get_training_chat_template` says that it returns a template which is prefix-preserving, and
# `is_chat_template_prefix_preserving` that such a template "renders earlier messages identically regardless of what
# messages follow". It asks with one conversation: an empty answer that calls a tool, and the tool's result. GLM-4-MoE's and
# Nemotron 3's training templates pass; but when a user speaks next, they render the answer before it without its
# thinking. Whoever relies on the word, to cut a conversation's ids into turns or to find the tokens that a user's reply
# adds, trains turns after a past that was not sampled. Qwen3's training template keeps the thinking, and so do others.
#
# Seen: the check says True for all six; "keeps" for Qwen3's, "changes" for the five others: the rendered question and
# answer are no beginning of the same two with a user's reply. Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import is_chat_template_prefix_preserving

bytes_alone = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
bytes_alone.pre_tokenizer, bytes_alone.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)

question = {"role": "user", "content": "Guess!"}
answer = {"role": "assistant", "content": "<think>\nIs it five?\n</think>\n\nFive"}
reply = {"role": "user", "content": "Too low."}
expected = {"qwen3": "keeps"} | dict.fromkeys(
    ["glm4moe", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"], "changes"
)
seen = {}
for name in expected:
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / f"{name}_training.jinja").read_text(encoding="utf-8")
    said = is_chat_template_prefix_preserving(tokenizer)
    before = tokenizer.apply_chat_template([question, answer], tokenize=False)
    after = tokenizer.apply_chat_template([question, answer, reply], tokenize=False)
    seen[name] = said, "keeps" if after.startswith(before) else "changes"
    print(f"{name}_training.jinja: the check says {said}; a user's reply {seen[name][1]} the answer before it")
    if seen[name][1] == "changes":
        print(f"    before: {before!r}\n    after:  {after!r}")
sys.exit(0 if seen == {name: (True, what) for name, what in expected.items()} else 1)
PYTHON
