#!/usr/bin/env bash
# Merging a DoRA adapter under FSDP2 changes no weight, and the model is then the base model.
#
# peft 0.21.2 with torch 2.13.0. `merge_adapter()` of a model that `fully_shard` has sharded adds LoRA's change to the sharded weight, as it
# does to a whole one. DoRA's variant assigns the merged weight to `weight.data` instead, which does nothing to a DTensor's
# shard; the layer is marked as merged all the same, so that its forward leaves the adapter out. What is sampled, saved or
# measured inside is the base model. Neither an error nor a warning says so. One process is enough.
#
# Seen, as the largest difference of logits after merging from before: LoRA below 1e-4 whole and sharded; DoRA below 1e-4 whole, and
# sharded more than 0.1, with a weight that has not changed by one bit. Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(12)[None]
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def merged(use_dora: bool, sharded: bool) -> tuple[float, float]:
    """Returns the largest change that merging makes to the logits, where none is meant, and to a weight, where one is."""
    torch.manual_seed(0)
    options = {"use_dora": use_dora, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)), config).eval()
    layers = model.base_model.model.model.layers
    if sharded:
        for layer in (*layers, model):
            fully_shard(layer, mesh=mesh)
    weight = layers[0].self_attn.q_proj.base_layer
    with torch.no_grad():
        logits, before = whole(model(ids).logits), whole(weight.weight)
        model.merge_adapter()
        after, again = whole(weight.weight), whole(model(ids).logits)
    return float((again - logits).abs().max()), float((after - before).abs().max())


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
seen = {(dora, sharded): merged(dora, sharded) for dora in (False, True) for sharded in (False, True)}
dist.destroy_process_group()
for (dora, sharded), (logits, weight) in seen.items():
    print(
        f"{'DoRA' if dora else 'LoRA'}, {'sharded' if sharded else 'whole'}: logits differ by {logits:.2g}, a weight changed by {weight:.2g}"
    )
logits, weight = seen.pop((True, True))
right = all(logits < 1e-4 and weight > 0 for logits, weight in seen.values())
sys.exit(0 if right and logits > 0.1 and weight == 0 else 1)
PYTHON
