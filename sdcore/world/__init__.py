"""Bundles a small world: a language, its episodes, a verifier, and a model that really learns in context."""

from pathlib import Path
from typing import Final

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"  # the model and its tokenizer, as Hugging Face writes them
