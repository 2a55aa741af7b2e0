"""Prepares what a trainer is made of, its model and data, and refuses what does not go together before loading.

    check(args, method, rewards, sampler)
    model, tokenizer = loaded("Qwen/Qwen3-0.6B", None, args, peft_config=None)
    check_engine(accelerator.state)

Not covered: what a model must be like, which `sdcore.models` says.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from ..contexts import require_text
from ..contexts.conversation import History
from ..data import read_examples
from ..errors import ArgumentError, UnsupportedModelError
from ..models import find_body
from ..models.body import noise_of
from ..models.gguf import plain_folder, require_there
from ..presets.method import OF_TURNS, Method
from ..rollouts.environments import Agent
from ..rollouts.named import load, load_tools
from ..rollouts.rewards import OnError, Reward
from ..rollouts.samplers import ModelSampler, Sampler
from ..types import Example
from .config import TURNS, SelfDistillationConfig
from .evaluation import JUDGED, MEASURED


def args_of(args: Any, method: Any, **objects: Any) -> SelfDistillationConfig:
    """Returns the arguments, defaults for None. Raises `ArgumentError` where they or the method are something else.

    `objects` are the trainer's others, which must not be given by their names or classes.

    With `disable_tqdm` the bars of transformers and datasets are off from here on, in the whole process, as
    transformers' trainer sets the level of its log.
    """
    if args is not None and not isinstance(args, SelfDistillationConfig):
        raise ArgumentError(f"args must be a SelfDistillationConfig, got {type(args).__name__}")
    if not isinstance(method, Method):
        raise ArgumentError(f"method must be a Method such as SDPO(), got {method!r:.80}")
    args = args or SelfDistillationConfig()
    _check_objects(objects)
    if args.disable_tqdm:
        transformers_logging.disable_progress_bar()
        importlib.import_module("datasets").disable_progress_bars()
    return args


# What each of these has, and an example: a class of them is none, nor is a name.
OBJECTS = {
    "teacher": (("weights", "share", "forward"), "Frozen(another model), or that model"),
    "reference": (("weights", "forward"), "Frozen(another model), or that model"),
    "sampler": (("sample",), "ModelSampler()"),
    "context": (("condition",), "sdcore.contexts.Template(...)"),
    "processing_class": (("decode",), "AutoTokenizer.from_pretrained(...)"),
    "peft_config": (("peft_type",), "LoraConfig(...)"),
}


def _check_objects(given: Mapping[str, Any]) -> None:
    """Raises `ArgumentError` for an object of the trainer that is given by its name or its class."""
    for name, value in given.items():
        attributes, example = OBJECTS[name]
        if value is not None and (isinstance(value, type) or not any(hasattr(value, each) for each in attributes)):
            raise ArgumentError(f"{name} must be an object, such as {example}, got {value!r:.80}")


def agent_of(
    args: SelfDistillationConfig, tools: Sequence[Callable[..., Any] | str], environment_factory: Any
) -> Agent | None:
    """Returns who answers the student, loaded where given by name; None where nobody does. Raises `ArgumentError`."""
    if not tools and environment_factory is None:
        return None
    named = isinstance(environment_factory, str)
    return Agent(
        tools=load_tools(tools),
        environment_factory=load(environment_factory) if named else environment_factory,
        max_turns=args.max_turns,
        max_tokens=args.max_trajectory_length,
        max_seconds=args.max_trajectory_seconds,
        timeout=args.reward_timeout,
        on_error=cast(OnError, args.reward_on_error),
        history=cast(History, args.history),
    )


def check(
    args: SelfDistillationConfig,
    method: Method,
    rewards: Sequence[Reward],
    sampler: Sampler,
    agent: Agent | None = None,
) -> None:
    """Raises `ArgumentError` for choices of method and arguments that do not go together."""
    is_judged = bool(rewards) or (agent is not None and agent.environment_factory is not None)
    if method.needs_rewards and not is_judged:
        raise ArgumentError(
            f"reward_funcs must have a function for {type(method).__name__}, which needs rewards, got none"
        )
    known = SelfDistillationConfig.__dataclass_fields__
    turns = [f"{name}={getattr(args, name)!r}" for name in TURNS if getattr(args, name) != known[name].default]
    if agent is None and turns:
        raise ArgumentError(f"tools or environment_factory must be given for turns, got neither and {', '.join(turns)}")
    if agent is not None and agent.max_tokens is not None and agent.max_tokens < args.max_completion_length:
        raise ArgumentError(
            f"max_trajectory_length must be at least max_completion_length={args.max_completion_length}, the tokens of "
            f"a turn, got {agent.max_tokens}"
        )
    if agent is None and method.context in OF_TURNS:
        raise ArgumentError(
            f"context must be one of whole answers without tools and environment_factory, got {method.context!r}"
        )
    if agent is not None and (method.samples == "dataset" or method.teacher_samples > 0):
        raise ArgumentError(
            "samples must be 'student' and teacher_samples 0 with tools or an environment, which answer the student, "
            f"got {method.samples!r} and {method.teacher_samples}"
        )
    names, best = (*MEASURED, *(JUDGED if is_judged else ())), args.metric_for_best_model
    if best is not None and not best.endswith(names):
        default = " (transformers' default for load_best_model_at_end and for schedules that follow a metric)"
        raise ArgumentError(
            f"metric_for_best_model must be one of {', '.join(names)} in this run, got {best!r}"
            f"{default if best == 'loss' else ''}"
        )
    strategy = args.train_sampling_strategy
    if strategy not in ("random", "sequential"):
        raise ArgumentError(f"train_sampling_strategy must be 'random' or 'sequential', got {strategy!r}")
    if args.generation_batch_size is not None and not isinstance(sampler, ModelSampler):
        raise ArgumentError(
            "generation_batch_size must be None with a sampler of one's own, which is asked for a batch at a time, got "
            f"{args.generation_batch_size}"
        )
    teacher_kept = method.has_teacher and method.teacher not in ("live", "adapter_off")
    reference_kept = method.needs_reference and method.teacher != "adapter_off"
    if args.teacher_device is not None and not (teacher_kept or reference_kept or args.drift_probe_every):
        raise ArgumentError(
            f"teacher_device must be None for {type(method).__name__} with teacher={method.teacher!r}, which keeps no "
            f"weights beside the student's, got {args.teacher_device!r}"
        )
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
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UnsupportedModelError(
            "args and the launcher must not ask for FSDP on CPUs, where accelerate shards nothing and does not say so"
        )


def check_tools(tokenizer: Any, agent: Agent | None) -> None:
    """Raises `ArgumentError` for a tokenizer whose chat template does not show the student the tools that it has."""
    if agent is None:
        return
    tokenizer, turns = getattr(tokenizer, "tokenizer", tokenizer), [{"role": "user", "content": "?"}]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ArgumentError("processing_class must have a chat template with tools or an environment, got one without")
    shown = tokenizer.apply_chat_template(turns, tokenize=False, tools=agent.schemas or None)
    if agent.schemas and shown == tokenizer.apply_chat_template(turns, tokenize=False):
        raise ArgumentError(
            "tools must be shown to the student by the tokenizer's chat template, got one that renders the same "
            "without them: give the tokenizer another chat_template"
        )


def check_template_kwargs(tokenizer: Any, kwargs: Mapping[str, Any] | None) -> None:
    """Raises `ArgumentError` for the first of `chat_template_kwargs` that the tokenizer's chat template never names."""
    template = getattr(tokenizer, "chat_template", None)
    if not kwargs or not isinstance(template, str):
        return
    known = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in kwargs:
        if name not in known and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ArgumentError(
                f"chat_template_kwargs must be what the tokenizer's chat template reads, got {name!r}, which is not"
            )


def within_model(context: Any, positions: int | None, max_completion_length: int) -> Any:
    """Returns the context builder that cuts, if it does, to what the model can read with a completion behind it."""
    if positions is None or getattr(context, "overflow", "error") == "error":
        return context
    room = positions - max_completion_length
    if room < 1:
        raise ArgumentError(
            f"max_completion_length must leave room for a prompt in the model's {positions} positions, got "
            f"{max_completion_length}"
        )
    asked = context.max_teacher_prompt_length
    return replace(context, max_teacher_prompt_length=room if asked is None else min(asked, room))


@contextmanager
def _peft_unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 asks by this name, which transformers 5.23 has another for.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


@_peft_unwarned()
def model_of(name: str, **options: Any) -> Any:
    """Loads a model by its name; of an adapter's folder the adapter as it was saved, with the tokens that it added."""
    if (file := find_adapter_config_file(name)) is None:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    if base := json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path"):
        require_there(base, called=f"the base model of {name}")
    return _peft().AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)


@_peft_unwarned()
def loaded(
    model: Any, tokenizer: Any, args: SelfDistillationConfig, peft_config: Any, agent: Agent | None = None
) -> tuple[Any, Any]:
    """Loads model and tokenizer that are given by name, or not at all. Raises what transformers raises.

    An adapter's folder gives the adapter as it was saved, to be trained on. Raises `ArgumentError` for a `peft_config`
    beside an adapter that is there already, for a model of which nothing is trained, and for one that transformers read
    from a GGUF file.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str) and (args.gguf_file or getattr(model, "quantization_method", None) == "gguf"):
        raise ArgumentError(
            "model must be the name of the folder or Hub model that has the GGUF file, or the file's path: what "
            f"transformers reads of one can be neither trained nor saved; got a {type(model).__name__}"
        )
    remote = args.trust_remote_code
    if isinstance(model, str):
        model = plain_folder(model, args.gguf_file)
        if peft_config is not None and find_adapter_config_file(model) is not None:
            _refuse_second_adapter(model)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, trust_remote_code=remote)
        model = model_of(model, dtype=args.model_dtype, trust_remote_code=remote)
    elif args.model_dtype == "bfloat16" != str(getattr(model, "dtype", None)).removeprefix("torch."):
        raise ArgumentError("model_dtype is of a model that is given by name: load this one with it, got 'bfloat16'")
    if tokenizer is None:
        if not model.config._name_or_path:
            raise ArgumentError("processing_class must be the tokenizer of a model that has no name, got None")
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=remote)
    check_template_kwargs(tokenizer, args.chat_template_kwargs)  # type: ignore[arg-type]  # an object, once checked
    check_tools(tokenizer, agent)
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
    check_model(model)
    return model, tokenizer


def check_model(model: Any) -> None:
    """Raises for weights that cannot be trained, or not be saved, as they are; warns of what would have no effect."""
    half = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype == torch.float16]
    if half:
        raise UnsupportedModelError(
            f"model must have float32 or bfloat16 weights where it is trained, got float16 in {half[0]}: steps vanish "
            "or overflow there (fp16=True computes in float16, with float32 weights)"
        )
    generation = None if getattr(model, "peft_config", None) else getattr(model, "generation_config", None)
    try:
        if generation is not None:  # saved with the model, which would fail after the training
            generation.validate(strict=True)
    except ValueError as error:
        raise ArgumentError(f"model must have a generation_config that transformers can save: {error}") from error
    config = find_body(model).config
    unused = noise_of(model, config)
    unused += ["router_aux_loss_coef"] if getattr(config, "output_router_logits", False) else []
    if unused:
        warnings.warn(
            f"the model asks for {', '.join(unused)}, which has no effect: the loss is the method's alone, and student "
            "and teacher are compared without chance",
            stacklevel=3,
        )


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


def examples_of(source: Any, what: str = "data", skipped: dict[str, list[str]] | None = None) -> list[Example] | None:
    """Returns what `read_examples` reads, or examples, with their place as the source of those that have none.

    `skipped` gets what is said of rows that cannot be used, under the name of the data, `what`. None: the first raises,
    as does one that is more than text.
    """
    if source is None:
        return None
    refused = None if skipped is None else skipped.setdefault(what, [])
    if isinstance(source, Sequence) and not isinstance(source, str) and all(isinstance(row, Example) for row in source):
        examples = [row if row.source else replace(row, source=f"rows, row {i}") for i, row in enumerate(source)]
    else:
        examples = read_examples(source, refused=refused)
    if refused is None:
        require_text(examples)
    return examples


def of_each(source: Any, function: Callable[[Any, str], Any], what: str) -> Any:
    """Returns `function(data, name)` of a data set called `what`, or of each of a dict of them."""
    if isinstance(source, dict):
        return {name: function(part, f"{what}[{name!r}]") for name, part in source.items()}
    return None if source is None else function(source, what)
