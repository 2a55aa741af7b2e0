"""Computes verl's distillation losses without its logits: from hidden states, packed batches, a server's top-k.

    responses = Responses.packed(input_ids.offsets(), response_mask.offsets().diff().tolist())
    loss, metrics = distillation_loss(hidden_states, lm_head.weight, responses, response_mask, input_ids=input_ids,
                                      teacher=Scored(data["teacher_ids"], data["teacher_logprobs"]))

| here                             | in verl                                                                           |
|----------------------------------|-----------------------------------------------------------------------------------|
| `compute_forward_kl_topk`        | `trainer/distillation/fsdp/losses.py`: the logits processor, arguments and result |
| `patch_forward`                  | the model's fused forward, `fused_linear_aux` included                            |
| `collect`, `register`            | a `DistillationLossFn` of `trainer/distillation/losses.py`, and its registry      |
| `distillation_loss`              | the two together, from hidden states to (loss, metrics), aggregated               |
| `compute_self_distillation_loss` | lasgroup/SDPO's function of that name, as its actor calls it                      |
| `self_distillation_loss`         | the same from hidden states                                                       |

What differs from the obvious: verl's `forward_kl_topk` sums over the k tokens alone, which is no divergence: it can be
negative, which verl clamps. Here the rest of the vocabulary is one more token (`TopK(tail=True)`), so there is nothing
to clamp. A row of a packed batch predicts the token after it, so a response's rows begin one before it; verl's teacher
rows are shifted already. A sequence's last teacher row is a filler, of id 0 repeated: it is left out.

Read at verl-project/verl 1dda039 (0.10.0.dev) and lasgroup/SDPO 0e6d510 (verl 0.7.0.dev); tested with tensors of those
shapes, and by hand with the loss stage of verl 0.9.1, but in no training. Not covered: Megatron's vocabulary-parallel
logits, context and sequence parallelism, a temperature per sample, and `use_policy_gradient`.
"""

from .engine import FusedAux, FusedOutput, collect, compute_forward_kl_topk, patch_forward, register
from .layout import Hidden, Responses, Scored, loss_weights
from .losses import compute_self_distillation_loss, distillation_loss, self_distillation_loss

__all__ = [
    "FusedAux",
    "FusedOutput",
    "Hidden",
    "Responses",
    "Scored",
    "collect",
    "compute_forward_kl_topk",
    "compute_self_distillation_loss",
    "distillation_loss",
    "loss_weights",
    "patch_forward",
    "register",
    "self_distillation_loss",
]
