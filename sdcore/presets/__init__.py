"""Names the methods and translates them from YAML and from other projects' configurations; nothing imports torch."""

from .configure import dump_config, load_config, types_of
from .lasgroup import from_lasgroup
from .method import Method, field_types
from .methods import (
    GRPO,
    OPSD,
    PRESETS,
    SDPO,
    SFT,
    ContextDistillation,
    RLTilt,
    SDFTAsRun,
    SDFTPaper,
    SDPOCode,
    TurnHindsight,
    preset,
)
from .trl import from_trl

__all__ = [
    "GRPO",
    "OPSD",
    "PRESETS",
    "SDPO",
    "SFT",
    "ContextDistillation",
    "Method",
    "RLTilt",
    "SDFTAsRun",
    "SDFTPaper",
    "SDPOCode",
    "TurnHindsight",
    "dump_config",
    "field_types",
    "from_lasgroup",
    "from_trl",
    "load_config",
    "preset",
    "types_of",
]
