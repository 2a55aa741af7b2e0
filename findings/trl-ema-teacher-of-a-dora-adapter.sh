#!/usr/bin/env bash
# TRL's EMA teacher of a DoRA adapter begins far from the base model, where that of a LoRA adapter begins as the base model.
#
# trl 1.16.0, experimental/sdpo/teacher_sync.py, with peft 0.21.2. `PEFTAdapterEMACallback` makes the teacher a second adapter whose
# tensors are all zero, and averages the student's into it. For LoRA, zero factors are the base model. DoRA has a third tensor,
# the norm of each row of the weight, which multiplies the whole layer: with it at zero every adapted layer gives nothing.
# So before the first step the teacher, which `teacher_model_kind="ema"` distils from, is another model; at update_rate 0.05
# it takes tens of steps until the norms are near those that it should have begun with.
#
# Seen: the divergence of the teacher from the base model before any step is 0 nats for LoRA and above 0.1 nats for DoRA on a random Llama
# of 2 layers. Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl.experimental.sdpo.teacher_sync import PEFTAdapterEMACallback

ids = torch.arange(12)[None]
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def first_teacher(use_dora: bool) -> float:
    """Returns the mean KL(base‖teacher) in nats before any step."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()
    with torch.no_grad():
        right = base(ids).logits.log_softmax(-1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora, task_type="CAUSAL_LM")).eval()
    PEFTAdapterEMACallback(model)._initialize_teacher_adapter()
    model.set_adapter("teacher")
    with torch.no_grad():
        taught = model(ids).logits.log_softmax(-1)
    return float((right.exp() * (right - taught)).sum(-1).mean())


lora, dora = first_teacher(False), first_teacher(True)
print(f"KL(base||EMA teacher before step 1): LoRA {lora:.2e} nats, DoRA {dora:.3f} nats")
sys.exit(0 if abs(lora) < 1e-6 and dora > 0.1 else 1)
PYTHON
