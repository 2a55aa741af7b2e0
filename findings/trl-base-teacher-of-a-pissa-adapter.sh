#!/usr/bin/env bash
# TRL's `base` teacher is not the base model where peft's adapter was initialised by PiSSA or OLoRA.
#
# trl 1.16.0 with peft 0.21.2. `teacher_model_kind="base"` "uses the initial student" and, for a peft model, is reached by turning the
# adapter off (`use_adapter(model, adapter_name=None)`, as the reference model of other TRL trainers is). `init_lora_weights` "pissa" and
# "olora" move a part of each base weight into the adapter, so that the model with its adapter is the initial student and the
# model without it lacks the largest part of every adapted layer. No warning is given.
#
# Seen: KL(initial student‖model without adapter) is 0 nats with the default initialisation, above 0.1 nats with both others.
# Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import use_adapter

ids = torch.arange(12)[None]
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def base_teacher(init: bool | str) -> tuple[float, float]:
    """Returns KL in nats from the initial student to the model with its adapter, and to the one without."""
    torch.manual_seed(0)
    student = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()
    with torch.no_grad():
        right = student(ids).logits.log_softmax(-1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM")
        model = get_peft_model(student, config).eval()
        adapted = model(ids).logits.log_softmax(-1)
        with use_adapter(model, adapter_name=None):
            off = model(ids).logits.log_softmax(-1)
    return tuple(float((right.exp() * (right - other)).sum(-1).mean()) for other in (adapted, off))


seen = {init: base_teacher(init) for init in (True, "pissa", "olora")}
for init, (adapted, off) in seen.items():
    print(f"init_lora_weights={init!r}: with adapter {adapted:.1e} nats, TRL's base teacher {off:.3g} nats")
as_seen = all(abs(adapted) < 1e-4 for adapted, _ in seen.values()) and abs(seen[True][1]) < 1e-6
sys.exit(0 if as_seen and min(seen["pissa"][1], seen["olora"][1]) > 0.1 else 1)
PYTHON
