#!/usr/bin/env bash
# transformers reads a GGUF file whose rotary embeddings are scaled as if they were not, and says nothing.
#
# transformers 5.23.0 with gguf 0.19.0. Files of models with a long context have `ARCHITECTURE.rope.scaling.*` (linear,
# YaRN) or a tensor `rope_freqs.weight` (Llama 3.1 and 3.2). The loader for "llama", "qwen2", "gemma3" and others
# (integrations/ggml.py, GGUF_CONFIG_MAPPING) has no entry for them, so the model computes with other positions than
# it was trained with, at every length. No warning is given.
#
# Seen: a file that states linear scaling by 8 gives rope_parameters of type "default" without a factor. Exit status 1
# where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

from gguf import GGUFWriter, RopeScalingType
from transformers import AutoConfig

writer = GGUFWriter("file.gguf", "llama")  # the metadata alone, without weights
writer.add_name("none")
writer.add_block_count(1)
writer.add_rope_freq_base(50_000.0)
writer.add_rope_scaling_type(RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(8.0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
read = AutoConfig.from_pretrained(".", gguf_file="file.gguf").rope_parameters
print(f"stated: linear, by 8; read: {read}")
sys.exit(0 if read == {"rope_theta": 50_000.0, "rope_type": "default"} else 1)
PYTHON
