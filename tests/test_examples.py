"""Every file in `examples/` runs, and the model has learned what the example says that it learns."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.sdcore.rollouts.talks import tokenizer_of

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Of 200 questions, none of which the model can answer before. The tilt's number is a mean reward, .13 before.
LEARNED = {"bare_loop": 0.7, "sdft": 0.7, "opsd": 0.7, "system_prompt": 0.7, "rl_tilt": 0.5}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here_and_short() -> None:
    files = {file.stem: file for file in EXAMPLES.glob("*.py")}
    assert files.keys() == LEARNED.keys() | {"sdpo_code", "word_game", "calculator"}
    assert {
        name: len(f.read_text().splitlines()) for name, f in files.items() if len(f.read_text().splitlines()) >= 80
    } == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_an_example_learns_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(name).main() >= LEARNED[name]


def test_the_example_with_a_code_executing_verifier_runs(tmp_path: Path) -> None:
    module = load("sdpo_code")
    assert module.verify(prompt="", completion="a1 b2", answer="a1 b3") == (0.0, "H b3")
    assert module.verify(prompt="", completion="a1 b3", answer="a1 b3") == (1.0, None)
    assert 0 <= module.main(steps=1, output=str(tmp_path)) <= 1
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_word_game_is_learned_turn_by_turn() -> None:
    before, after = load("word_game").main()
    assert before < 0.6  # what is wrong is said, so that later answers of a game are better
    assert after > 0.85


def test_the_agent_with_a_calculator_runs(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads))
    module = load("calculator")
    assert module.check(prompt="", completion="12 times 3 is 36.", product=36) == (1.0, None)
    assert module.check(prompt="", completion="I do not know.", product=36)[0] == 0.0
    measured = module.main(model, steps=1, output=str(tmp_path), processing_class=tokenizer)
    assert measured["eval_reward_mean"] == 0.0
    assert "tools/called" in (tmp_path / "metrics.jsonl").read_text()
