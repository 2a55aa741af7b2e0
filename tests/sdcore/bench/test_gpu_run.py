"""benchmarks/gpu_run.sh does each command once, tries again what failed, and goes its whole way on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Stands for Python: says what it was called for, and fails once at what the file `bad` names.
PYTHON = """#!/bin/bash
[[ $1 == -c ]] && cat "$(dirname "$0")/device" && exit
echo "$*" >>"$(dirname "$0")/calls"
! grep -qf "$(dirname "$0")/bad" <<<"$*" || { rm "$(dirname "$0")/bad"; echo bad luck; exit 3; }
"""


def start(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu_run.sh"), "--cpu", *arguments]
    environment = os.environ | {"PYTHON": python, "GPU_RUN_FOLDER": str(folder / "run"), "OUT": str(folder / "out")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_list_needs_no_device_and_an_unknown_step_is_refused(tmp_path: Path) -> None:
    shown = start(tmp_path, "--list", "tests", "step", python="no-such-python").stdout.splitlines()
    assert [line.split()[2].strip(",") for line in shown] == ["tests/kernels", "step/quick"]
    refused = start(tmp_path, "walk")
    assert (refused.returncode, "got walk" in refused.stderr) == (2, True)
    assert not (tmp_path / "run").exists()


def test_a_second_start_does_what_is_not_done_and_another_device_is_refused(tmp_path: Path) -> None:
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "device").write_text("this")
    (tmp_path / "bad").write_text("bench prefix")
    first = start(tmp_path, python=str(python))
    assert first.returncode == 1
    assert "bad luck\nfailed      prefix/quick: exit 3" in first.stdout
    assert len(calls.read_text().splitlines()) == first.stdout.count("done  ") + 1 == 8
    calls.unlink()
    (tmp_path / "bad").write_text("nothing")
    assert start(tmp_path, python=str(python)).returncode == 0
    assert calls.read_text().split()[:4] == ["-m", "sdcore", "bench", "prefix"]
    assert calls.read_text().count("\n") == 1
    assert (tmp_path / "out" / "gpu-run.tar.gz").is_file()
    (tmp_path / "device").write_text("another")
    assert start(tmp_path, python=str(python)).returncode == 2


def test_tuning_ends_in_a_table_on_a_cpu_too(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    shown = start(tmp_path, "tune")
    assert shown.returncode == 0, shown.stdout
    assert (tmp_path / "run" / "tables" / "interpreter.json").is_file()
