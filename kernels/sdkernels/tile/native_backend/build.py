"""Compiles the C files of this folder for this machine on first use, and keeps the library for the next process.

A C compiler is all that is needed: `$CC`, or `cc`, as Triton and torch.compile take them too. The library lies in
`$SDKERNELS_CACHE`, or in `~/.cache/sdkernels`, under a name made of sources, command, compiler and processor.
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
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from ..elementwise import CLOSE, FAR
from ..trials import cache_folder, processor

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.c"))
HEADERS = sorted(FOLDER.glob("*.h"))
# Of products.c: shares of threads start at whole tiles, those of a hidden gradient's columns at whole blocks.
TILE_ROWS, TILE_COLUMNS, DEPTH = 14, 32, 512
BLOCK_ROWS, BLOCK_COLUMNS = 8 * TILE_ROWS, 256
# What Python and C both count with.
SHARED = {
    "CLOSE": f"{CLOSE}f",
    "FAR": f"{FAR}f",
    "TILE_ROWS": TILE_ROWS,
    "TILE_COLUMNS": TILE_COLUMNS,
    "DEPTH": DEPTH,
    "BLOCK_ROWS": BLOCK_ROWS,
    "BLOCK_COLUMNS": BLOCK_COLUMNS,
}
# No -ffast-math: NaN must stay NaN, and the order of a compensated sum what it is.
FLAGS = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
PROCESSOR = {
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "aarch64": ("-mcpu=native",),
    "arm64": ("-mcpu=native",),
}
SECONDS = 120  # a compilation takes two


class Job(ctypes.Structure):
    """Tells the threads of the library what to work on: `Job` of rows.h, field by field.

    Addresses are those of tensors, which have to outlive it; what is not given is 0.
    """

    _fields_ = (
        ("student", c_void_p),
        ("teacher", c_void_p),
        ("student_stride", c_int64),
        ("teacher_stride", c_int64),
        ("rows", c_int64),
        ("vocab", c_int64),
        ("student_gain", c_float),
        ("teacher_gain", c_float),
        ("teacher_is_gap", c_int32),
        ("kind", c_int32),
        ("tail", c_int32),
        ("choose", c_int32),
        ("alpha", c_double),
        ("loss_factor", c_double),
        ("gradient_factor", c_double),
        ("k", c_int64),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("values", c_void_p),
        ("done", c_void_p),
        ("next", c_int64),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled functions; None on a machine that cannot compile them."""
    compiler = _compiler()
    if os.name != "posix" or compiler is None:
        return None
    shared = [f"-D{name}={value}" for name, value in SHARED.items()]
    command = [*compiler, *FLAGS, *shared, *PROCESSOR.get(platform.machine(), ("-march=native",))]
    try:
        path = cache_folder() / f"sdkernels-{_key(command)}.so"
        if not path.exists():
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        return None


def _compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) else None


def _key(command: list[str]) -> str:
    said = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    sources = (path.read_bytes() for path in [*SOURCES, *HEADERS])
    parts = (*sources, repr(command).encode(), said, repr(list(processor())).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [*command, *map(str, SOURCES), "-o", str(made), "-lm"], capture_output=True, check=True, timeout=SECONDS
        )
        made.replace(path)  # whole or not at all, whoever compiles at the same time
