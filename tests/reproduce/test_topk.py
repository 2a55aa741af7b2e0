"""Tests the study of divergences on k tokens, on a random model of one layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from reproduce import topk
from sdkernels import TopK
from tests.sdcore.contexts.chats import chat_tokenizer

KEYS = {"divergence", "k", "of", "tail", "mass outside", "share of the value", "gradient cosine", "gradient norm ratio"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = chat_tokenizer("qwen")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_k_tokens_are_compared_with_the_whole_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "KS", (2, 400))
    output = folder.parent / "topk.json"
    threads = torch.get_num_threads()
    app = topk.typer.Typer()
    app.command()(topk.main)
    result = CliRunner().invoke(app, ["--model", str(folder), "--output", str(output)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    (model,) = json.loads(output.read_text())["models"]
    assert (model["model"], model["vocabulary"]) == ("tiny", len(chat_tokenizer("qwen")))
    few, many = ([entry for entry in model["comparisons"] if entry["k"] == k and entry["tail"]] for k in (2, 400))
    assert len(few) == len(many) == 6
    for little, much in zip(few, many, strict=True):
        assert set(little) == KEYS
        # What buckets hide is only ever missing.
        assert little["share of the value"] < much["share of the value"] <= 1.0001
        assert little["gradient cosine"] < much["gradient cosine"] <= 1.0001
        assert little["mass outside"] > much["mass outside"] > 0
    assert "| JSD | 2 |" in result.output


def test_the_whole_vocabulary_as_k_gives_the_textbook_gradient() -> None:
    torch.manual_seed(1)
    states, weight = torch.randn(7, 5, dtype=torch.float64).requires_grad_(), torch.randn(11, 5, dtype=torch.float64)
    teacher = torch.randn(7, 11, dtype=torch.float64)
    log_p, log_q = (states @ weight.T).log_softmax(-1), teacher.log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, states)
    for support in (None, TopK(11, of="teacher", tail=False)):
        value, got = topk.divergence(topk.Rows((states @ weight.T).detach(), teacher, weight), 1.0, support)
        assert value == pytest.approx(float(loss.detach()), rel=1e-9)
        torch.testing.assert_close(got, gradient)
