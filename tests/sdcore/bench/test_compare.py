"""Two results side by side: what is slower is flagged, what is in one file only is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdcore.bench.compare import compare
from sdcore.cli.main import app
from sdcore.errors import ArgumentError

MACHINE = {"name": "some CPU", "date": "2026-01-02", "versions": {"torch": "2.13"}}


def _speed(contender: str, *seconds: float) -> dict[str, Any]:
    divergence = {"name": "JSD", "alpha": 0.5, "topk": None}
    return {
        "shape": [8, 100, 16],
        "dtype": "fp32",
        "divergence": divergence,
        "contender": contender,
        "seconds": list(seconds),
    }


def _pass(contender: str, *seconds: float) -> dict[str, Any]:
    return {"group": {"model": "quick", "prompt": 9}, "contender": contender, "seconds": list(seconds)}


def _file(path: Path, kind: str, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"machine": MACHINE, kind: rows}))
    return path


@pytest.mark.parametrize(("kind", "row"), [("speed", _speed), ("rows", _pass)])
def test_a_ratio_is_that_of_the_medians(kind: str, row: Any, tmp_path: Path) -> None:
    before = _file(tmp_path / "a.json", kind, row("ours", 1.0, 2.0, 9.0), row("peer", 1.0))
    after = _file(tmp_path / "b.json", kind, row("ours", 3.0, 3.0, 99.0), row("peer", 0.5))
    found = compare(before, after)
    assert [pair.ratio for pair in found.rows] == [1.5, 0.5]
    assert [pair.key.contender for pair in found.slower()] == ["ours"]
    assert found.slower(1.5) == []


def test_rows_of_one_file_only_are_listed_and_rows_that_were_not_timed_are_not_there(tmp_path: Path) -> None:
    before = _file(tmp_path / "a.json", "speed", _speed("ours", 1.0), _speed("gone", 1.0), _speed("never"))
    after = _file(tmp_path / "b.json", "speed", _speed("new", 1.0), _speed("ours", 1.0), _speed("never"))
    found = compare(before, after)
    assert [pair.key.contender for pair in found.rows] == ["ours"]
    assert [key.contender for key in found.only_before] == ["gone"]
    assert [key.contender for key in found.only_after] == ["new"]


def test_the_command_flags_a_regression_and_exits_with_1(tmp_path: Path) -> None:
    before = _file(tmp_path / "a.json", "speed", _speed("ours", 1.0), _speed("peer", 1.0), _speed("gone", 1.0))
    after = _file(tmp_path / "b.json", "speed", _speed("ours", 1.2), _speed("peer", 1.0))
    shown = CliRunner().invoke(app, ["bench", "compare", str(before), str(after)])
    assert shown.exit_code == 1
    assert "1.20" in shown.stdout
    assert "only in the first" in shown.stdout
    assert "1 of 2 rows are slower than 1.1 times" in shown.stdout
    lenient = CliRunner().invoke(app, ["bench", "compare", str(before), str(after), "--threshold", "1.3"])
    assert lenient.exit_code == 0
    assert CliRunner().invoke(app, ["bench", "compare", str(after), str(before)]).exit_code == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not a result"),
        ("{", "not JSON"),
        ('{"machine": {}}', "not a result"),
        (json.dumps({"machine": MACHINE, "rows": []}), "same suite"),
        (json.dumps({"machine": MACHINE, "speed": [_speed("other", 1.0)]}), "no row in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(content: str, said: str, tmp_path: Path) -> None:
    good, bad = _file(tmp_path / "good.json", "speed", _speed("ours", 1.0)), tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(ArgumentError, match=said):
        compare(good, bad)


def test_a_missing_file_and_a_threshold_below_1_are_errors_of_use(tmp_path: Path) -> None:
    good = str(_file(tmp_path / "good.json", "speed", _speed("ours", 1.0)))
    for arguments in ([good, str(tmp_path / "none.json")], [good, good, "--threshold", "0.5"]):
        shown = CliRunner().invoke(app, ["bench", "compare", *arguments])
        assert shown.exit_code == 2, shown.output
