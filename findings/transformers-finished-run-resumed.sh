#!/usr/bin/env bash
# A run that has done its steps does one more each time it is resumed, and its weights move on.
#
# transformers 5.23.0. `Trainer.train(resume_from_checkpoint=True)` of a run whose last checkpoint is that of `max_steps`, in the
# middle of an epoch, does not find that there is nothing left to do: the loop asks whether to stop after a step, not before one. A job
# that is started again by a scheduler until it is done, with the same command, trains on with each start, beyond the end
# of its learning rate's schedule, and writes a checkpoint of a step that was never asked for. At the end of an epoch it stops.
#
# Seen, with max_steps=3: global_step is 3, then 4, then 5; with a constant schedule the weights change each time. No
# warning is given. Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

rows = [{"input_ids": torch.tensor([i, i + 1, i + 2]), "labels": torch.tensor([i, i + 1, i + 2])} for i in range(20)]


def run(resume: bool) -> tuple[int, torch.Tensor]:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **size))
    args = TrainingArguments(
        output_dir="run",
        max_steps=3,
        save_steps=1,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step, model.lm_head.weight.detach().clone()


steps, weights = zip(*(run(resume) for resume in (False, True, True)))
moved = [float((after - before).abs().max()) for before, after in zip(weights, weights[1:])]
print(f"global_step {', '.join(map(str, steps))} with max_steps=3; largest changes of a weight: {moved}")
sys.exit(0 if steps == (3, 4, 5) and min(moved) > 1e-3 else 1)
PYTHON
