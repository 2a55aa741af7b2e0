"""Runs TRL's own tests of the trainers that `sdcore.integrations.trl` replaces, with ours in place of theirs.

    git clone https://github.com/huggingface/trl && python tests/peers/trl_own_tests.py trl
    python tests/peers/trl_own_tests.py trl --theirs      # TRL's own classes: what fails there is not ours

A checkout is needed because TRL's packages come without tests. Nothing is downloaded: models and datasets that tests
name are replaced by tiny random ones of the same family and columns. Not part of `make test`; docs/integrations/trl.md
says which tests were run.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILES = ("sdpo_trainer", "sdft_trainer", "gkd_trainer", "self_distillation_trainer_behavior", "distillation_trainer")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["Beautiful is better than ugly.", "Explicit is better than implicit.", "Simple is better than complex."]


class StandIns:
    """Is a pytest plugin: puts local models under the names of TRL's, and our classes in place of theirs."""

    def __init__(self, folder: Path, *, theirs: bool) -> None:
        self.folder = folder
        self._save_models()
        self._redirect()
        if not theirs:
            self._replace_trainers()

    def _save_models(self) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import (
            LlamaConfig,
            LlamaForCausalLM,
            PreTrainedTokenizerFast,
            Qwen2Config,
            Qwen2ForCausalLM,
            Qwen2ForSequenceClassification,
            Qwen3Config,
            Qwen3ForCausalLM,
        )

        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(
            TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
        )
        sizes: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        for name, family, config in (
            ("tiny-Qwen2ForCausalLM-2.5", Qwen2ForCausalLM, Qwen2Config(**sizes)),
            ("tiny-Qwen3ForCausalLM", Qwen3ForCausalLM, Qwen3Config(**sizes, head_dim=8)),
            (
                "tiny-Qwen2ForSequenceClassification-2.5",
                Qwen2ForSequenceClassification,
                Qwen2Config(**sizes, num_labels=1),
            ),
            ("tiny-LlamaForCausalLM-3.2", LlamaForCausalLM, LlamaConfig(**sizes | {"vocab_size": 2 * len(tokenizer)})),
        ):
            family(config).save_pretrained(self.folder / name)
            tokenizer.save_pretrained(self.folder / name)

    def _redirect(self) -> None:
        import datasets
        import transformers

        utils = importlib.import_module("trl.import_utils")
        # Asked for by the helpers of checkouts that are older than the installed TRL.
        if not hasattr(utils, "is_joblib_available"):
            utils.is_joblib_available = lambda: False  # type: ignore[attr-defined]

        def local(name: Any) -> Any:
            model = self.folder / str(name).removeprefix("trl-internal-testing/")
            return str(model) if model.exists() else name

        for owner in (
            transformers.AutoConfig,
            transformers.AutoModelForCausalLM,
            transformers.AutoModelForSequenceClassification,
            transformers.AutoTokenizer,
            transformers.AutoProcessor,
            transformers.PreTrainedModel,
        ):
            self._wrap(owner, local)
        datasets.load_dataset = _zen

    @staticmethod
    def _wrap(owner: Any, local: Callable[[Any], Any]) -> None:
        plain = owner.from_pretrained.__func__
        owner.from_pretrained = classmethod(lambda cls, name, *args, **kw: plain(cls, local(name), *args, **kw))

    def _replace_trainers(self) -> None:
        import trl
        import trl.experimental.distillation
        import trl.experimental.gkd.gkd_trainer
        import trl.experimental.sdft.sdft_trainer
        import trl.experimental.sdpo.sdpo_trainer

        from sdcore.integrations import trl as ours

        for name, modules in {
            "SDPOTrainer": (trl.experimental.sdpo, trl.experimental.sdpo.sdpo_trainer),
            "SDFTTrainer": (trl.experimental.sdft, trl.experimental.sdft.sdft_trainer),
            "GKDTrainer": (trl.experimental.gkd, trl.experimental.gkd.gkd_trainer),
            "DistillationTrainer": (trl, trl.experimental.distillation),
        }.items():
            for module in modules:
                setattr(module, name, getattr(ours, f"Fused{name}"))


def _zen(name: str, kind: str, split: str | None = None, streaming: bool = False, **_: Any) -> Any:
    """Makes a dataset with the columns of `trl-internal-testing/zen`."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    words = [text.split(" ", 1) for text in TEXTS] * 6
    rows: dict[str, list[dict[str, Any]]] = {
        "standard_prompt_only": [{"prompt": first} for first, _ in words],
        "conversational_prompt_only": [{"prompt": [{"role": "user", "content": first}]} for first, _ in words],
        "conversational_language_modeling": [
            {"messages": [{"role": "user", "content": first}, {"role": "assistant", "content": rest}]}
            for first, rest in words
        ],
    }
    whole = Dataset.from_list(rows[kind])
    splits = {"train": whole, "test": whole.select(range(3))}
    if split is not None:
        return splits[split].to_iterable_dataset() if streaming else splits[split]
    if streaming:
        return IterableDatasetDict({key: value.to_iterable_dataset() for key, value in splits.items()})
    return DatasetDict(splits)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"usage: {sys.argv[0]} TRL_CHECKOUT [--theirs] [pytest options]")
    tests = Path(arguments[0]).resolve() / "tests"
    rest = [argument for argument in arguments[1:] if argument != "--theirs"]
    files = [str(file) for name in FILES for file in sorted(tests.rglob(f"test_{name}.py"))]
    if not files:
        raise SystemExit(f"TRL_CHECKOUT must hold tests/**/test_{FILES[0]}.py, got {arguments[0]}")
    with tempfile.TemporaryDirectory() as folder:
        plugin = StandIns(Path(folder), theirs="--theirs" in arguments)
        return int(pytest.main([*files, f"--rootdir={tests.parent}", "-q", "-p", "no:cacheprovider", *rest], [plugin]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
