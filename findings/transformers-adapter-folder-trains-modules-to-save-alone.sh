#!/usr/bin/env bash
# An adapter's folder that transformers loads as a model is trained in its `modules_to_save` alone, and its LoRA factors are not.
#
# transformers 5.23.0 with peft 0.21.2. `AutoModelForCausalLM.from_pretrained(folder)` takes the folder of a peft adapter, loads base
# model and adapter, and sets the adapter up for inference: no factor of it has requires_grad. The copies of `modules_to_save` have,
# so that the model does not look like one for inference, an optimizer over what requires a gradient finds weights, and
# the training goes on without an error, of the output layer and nothing else. No warning is given. peft's own
# `AutoPeftModelForCausalLM.from_pretrained(folder)` gives nothing that is trained, and with `is_trainable=True` all of the adapter.
#
# Seen, for LoRA on q_proj with modules_to_save=["lm_head"]: transformers 1 tensor, peft 0, peft with is_trainable=True 5.
# Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config).save_pretrained("adapter")

trained = {
    name: [weight for weight, tensor in model.named_parameters() if tensor.requires_grad]
    for name, model in {
        "transformers": AutoModelForCausalLM.from_pretrained("adapter"),
        "peft": AutoPeftModelForCausalLM.from_pretrained("adapter"),
        "peft, is_trainable=True": AutoPeftModelForCausalLM.from_pretrained("adapter", is_trainable=True),
    }.items()
}
for name, weights in trained.items():
    print(f"{name}: {len(weights)} trained: {', '.join(weights) or 'none'}")
alone = trained["transformers"] == ["lm_head.modules_to_save.default.weight"]
sys.exit(0 if alone and [len(weights) for weights in trained.values()] == [1, 0, 5] else 1)
PYTHON
