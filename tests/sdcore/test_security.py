"""What is loaded runs no code of its own: models, checkpoints, teachers' states. The templates' and the verifiers'
sandboxes are tested where they are (`contexts/test_templates.py`, `rollouts/test_sandbox.py`)."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sdcore.world
from sdcore import SelfDistillationConfig, SelfDistillationTrainer
from sdcore.presets import preset
from sdcore.teachers import EMA
from sdcore.world.data import TEMPLATES, rows

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = Path(sdcore.world.__file__).parent / "checkpoint"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.touch, (self.made,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint, to be tampered with."""
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    return tmp_path / "model"


def trainer(model: Path, output: Path) -> SelfDistillationTrainer:
    return SelfDistillationTrainer(
        str(model),
        SelfDistillationConfig(output_dir=str(output), max_steps=1, max_completion_length=8, disable_tqdm=True),
        method=preset("sdft_as_run", template=TEMPLATES["sdft"]),
        train_dataset=rows("sdft", task="luma", count=8, seed=0),
    )


def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_a_models_own_code_is_not_run_unless_asked_for(model: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (model / "own.py").write_text(
        f"from pathlib import Path\nPath({str(made)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        trainer(model, tmp_path / "run")
    assert not made.exists()


def test_pickled_weights_are_not_unpickled(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "made")}, model / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unpickl|unsupported"):
        trainer(model, tmp_path / "run")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_tampered_checkpoint_is_not_unpickled(name: str, model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    size = (checkpoint / name).stat().st_size  # a smaller file would be refused for its size, before it is read
    torch.save({"state": Bomb(tmp_path / "made"), "rest": torch.zeros(size, dtype=torch.uint8)}, checkpoint / name)
    again = trainer(model, tmp_path / "run")
    again.args.max_steps = 2
    with pytest.raises(Exception, match=r"(?i)weights_only|unpickl|unsupported"):
        again.train(resume_from_checkpoint=True)
    assert not (tmp_path / "made").exists()


def test_a_teachers_state_is_safetensors_and_nothing_else_is_read(tmp_path: Path) -> None:
    student = torch.nn.Linear(2, 2)
    teacher = EMA(student, 0.1)
    (tmp_path / "teacher.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "made")))
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        teacher.load(tmp_path)
    assert not (tmp_path / "made").exists()


def test_nothing_of_ours_unpickles() -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    unpickling = []
    for file in [*(ROOT / "sdcore").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unpickling += [f"{file}: {name}" for name in names if name.split(".")[0] in forbidden]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                unpickling += [f"{file}: torch.load"] * ((node.value.id, node.attr) == ("torch", "load"))
    assert unpickling == []
