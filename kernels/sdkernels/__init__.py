"""sdkernels: the language-model head fused with a divergence between two softmaxes, forward and backward.

`linear_divergence` is the operation; `linear_logprobs`, `linear_topk` and `logit_divergence` share its machinery.
Needs torch alone; triton is imported when a GPU tensor, or `backend="triton"`, asks for it.
"""

from .api import LogprobOutput, TopKOutput, linear_divergence, linear_logprobs, linear_topk, logit_divergence
from .types import DivergenceOutput, ImportanceClip, LogitTransform, TeacherMix, TopK, TopKLogprobs

__all__ = [
    "DivergenceOutput",
    "ImportanceClip",
    "LogitTransform",
    "LogprobOutput",
    "TeacherMix",
    "TopK",
    "TopKLogprobs",
    "TopKOutput",
    "linear_divergence",
    "linear_logprobs",
    "linear_topk",
    "logit_divergence",
]
