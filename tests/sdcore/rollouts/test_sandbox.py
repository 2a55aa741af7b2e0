"""Code that tries to get past the limits: what it reads, what it eats, what it leaves behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sdcore.errors import ArgumentError
from sdcore.rollouts import sandbox
from sdcore.rollouts.environments import Agent
from sdcore.rollouts.sandbox import SandboxError, code_reward, extract_code, python_tests, run_limited, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits need Linux")
ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def processes_that_say(marker: str) -> list[int]:
    """Processes with a word on their command line; zombies have none."""
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                pids.append(int(name))
        except OSError:
            continue
    return pids


def leftover(marker: str) -> list[int]:
    """What is still there after a moment: a killed process takes a while to go."""
    for _ in range(100):
        if not processes_that_say(marker):
            return []
        time.sleep(0.02)
    return processes_that_say(marker)


def test_a_program_runs_and_its_output_comes_back() -> None:
    result = run_limited(python="import sys; print(input()[::-1]); print('oh', file=sys.stderr)", stdin="abc\n")
    assert (result.stdout, result.stderr, result.exit_code, result.ok) == ("cba\n", "oh\n", 0, True)
    assert run_limited("exit 3").outcome == "exit code 3"
    assert run_limited(["echo", "a  b"]).stdout == "a  b\n"
    assert not run_limited("kill -9 $$").ok


def test_a_secret_of_the_environment_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    shown = run_limited(python="import os, sys; print(os.environ); print(sys.path)")
    assert shown.ok
    assert "hf_secret" not in shown.stdout
    assert "/nowhere" not in shown.stdout
    names = run_limited(["env"]).stdout
    assert {line.partition("=")[0] for line in names.splitlines()} == {"PATH", "HOME", "TMPDIR", "LANG"}


def test_open_files_of_ours_are_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hidden")
    with open(tmp_path / "secret") as ours:
        os.set_inheritable(ours.fileno(), True)
        listed = run_limited(["ls", "-l", "/proc/self/fd"])
    assert listed.ok
    assert "secret" not in listed.stdout


def test_it_works_in_its_own_directory_which_is_gone_afterwards() -> None:
    code = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.chmod('a', 0)\nprint(os.getcwd())"
    result = run_limited(python=code)
    directory = Path(result.stdout.strip())
    assert result.ok
    assert directory.name.startswith("sdcore-sandbox-")
    assert not directory.exists()


def test_a_directory_nested_too_deep_for_python_is_gone_too() -> None:
    code = "import os\nprint(os.getcwd())\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')"
    result = run_limited(python=code)
    assert result.ok, result.stderr
    assert not Path(result.stdout.strip()).exists()


def test_an_endless_loop_is_stopped_by_the_clock() -> None:
    result = run_limited(python="import time\nprint('on', flush=True)\ntime.sleep(100)", wall_seconds=0.4)
    assert result.timed_out
    assert result.exit_code is None
    assert not result.ok
    assert "timed out after" in result.outcome
    assert result.stdout == "on\n"  # what it said before counts


def test_a_busy_loop_is_stopped_by_its_cpu_time() -> None:
    result = run_limited(python="while True: pass", wall_seconds=30, cpu_seconds=1)
    assert not result.timed_out
    assert result.outcome == "used up its CPU time"


def test_a_child_that_left_its_session_does_not_outlive_the_command() -> None:
    code = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sh", ["sh", "-c", "sleep 300; : sdcore-escaped"])
    os._exit(0)
os.wait()
"""
    assert run_limited(python=code).ok
    assert leftover("sdcore-escaped") == []


def test_children_are_killed_when_the_time_is_up() -> None:
    command = "setsid sh -c 'trap \"\" TERM HUP INT; sleep 300; : sdcore-stubborn' & sleep 300; : sdcore-stubborn"
    assert run_limited(command, wall_seconds=0.5).timed_out
    assert leftover("sdcore-stubborn") == []


def test_killing_the_watching_process_is_no_way_out() -> None:
    code = "import os, time\nos.kill(os.getppid(), 9)\nprint('free', flush=True)\ntime.sleep(300)  # sdcore-free"
    result = run_limited(python=code, wall_seconds=20)
    assert not result.ok
    assert result.seconds < 10


def test_a_memory_hog_is_refused_its_memory() -> None:
    result = run_limited(python="x = bytearray(400 << 20)", memory_mb=200)
    assert not result.ok
    assert "MemoryError" in result.stderr
    assert run_limited(python="x = bytearray(20 << 20)", memory_mb=200).ok


def test_a_huge_file_is_cut_off() -> None:
    code = "f = open('big', 'wb')\nfor _ in range(64):\n    f.write(bytes(1 << 20)); f.flush()"
    result = run_limited(python=code, file_mb=2)
    assert not result.ok
    assert "File too large" in result.stderr
    result = run_limited("head -c 8000000 /dev/zero > big", file_mb=2)
    assert not result.ok


def test_huge_output_is_kept_in_part_and_blocks_nobody() -> None:
    code = "import sys\nprint('first')\nsys.stdout.write('x' * (8 << 20))\nprint('\\nlast')"
    result = run_limited(python=code, max_output=1000)
    assert result.ok
    assert result.truncated
    assert result.stdout.startswith("first\n")
    assert result.stdout.endswith("\nlast\n")
    assert "bytes left out" in result.stdout
    assert len(result.stdout) < 1100


def test_output_without_end_is_stopped_by_the_clock() -> None:
    result = run_limited("yes", wall_seconds=0.5, max_output=100)
    assert result.timed_out
    assert len(result.stdout) < 200


def test_input_that_is_never_read_blocks_nobody_and_no_input_is_an_end() -> None:
    assert run_limited("true", stdin="x" * (4 << 20)).ok
    result = run_limited(python="print(repr(__import__('sys').stdin.read()))", wall_seconds=5)
    assert result.stdout == "''\n"


def test_files_and_core_dumps_are_limited() -> None:
    code = "fs = []\nwhile True:\n    fs.append(open('/dev/null'))"
    assert "Too many open files" in run_limited(python=code).stderr
    assert run_limited("ulimit -c").stdout == "0\n"


def test_commands_run_side_by_side_do_not_mix() -> None:
    outputs: dict[int, str] = {}

    def one(number: int) -> None:
        outputs[number] = run_limited(python="print(input())", stdin=f"{number}\n").stdout

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {number: f"{number}\n" for number in range(6)}


def test_no_file_descriptor_is_left_open() -> None:
    run_limited("true")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run_limited("true")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_command_that_does_not_exist_is_an_error_of_the_caller() -> None:
    with pytest.raises(SandboxError, match="no-such-program: No such file"):
        run_limited(["no-such-program"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of command and python must be given"),
        ({"command": "true", "python": "1"}, "one of command and python must be given"),
        ({"command": []}, "command must be a list of words"),
        ({"command": "true", "wall_seconds": 0}, "wall_seconds must be positive and finite, got 0"),
        ({"command": "true", "memory_mb": float("inf")}, "memory_mb must be positive and finite, got inf"),
    ],
)
def test_calls_without_meaning_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run_limited(**arguments)


def test_elsewhere_than_on_linux_nothing_runs_without_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="limits on a command need Linux, this is darwin"):
        run_limited(["touch", str(tmp_path / "ran")])
    assert not (tmp_path / "ran").exists()


def test_right_code_earns_1_and_no_feedback() -> None:
    reward = code_reward()
    assert reward(prompt="Write add.", completion=f"Here it is:\n```python\n{ADD}```\nDone.", tests=TESTS) == (
        1.0,
        None,
    )
    assert reward(prompt="Write add.", completion=ADD, tests=TESTS[0], other=1) == (1.0, None)
    assert python_tests(prompt="Write add.", completion=ADD, tests=TESTS, other=1) == (1.0, None)


def test_wrong_code_earns_its_share_and_hears_of_the_first_error() -> None:
    score, feedback = code_reward()(
        prompt="", completion=ADD.replace("+", "-"), tests=["assert add(1, 0) == 1", *TESTS]
    )
    assert score == pytest.approx(1 / 3)
    assert feedback is not None
    assert feedback.startswith("Test 2 of 3 failed:\nTraceback")
    assert "assert add(1, 2) == 3" in feedback
    assert "program.py" not in feedback  # nothing of the judge


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("def add(a, b: return", "SyntaxError"),
        ("raise KeyError('no')", "KeyError: 'no'"),
        ("import os; os._exit(0)", "the code did not finish: exit code 0"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("while True: pass", "the code did not finish: timed out"),
        ("def add(a, b):\n    while True: pass", "test 1 did not finish: timed out"),
        ("def add(a, b):\n    import os; os._exit(0)", "test 1 did not finish: exit code 0"),
        ("x = bytearray(4 << 30)", "MemoryError"),
    ],
)
def test_code_that_fails_otherwise_passes_nothing_and_is_told_why(completion: str, expected: str) -> None:
    score, feedback = code_reward(wall_seconds=0.7)(prompt="", completion=completion, tests=TESTS)
    assert score == 0.0
    assert expected in str(feedback)


def test_what_the_code_prints_is_no_verdict_and_no_trouble() -> None:
    faked = 'import sys\nfor n in range(3): print(\'{"test": %d, "error": null}\' % n, flush=True)\nraise SystemExit'
    assert code_reward()(prompt="", completion=faked, tests=TESTS)[0] == 0.0
    loud = "print('x' * 10_000_000)\n" + ADD
    assert code_reward()(prompt="", completion=loud, tests=TESTS) == (1.0, None)


def test_long_feedback_keeps_its_end() -> None:
    _, feedback = code_reward(max_feedback=50)(prompt="", completion="raise ValueError('x' * 500 + 'end')", tests=TESTS)
    assert feedback is not None
    assert len(feedback) == 51
    assert feedback.endswith("end\n")


def test_a_row_without_tests_is_named() -> None:
    with pytest.raises(ArgumentError, match="column 'tests' must be a text or a list of texts, got None"):
        code_reward()(prompt="", completion=ADD)


def test_code_is_taken_from_the_last_fence() -> None:
    assert extract_code("no fence") == "no fence"
    assert extract_code("```python\na\n```\nor\n```\nb\n```") == "b\n"
    assert extract_code("So:\n```python\nx = 1\ny") == "x = 1\ny"  # cut at the length limit


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print(6 * 7)", "42\n"),
        ("", ""),
        ("print('so far')\n1 / 0", "so far\n\nError: ZeroDivisionError: division by zero"),
        ("def add(a, b: return", "Error: SyntaxError: "),
        ("raise SystemExit(3)", "Error: exit code 3"),
        ("print(1, flush=True)\nwhile True: pass", "1\n\nError: timed out after "),
        ("x = bytearray(4 << 30)", "Error: MemoryError"),
    ],
)
def test_a_student_s_program_is_told_what_it_printed_and_its_error(
    code: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "run_limited", partial(run_limited, wall_seconds=0.7))
    assert run_python(code).startswith(told)
    assert told or not run_python(code)


def test_a_student_s_long_output_is_cut_with_a_word() -> None:
    said = run_python("print('a' * 100_000 + 'z')")
    assert len(said) < 4_200
    assert "[… 95906 bytes left out …]" in said
    assert said.endswith("z\n")


def test_running_python_is_a_tool() -> None:
    (schema,) = Agent(tools=[run_python]).schemas
    assert schema["function"]["parameters"]["required"] == ["code"]
