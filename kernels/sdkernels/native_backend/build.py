"""Compiles `divergence.c` for this machine on first use, and keeps the library for the next process.

A C compiler is all that is needed: `$CC`, or `cc`, as Triton and torch.compile take them too. The library lies in
`$SDKERNELS_CACHE`, or in `~/.cache/sdkernels`, under a name made of source, command, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("divergence.c")
# No -ffast-math: NaN must stay NaN, and the order of a compensated sum what it is.
FLAGS = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
PROCESSOR = {
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "aarch64": ("-mcpu=native",),
    "arm64": ("-mcpu=native",),
}
SECONDS = 120  # a compilation takes two


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None on a machine that cannot compile them."""
    compiler = _compiler()
    if os.name != "posix" or compiler is None:
        return None
    command = [*compiler, *FLAGS, *PROCESSOR.get(platform.machine(), ("-march=native",))]
    try:
        path = cache_folder() / f"divergence-{_key(command)}.so"
        if not path.exists():
            _compile(command, path)
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        return None


def cache_folder() -> Path:
    """Where libraries are kept; made if need be, for its owner alone: what lies there is run."""
    chosen = os.environ.get("SDKERNELS_CACHE")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "sdkernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) else None


def _key(command: list[str]) -> str:
    said = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    try:
        processor = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model", "fl"))
        ]
    except OSError:
        processor = [platform.processor()]
    parts = (SOURCE.read_bytes(), repr(command).encode(), said, repr(sorted(set(processor))).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [*command, str(SOURCE), "-o", str(made), "-lm"], capture_output=True, check=True, timeout=SECONDS
        )
        made.replace(path)  # whole or not at all, whoever compiles at the same time


def _declare(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    found.sdkernels_divergence.restype = None
    found.sdkernels_divergence.argtypes = [
        *(pointer, integer, number),  # student's logits, their stride and gain
        *(pointer, integer, number, ctypes.c_int),  # teacher's, and whether they are a gap
        *(integer, integer),  # rows, vocabulary
        *(ctypes.c_int, number, number, number),  # kind, alpha, factors of loss and gradient
        *(pointer, pointer),  # values, done
    ]
    return found
