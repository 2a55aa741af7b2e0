"""Prepares what a trainer is made of, its model and data, and refuses what does not go together before loading.

    check(args, method, rewards, sampler)
    model, tokenizer = loaded("Qwen/Qwen3-0.6B", None, args, peft_config=None)
    check_engine(accelerator.state)

Not covered: what a model must be like, which `sdcore.models` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import find_adapter_config_file

from ..contexts import require_text
from ..data import read_examples
from ..errors import ArgumentError, UnsupportedModelError
from ..models.gguf import plain_folder
from ..presets.method import Method
from ..rollouts.rewards import Reward
from ..rollouts.samplers import ModelSampler, Sampler
from ..types import Example
from .config import SelfDistillationConfig


def args_of(args: Any, method: Any) -> SelfDistillationConfig:
    """Returns the arguments, defaults for None. Raises `ArgumentError` where they or the method are something else."""
    if args is not None and not isinstance(args, SelfDistillationConfig):
        raise ArgumentError(f"args must be a SelfDistillationConfig, got {type(args).__name__}")
    if not isinstance(method, Method):
        raise ArgumentError(f"method must be a Method such as SDPO(), got {method!r:.80}")
    return args or SelfDistillationConfig()


def check(args: SelfDistillationConfig, method: Method, rewards: Sequence[Reward], sampler: Sampler) -> None:
    """Raises `ArgumentError` for choices of method and arguments that do not go together."""
    if method.needs_rewards and not rewards:
        raise ArgumentError(
            f"reward_funcs must have a function for {type(method).__name__}, which needs rewards, got none"
        )
    strategy = args.train_sampling_strategy
    if strategy not in ("random", "sequential"):
        raise ArgumentError(f"train_sampling_strategy must be 'random' or 'sequential', got {strategy!r}")
    compared = method.target == "policy_gradient" or method.distillation_weight < 1
    old = args.num_iterations > 1 or not isinstance(sampler, ModelSampler)
    if compared and old and not (args.top_p == 1 and args.top_k is None):
        raise ArgumentError(
            "top_p must be 1 and top_k None where a policy gradient compares the student with who sampled "
            f"(num_iterations > 1, or another engine), got {args.top_p} and {args.top_k}"
        )
    asked = compared or method.target == "tilt" or method.importance_clip is not None
    if asked and args.sampling_temperature == 0:
        raise ArgumentError(
            f"sampling_temperature must not be 0 for {type(method).__name__}, which asks how likely a sample was, got 0"
        )


def check_engine(state: Any) -> None:
    """Raises `UnsupportedModelError` for what accelerate, whose state this is, must not put around a model."""
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise UnsupportedModelError(
            "args must not ask for DeepSpeed, under which this trainer has not been tried: use DDP or FSDP2, or "
            "distill_step with its engine in a loop of your own"
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UnsupportedModelError(
            f"args must not ask for FSDP{plugin.fsdp_version}, which is accelerate's default: use FSDP2, by "
            'fsdp_config={"version": 2} or `accelerate launch --fsdp_version 2`'
        )


def loaded(model: Any, tokenizer: Any, args: SelfDistillationConfig, peft_config: Any) -> tuple[Any, Any]:
    """Loads model and tokenizer that are given by name, or not at all. Raises what transformers raises.

    An adapter's folder gives the adapter as it was saved, to be trained on. Raises `ArgumentError` for a `peft_config`
    beside an adapter that is there already, for a model of which nothing is trained, and for one that transformers read
    from a GGUF file.
    """
    if not isinstance(model, str) and (args.gguf_file or getattr(model, "quantization_method", None) == "gguf"):
        raise ArgumentError(
            "model must be the name of the folder or Hub model that has the GGUF file, or the file's path: what "
            f"transformers reads of one can be neither trained nor saved; got a {type(model).__name__}"
        )
    if isinstance(model, str):
        model = plain_folder(model, args.gguf_file)
        remote = args.trust_remote_code
        has_adapter = find_adapter_config_file(model) is not None
        if has_adapter and peft_config is not None:
            _refuse_second_adapter(model)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, trust_remote_code=remote)
        options = {"dtype": args.model_dtype, "trust_remote_code": remote}
        if has_adapter:
            model = _peft().AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(model, **options)
    if tokenizer is None:
        if not model.config._name_or_path:
            raise ArgumentError("processing_class must be the tokenizer of a model that has no name, got None")
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if peft_config is not None:
        if getattr(model, "peft_config", None):
            _refuse_second_adapter(type(model).__name__)
        peft = _peft()
        set_seed(args.seed)  # of the adapter's random start
        model = peft.get_peft_model(model, peft_config)
    # Of an adapter that transformers loads, copies in modules_to_save are trained and the rest is not.
    transformers_own = model.peft_config if getattr(model, "_hf_peft_config_loaded", False) else {}
    resting = any(config.inference_mode for config in transformers_own.values())
    if resting or not any(weight.requires_grad for weight in model.parameters()):
        raise ArgumentError(
            f"model must have weights that are trained, got a {type(model).__name__} without any, or with an adapter "
            "for inference: give the adapter's folder by name, or PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return model, tokenizer


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("an adapter needs PEFT: pip install 'sdcore[peft]'") from error
    return peft


def _refuse_second_adapter(name: str) -> NoReturn:
    """Raises, since an adapter on merged weights is saved with the name of the unmerged ones, and loses the first."""
    raise ArgumentError(
        f"peft_config must be None for a model that has an adapter already, which goes on being trained, got one for "
        f"{name}: for a new adapter, save the model with the old one merged first (merge_and_unload, save_pretrained)"
    )


def built(given: Any, needed: bool, build: Callable[..., Any], model: nn.Module, args: SelfDistillationConfig) -> Any:
    """Returns the teacher that is given, or the method's own: of a given module, or of the model as it is now.

    None where the method does not need one.
    """
    if not needed:
        return None
    if isinstance(given, nn.Module):
        given = given.to(args.device).eval().requires_grad_(False)
    elif given is not None:
        return given
    return build(model, device=args.teacher_device, reference=given)


def examples_of(source: Any) -> list[Example] | None:
    """Returns what `read_examples` reads, or examples as they are. Refuses those that are more than text."""
    if source is None:
        return None
    if isinstance(source, Sequence) and not isinstance(source, str) and all(isinstance(row, Example) for row in source):
        examples = list(source)
    else:
        examples = read_examples(source)
    require_text(examples)
    return examples


def eval_examples_of(source: Any) -> Any:
    """Does the same for one data set, or for each of a dict of them."""
    if isinstance(source, dict):
        return {name: examples_of(part) for name, part in source.items()}
    return examples_of(source)
