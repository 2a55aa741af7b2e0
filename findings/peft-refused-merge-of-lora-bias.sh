#!/usr/bin/env bash
# A merge that peft refuses has changed the model: after the error the adapter counts twice in the layer that it stopped at.
#
# peft 0.21.2. `LoraConfig(lora_bias=True)` on a layer without a bias is accepted, with a warning that merging will not be possible, and
# trains. `merge_adapter()` then raises `RuntimeError`, but only after the product of the factors was added to the layer's
# weight, and before the layer is marked as merged: its forward adds the product once more, and `unmerge_adapter()` has
# nothing to take back. Who catches the error, to go on without merging, goes on with another model. With
# `safe_merge=True` the weight is left as it was.
#
# Seen: no layer is marked as merged, and the logits differ from those before by more than 0.1; after safe_merge=True by 0.
# Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(12)[None]
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def after_refusal(safe_merge: bool) -> tuple[str, int, float]:
    """Returns the error, the layers that are marked as merged, and the largest change of the logits."""
    torch.manual_seed(0)
    options = {"lora_bias": True, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)), config).eval()
    with torch.no_grad():
        before = model(ids).logits
        try:
            model.merge_adapter(safe_merge=safe_merge)
            said = "none"
        except RuntimeError as error:
            said = str(error)
        change = float((model(ids).logits - before).abs().max())
    return said, sum(bool(getattr(layer, "merged", False)) for layer in model.modules()), change


seen = {safe: after_refusal(safe) for safe in (False, True)}
for safe, (said, marked, change) in seen.items():
    print(f"safe_merge={safe}: {said!r}; {marked} layers marked as merged, logits changed by {change:.2g}")
refused = all("no bias" in said and marked == 0 for said, marked, _ in seen.values())
sys.exit(0 if refused and seen[False][2] > 0.1 and seen[True][2] == 0 else 1)
PYTHON
