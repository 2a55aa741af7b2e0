"""Two real language models, from their GGUF files: SmolLM2-135M-Instruct and Gemma 3 270M, both with tied heads.

The one has a chat template, the other sliding windows and a vocabulary of 262,144. `make test-real` installs them;
where they are not, all this is skipped.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdcore import distill_step
from sdcore.bench.oracle import compare, solve
from sdcore.bench.peers import SDCORE, prepare
from sdcore.bench.shapes import JSD
from sdcore.bench.states import load
from sdcore.contexts import student_prompt_ids
from sdcore.memory import Load, Setting, Tiles, measure
from sdcore.memory.measured import predictions
from sdcore.models import gguf
from sdcore.models.gguf import PACKAGES, packaged_file, plain_folder
from sdcore.prefix import plan
from sdcore.presets import preset
from sdcore.rollouts.samplers import stop_ids
from sdcore.rollouts.window import given_completion
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer
from sdcore.types import Example

SMOLLM2 = "smollm2"
NAMES = tuple(PACKAGES)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The GGUF file of each package that is installed, in a folder that all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "gguf"
    folder.mkdir(exist_ok=True)
    there: dict[str, Path] = {}
    with FileLock(folder / ".lock"):
        for name in NAMES:
            with contextlib.suppress(ImportError):
                source, there[name] = packaged_file(name), folder / f"{name}.gguf"
                if not there[name].exists():
                    there[name].symlink_to(source)
    return there


@pytest.fixture(scope="session", params=NAMES)
def file(request: pytest.FixtureRequest, files: dict[str, Path]) -> Path:
    if request.param not in files:
        pytest.skip(f"{request.param} is not installed: make test-real")
    return files[request.param]


@pytest.fixture
def smollm2(files: dict[str, Path]) -> str:
    if SMOLLM2 not in files:
        pytest.skip(f"{SMOLLM2} is not installed: make test-real")
    return plain_folder(str(files[SMOLLM2]))


def test_the_folder_is_what_is_known_of_the_model(file: Path) -> None:
    folder = plain_folder(str(file))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, stored = model.config, {tensor.name: tensor for tensor in GGUFReader(file).tensors}

    def values(name: str) -> np.ndarray:
        return dequantize(stored[name].data, stored[name].tensor_type)

    embedding, layer = model.get_input_embeddings().weight, model.model.layers[3]
    assert model.get_output_embeddings().weight is embedding
    assert np.array_equal(embedding.detach().numpy(), values("token_embd.weight"))
    assert np.array_equal(layer.mlp.down_proj.weight.detach().numpy(), values("blk.3.ffn_down.weight"))
    norm = layer.input_layernorm.weight.detach().numpy()
    assert len(tokenizer) == config.vocab_size == len(embedding)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == config.eos_token_id
    if file.stem == "smollm2":
        assert np.array_equal(norm, values("blk.3.attn_norm.weight"))
        assert config.rope_parameters == {"rope_theta": 100_000.0, "rope_type": "default"}
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.tokenize("Facts:\n\n1.  12") == ["Facts", ":", "ĊĊ", "1", ".", "ĠĠ", "1", "2"]
        return
    assert np.array_equal(norm, values("blk.3.attn_norm.weight") - 1)
    assert config.sliding_window == 512
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)
    assert (config.query_pre_attn_scalar, config.head_dim, config.num_key_value_heads) == (256, 256, 1)
    assert tokenizer.convert_ids_to_tokens(tokenizer("two  spaces").input_ids) == ["<bos>", "two", "▁▁", "spaces"]
    assert tokenizer.eos_token == "<eos>"


def test_tokens_are_those_of_the_chat_template(smollm2: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for question, answer in (("What is 17 + 25?", "42."), ("Liste:\n\n1. é\n2.  ü", "1\n\n2 <b>日本</b>")):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        example = Example(prompt=tuple(turns), columns={"completion": answer}, source="row")
        prompt = student_prompt_ids(example, tokenizer)
        given = given_completion(example, tokenizer, prompt, stop_ids=[2], max_length=64)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        ids = torch.cat([prompt, given.completion_ids]).tolist()
        assert tokenizer.decode(ids) + "\n" == whole  # what the template writes behind the end is not learned
        assert [*ids, *tokenizer("\n").input_ids] == tokenizer(whole).input_ids
        assert given.finished
        assert given.text == answer
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert set(stop_ids(model, tokenizer)) == {2}


def test_the_benchmarks_states_are_those_of_the_record(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "packaged_file", lambda name: str(file))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    states = load(file.stem)  # refused where they are not
    model = AutoModelForCausalLM.from_pretrained(plain_folder(str(file)))
    assert torch.equal(states.head, model.get_output_embeddings().weight.bfloat16())
    assert states.shape_of(None).rows == 1024
    inputs = states.inputs(states.shape_of(16), "bf16")
    errors = compare(prepare(SDCORE, inputs, JSD)(), solve(inputs, (JSD,), float64=True)[JSD])
    assert errors.loss < 1e-5
    assert errors.gradient < 0.005
    shares = {entry["k"]: entry["teacher"] for entry in states.mass(16)}
    assert 0.3 < shares[20] < shares[100] < shares[1000] < 1


def gradients(model: Any, tokens: Any, strategy: Any) -> tuple[float, torch.Tensor]:
    """Loss and gradient, the embedding's not: it is most of the numbers, and the head's by the same code."""
    loss = float(distill_step(model, tokens, strategy=strategy, verify="off").loss)
    gradient = torch.cat([weight.grad.flatten() for weight in model.model.layers.parameters()])
    model.zero_grad()  # of several GB
    return loss, gradient


def test_packed_is_as_near_to_float64_as_naive(file: Path) -> None:
    """Gemma's prompts are longer than its windows."""
    model = AutoModelForCausalLM.from_pretrained(plain_folder(str(file)))
    length = 524 if file.stem == "gemma" else 40
    draw = torch.Generator().manual_seed(0)
    prompt, context = (torch.randint(5, 20_000, (size,), generator=draw) for size in (length, 9))
    completions = [torch.randint(5, 20_000, (size,), generator=draw) for size in (5, 3)]
    tokens = plan([prompt], [completions], [torch.cat([prompt[:-4], context, prompt[-4:]])])
    measured = {strategy: gradients(model, tokens, strategy) for strategy in ("packed", "naive")}
    loss, exact = gradients(model.double(), tokens, "naive")
    wrong = {
        strategy: (abs(value - loss) / loss, float((g - exact).norm())) for strategy, (value, g) in measured.items()
    }
    rounding = torch.finfo(torch.float32).eps
    assert wrong["packed"][0] <= 2 * wrong["naive"][0] + 8 * rounding
    assert wrong["packed"][1] <= 2 * wrong["naive"][1]
    assert wrong["naive"][1] < 1e-3 * float(exact.norm())


def run(file: Path, output: Path, steps: int, *, resume: bool = False) -> SelfDistillationTrainer:
    args = SelfDistillationConfig(
        output_dir=str(output),
        gguf_file=file.name,
        optim="sgd",  # AdamW's state would be twice the model on the disk
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=steps,
        save_steps=1,
        save_total_limit=1,
        per_device_train_batch_size=1,
        max_completion_length=8,
        strategy="naive",
        use_cpu=True,
        disable_tqdm=True,
        leak_probe_every=0,
        overlap_probe_every=0,
    )
    rows = [{"prompt": f"{number} and", "completion": " so on"} for number in range(4)]
    trainer = SelfDistillationTrainer(str(file.parent), args, method=preset("sft"), train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_is_saved_resumed_and_loaded_with_a_tied_head(file: Path, tmp_path: Path) -> None:
    start = AutoModelForCausalLM.from_pretrained(plain_folder(str(file))).get_input_embeddings().weight
    whole = run(file, tmp_path / "whole", 2).model
    head = whole.get_output_embeddings().weight
    assert head is whole.get_input_embeddings().weight
    assert not torch.equal(head, start)
    run(file, tmp_path / "resumed", 1)
    run(file, tmp_path / "resumed", 2, resume=True).save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "resumed")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "resumed")("a 1").input_ids


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_memory_estimate_is_within_a_tenth(file: Path, accumulates: bool) -> None:
    config = AutoModelForCausalLM.from_pretrained(plain_folder(str(file)), device_map="meta").config
    load = Load(prompt_tokens=64, context_tokens=32, completion_tokens=16, completions=4)
    setting = Setting(strategy="packed", accumulates=accumulates)
    lives = measure(config, load, setting, contenders=("ours",))["ours"].lives
    assert lives is not None
    predicted = predictions(config, load, setting, Tiles())["ours"]
    assert predicted.total == pytest.approx(lives.peak, rel=0.1)
    beyond = lives.peak - lives.at_peak["weights"] - lives.at_peak["optimizer"]
    assert predicted.update - predicted.resident == pytest.approx(beyond, rel=0.1)
