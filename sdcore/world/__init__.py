"""Bundles a small world: a language, its episodes, a verifier, and a model that really learns in context."""

from pathlib import Path
from typing import Final

# Models with their tokenizers, as Hugging Face writes them; the second has read conversations.
CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
TALKS: Final = Path(__file__).parent / "checkpoint_talks"
