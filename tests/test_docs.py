"""The documentation is run: its Python blocks, the make targets it names, the links inside the repository.

Every ```python block is executed, a file's blocks one after the other in one namespace. What cannot run here (another
machine, an excerpt) is not a ```python block.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from sdcore.bench import readme

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<markdown>[^)\s]+)[^)]*\)|(?:src|href)=\"(?P<html>[^\"]+)\"")


class Block(NamedTuple):
    language: str
    code: str
    line: int  # in its file, of the first line of code


def blocks(file: Path) -> list[Block]:
    text = file.read_text(encoding="utf-8")
    return [
        Block(m["language"], textwrap.dedent(m["code"]), text.count("\n", 0, m.start("code")))
        for m in FENCE.finditer(text)
    ]


def python_blocks(file: Path) -> list[Block]:
    return [block for block in blocks(file) if block.language == "python"]


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_the_readme_has_an_example() -> None:
    assert python_blocks(ROOT / "README.md") != []


def test_the_readme_has_the_block_of_results_that_is_renewed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(mark in text for mark in readme.Block(readme.FIRST).marks)


@pytest.mark.parametrize("file", [f for f in FILES if python_blocks(f)], ids=name)
def test_python_blocks_run_when_pasted(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(file):
        # Blank lines in front, so that a traceback shows the line of the document.
        exec(compile("\n" * block.line + block.code, str(file), "exec"), namespace)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_make_targets_exist(file: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    inline = re.findall(r"`([^`]+)`", FENCE.sub("", file.read_text(encoding="utf-8")))
    lines = "\n".join([block.code for block in blocks(file)] + inline).splitlines()
    commands = [line.partition("#")[0].split() for line in lines if re.match(r"\s*make\s", line)]
    assert {word for _, *words in commands for word in words if "=" not in word} <= targets


@pytest.mark.parametrize("file", FILES, ids=name)
def test_links_inside_the_repository_lead_somewhere(file: Path) -> None:
    links = [m["markdown"] or m["html"] for m in LINK.finditer(FENCE.sub("", file.read_text(encoding="utf-8")))]
    inside = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in inside if not (file.parent / link).exists()] == []


def test_the_tree_names_every_folder_of_the_packages_and_no_other() -> None:
    tree = next(block.code for block in blocks(ROOT / "CONTRIBUTING.md") if block.code.startswith("kernels/sdkernels/"))
    named, above = set(), ""
    for line in tree.splitlines():
        folder = line.split()[0]
        above = above if line.startswith(" ") else folder
        named.add(above + folder if line.startswith(" ") else folder)
    assert [folder for folder in sorted(named) if not (ROOT / folder).is_dir()] == []
    inits = [*(ROOT / "sdcore").glob("*/__init__.py"), *(ROOT / "kernels" / "sdkernels").glob("*/__init__.py")]
    assert {f"{name(file.parent)}/" for file in inits} <= named
