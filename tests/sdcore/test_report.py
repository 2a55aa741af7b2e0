"""The report of a run: what it shows, that it holds whatever a run logged, and that nothing in it can act."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sdcore.charts import areas, count_on_x, figure_of, inline_svg, line, save
from sdcore.diagnostics import RunLog, RunLogError
from sdcore.diagnostics.runlog import RunData, read_run
from sdcore.errors import ArgumentError
from sdcore.report import series, write_report
from sdcore.report.markdown import markdown
from sdcore.report.notes import notes_of
from sdcore.report.samples import Token, samples_of, spaced

VOID = {"meta", "input", "br", "img", "link"}
HOSTILE = "</div></title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{ 7*7 }}&lt;"


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def sample(**values: Any) -> dict[str, Any]:
    return {
        "prompt": "What is 2 + 3?",
        "privileged_context": "It is 5.",
        "completion": "It is six.",
        "tokens": ["It", " is", " six", "."],
        "per_token": [0.0, 0.1, 2.5, 0.0],
        "reward": 0.25,
        "feedback": "six is wrong",
        "active": True,
    } | values


def make_run(directory: Path, *, steps: int = 5, offset: float = 0.0, **described: Any) -> Path:
    log = RunLog(directory)
    log.describe({"method": {"name": "SDPO", "alpha": 0.5}, "model": "tiny/model"} | described)
    for step in range(1, steps + 1):
        numbers = {
            "self_distillation/reward_mean": step / steps + offset,
            "self_distillation/distillation_loss": 1 / step,
            "student/entropy": 2.0 + 0.1 * step,
            "teacher/entropy": 1.0,
            "context/dropped": 0,
            "custom": step % 2,
        }
        log.metrics(step, numbers, samples=8 * step, tokens=100 * step)
        log.samples(step, [sample(completion=f"answer {step}", tokens=[f"answer {step}"], per_token=[0.5])])
    return directory


def page_of(*directories: Path) -> Page:
    return Page(write_report(list(directories)).read_text(encoding="utf-8"))


def test_a_report_has_the_run_its_numbers_curves_completions_and_settings(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for part in ("SDPO · tiny/model", "5 steps · 40 completions · 500 tokens", "mean reward", "from 0.2", "better"):
        assert part in page.text, part
    for part in (
        "Entropy",
        "Custom",
        "answer 5",
        "It is 5.",
        "six is wrong",
        "Not in the table of metrics.",
        "versions",
    ):
        assert part in page.text, part
    assert "context/dropped" in page.text
    assert "1 metric never changed" in page.text
    assert "without room for context 0" in page.text
    # Reward, loss, entropy and custom, over three axes.
    assert page.tags.count("svg") == 4 * 3


def test_a_page_loads_nothing_and_has_no_script(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert not {"script", "img", "link", "iframe", "object", "form", "a"} & set(page.tags)
    assert page.values("src") == page.values("href") == []
    assert all(target.startswith("#") for target in page.values("xlink:href"))
    assert len(page.values("id")) == len(set(page.values("id")))
    (policy,) = [value for tag, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    style = (tmp_path / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_texts_of_a_run_are_text_wherever_they_stand(tmp_path: Path) -> None:
    """A completion with a script in it, and the same as a metric, a model, a setting, a role, a directory."""
    directory = tmp_path / "run<img src=x onerror=alert(3)>"
    log = RunLog(directory)
    log.describe({"method": HOSTILE, "model": HOSTILE, "config": {HOSTILE: HOSTILE, "list": [HOSTILE]}, HOSTILE: 1})
    for step in (1, 2, 3):
        log.metrics(step, {HOSTILE: step, "eval_" + HOSTILE: -step}, samples=step, tokens=step)
        conversation = [{"role": HOSTILE, "content": HOSTILE}]
        values = [0.0, 1.0, float("nan")]
        row = sample(completion=HOSTILE, tokens=[HOSTILE] * 3, per_token=values, feedback=HOSTILE)
        row |= {"prompt": conversation, "privileged_context": HOSTILE}
        log.samples(step, [row, row | {"tokens": [], "per_token": []}])
    (directory / "metrics.jsonl").open("a").write('{"step": 4, "nonfinite": {"<script>x": "nan"}}\n')
    second = make_run(tmp_path / "other")
    for page in (page_of(directory), page_of(directory, second)):
        known = (
            "html head meta title style body div header footer h1 h2 h3 p b span ul li input label figure figcaption"
        )
        known += " i small details summary table tr th td svg g defs path use clippath rect text"
        assert set(page.tags) <= set(known.split())
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert HOSTILE in page.text
        assert "`49" not in page.text, "a template in a completion was evaluated"


def chart_of(title: str, *curves: series.Series, unit: str = "") -> series.Chart:
    return series.Chart(title=title, unit=unit, note="", series=curves)


def curve(values: Sequence[float]) -> series.Series:
    return series.Series(name="a", label="a", x={"step": [float(i) for i in range(len(values))]}, y=list(values))


def drawn(chart: series.Chart, axis: series.Axis = "step") -> str:
    return inline_svg(figure_of([partial(series.draw, chart, axis)], title=chart.title), chart.title)


@pytest.mark.parametrize("steps", [1, 2, 13, 300])
def test_a_chart_is_well_formed_xml_of_finite_numbers(steps: int) -> None:
    metrics = [
        {"step": s, "samples": s, "tokens": s, HOSTILE: (-1) ** s * 1e-7 * s, "b": 5} for s in range(1, steps + 1)
    ]
    curves = series.series_of(RunData(directory=Path(), metrics=metrics, samples=[], description={}))
    chart = chart_of(HOSTILE, *curves.values())
    for axis in series.AXES:
        root = ElementTree.fromstring(drawn(chart, axis))
        assert HOSTILE in "".join(root.itertext())
        paths = " ".join(element.get("d", "") for element in root.iter())
        assert set(re.findall("[A-Za-z]+", paths)) <= set("MLCQz")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_data_give_the_same_file_with_their_labels_as_they_are(suffix: str, tmp_path: Path) -> None:
    def two(axes: Any) -> None:
        line(axes, [0, 6000, 12000], [1.0, 20.0, 300.0], band=([1, 10, 200], [2, 30, 400]), label="ours", marker="o")
        line(axes, [0, 6000], [1.0, 2.0], label="theirs $x$")
        count_on_x(axes)

    def stacked(axes: Any) -> None:
        areas(axes, [0, 1, 2], {"a": [1, 1, 1], "b": [0, 2, 1]}, {"a": "grey", "b": "red"})

    def written() -> bytes:
        figure = figure_of([two, two, stacked], columns=2, title="A title", legend="below")
        return save(figure, tmp_path / f"figure.{suffix}").read_bytes()

    first = written()
    assert first == written()
    if suffix == "svg":
        texts = list(ElementTree.fromstring(first).itertext())
        for text in ("ours", "theirs $x$", "12k", "A title", "a", "b"):
            assert texts.count(text) >= 1, text
        assert texts.count("ours") == 1, "a label stands once in the legend below"


@pytest.mark.parametrize("values", [(0.0,), (5.0, 5.0), (-3.0,), (0.2, 0.9), (1e-9, 2e-9), (-5.0, 1e6), (0.999, 1.0)])
@pytest.mark.parametrize("unit", ["", "share"])
def test_any_values_can_be_drawn(values: tuple[float, ...], unit: str) -> None:
    ElementTree.fromstring(drawn(chart_of("a", curve(values), unit=unit)))


def test_thousands_of_steps_become_few_points_that_keep_a_spike() -> None:
    values = [1.0] * 12_345
    values[7000] = 50.0
    points = series.reduced(curve(values), "step")
    assert len(points) <= series.MOST_POINTS
    assert max(point.most for point in points) == 50.0
    assert sum(point.y for point in points) / len(points) == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert len(drawn(chart_of("", curve(values)))) < 30_000


def test_first_and_last_are_means_over_the_ends() -> None:
    assert series.first_and_last([1.0]) == (1.0, 1.0)
    assert series.first_and_last([1.0, 2.0]) == (1.0, 2.0)
    values = [float(i) for i in range(100)]
    assert series.first_and_last(values) == (2.0, 97.0)


@pytest.mark.parametrize(
    ("name", "first", "last", "verdict"),
    [
        ("self_distillation/reward_mean", 0.2, 0.4, "better"),
        ("self_distillation/reward_mean", 0.4, 0.2, "worse"),
        ("teacher/leak_ratio", 0.4, 0.2, "better"),
        ("student/entropy", 0.4, 0.2, "moved"),
        ("self_distillation/reward_mean", 0.4, 0.40001, "same"),
    ],
)
def test_a_change_is_judged_by_the_tables_direction(name: str, first: float, last: float, verdict: str) -> None:
    assert series.Change(series.key_for(name), first, last, 2).verdict == verdict


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "", "–"),
        (0.123456, "", "0.123"),
        (12345.6, "", "12,346"),
        (3.0, "", "3"),
        (0.5, "share", "50 %"),
        (0.0123, "share", "1.2 %"),
        (0.976, "share", "98 %"),
        (1e-5, "", "1e-05"),
    ],
)
def test_numbers_have_three_digits_and_shares_are_percent(value: float | None, unit: str, text: str) -> None:
    assert series.shown(value, unit) == text


def test_metrics_that_belong_together_share_a_chart_and_constants_have_none(tmp_path: Path) -> None:
    run = [("run", read_run(make_run(tmp_path)))]
    by_topic = series.charts_by_topic(run)
    titles = {chart.title: [one.label for one in chart.series] for found in by_topic.values() for chart in found}
    assert titles == {
        "Reward": ["mean"],
        "Distillation loss": ["loss"],
        "Entropy": ["student", "teacher"],
        "Custom": ["custom"],
    }
    assert [change.key.name for change in series.constants_of(run)] == ["context/dropped"]


def test_a_line_along_the_bottom_is_left_out_of_a_chart_that_has_others(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.metrics(step, {"student/entropy": step, "teacher/entropy": 0.0}, samples=step, tokens=step)
    ((chart,),) = series.charts_by_topic([("run", read_run(tmp_path))]).values()
    assert [one.label for one in chart.series] == ["student"]
    assert [change.key.name for change in series.constants_of([("run", read_run(tmp_path))])] == ["teacher/entropy"]


def test_a_metric_that_is_missing_on_some_lines_keeps_its_own_steps(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 7):
        values = {"loss": float(step)} | ({"teacher/leak_kl": 0.5 * step} if step % 3 == 0 else {})
        log.metrics(step, values | {"grad_norm": float("nan") if step == 2 else 1.0}, samples=step, tokens=10 * step)
    found = series.series_of(read_run(tmp_path))
    assert found["teacher/leak_kl"].x["step"] == [3, 6]
    assert found["teacher/leak_kl"].x["tokens"] == [30, 60]
    assert len(found["grad_norm"].y) == 5
    assert "grad_norm was not finite on one line, first at step 2." in page_of(tmp_path).text


# What a run may lack.


def test_a_run_of_one_step_is_reported(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, steps=1))
    assert "1 step · 8 completions" in page.text
    assert "measured once" in page.text
    assert page.tags.count("svg") == 3 * 3
    ((chart, *_), *_) = series.charts_by_topic([("run", read_run(tmp_path))]).values()
    (axes,) = figure_of([partial(series.draw, chart, "step")]).axes
    assert [line.get_marker() for line in axes.lines] == ["o"]


def test_a_run_killed_before_its_first_line_is_reported(tmp_path: Path) -> None:
    RunLog(tmp_path).describe({"model": "m"})
    assert "No metrics were logged." in page_of(tmp_path).text


def test_samples_without_metrics_and_the_other_way_round_are_reported(tmp_path: Path) -> None:
    RunLog(tmp_path / "a").samples(3, [{"completion": "alone"}, {}])
    page = page_of(tmp_path / "a")
    assert "alone" in page.text
    assert "(empty)" in page.text
    RunLog(tmp_path / "b").metrics(1, {"loss": 1.0}, samples=1, tokens=1)
    assert "Completions" not in page_of(tmp_path / "b").text


def test_fields_of_the_wrong_type_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": "high", "samples": null, "tokens": 3}\n{"step": 2, "loss": [1], "grad_norm": 1e400}\n'
        '{"step": 3, "loss": 0.5, "time": 1, "nonfinite": 3}\n{"step": 4, "loss": 0.25}\n'
    )
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 1, "completion": 5, "tokens": "abc", "per_token": {}, "reward": "x", "active": 1, "prompt": [1]}\n'
        '{"step": 1, "completion": "ab", "tokens": ["a", null], "per_token": [1, "x"]}\n'
        '{"step": 1, "completion": "ab", "tokens": ["a"], "per_token": [1, 2]}\n'
    )
    (tmp_path / "run.json").write_text('{"method": 3, "model": null, "started": 5, "versions": []}')
    page = page_of(tmp_path)
    assert page.tags.count("svg") == 1  # the loss, over steps alone


def test_torn_lines_are_counted_in_the_report(tmp_path: Path) -> None:
    make_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert "could not be read and are left out: 1." in page_of(tmp_path).text


def test_any_unicode_is_written_as_it_is_and_half_a_character_as_a_mark(tmp_path: Path) -> None:
    text = "Zürich 漢字 🙂 \u202e\x00 end"
    RunLog(tmp_path).samples(1, [sample(completion=text, tokens=[text], per_token=[1.0], feedback="\ud83d half")])
    page = page_of(tmp_path)
    assert "Zürich 漢字 🙂" in page.text
    assert "? half" in page.text


# Completions.


def shown_tokens(directory: Path) -> list[Token]:
    return [token for one in samples_of([("", read_run(directory))]).samples for token in one.tokens]


def test_a_token_is_the_darker_the_more_the_teacher_disagrees(tmp_path: Path) -> None:
    values = [0.0, 0.05, 0.2, 1.0, 5.0, float("nan")]
    RunLog(tmp_path).samples(1, [sample(completion="abcdef", tokens=list("abcdef"), per_token=values)])
    shades = [token.shade for token in shown_tokens(tmp_path)]
    assert shades[0] == 0
    assert shades[:5] == sorted(set(shades[:5]))
    assert shades[4] == 10
    assert shades[5] == -1
    page = page_of(tmp_path)
    marked = [value for tag, name, value in page.attributes if tag == "b" and name == "title"]
    assert marked == ["0.05 nats", "0.2 nats", "1 nats", "5 nats", "not finite"]


def test_every_token_of_a_completion_is_in_its_text_in_order(tmp_path: Path) -> None:
    tokens = ["def", " f", "(", ")", ":", "\n    ", "return", " 1", "<eos>"]
    row = sample(completion="".join(tokens[:-1]), tokens=tokens, per_token=[0.1] * 9)
    RunLog(tmp_path).samples(1, [row])
    assert "def f():\n    return 1<eos>" in page_of(tmp_path).text


@pytest.mark.parametrize(
    ("tokens", "completion", "texts"),
    [
        (["a3", "c7", "<eos>"], "a3 c7", ["a3", " c7", "<eos>"]),
        (["The", " cat", "\n\n", "sat"], "The cat\n\nsat", ["The", " cat", "\n\n", "sat"]),
        (["x", "\n", "y"], "x \n y", ["x", " \n ", "y"]),
        (["quite", "other"], "text", ["quite", " other"]),
        ([], "", []),
        (["<eos>"], "", ["<eos>"]),
    ],
)
def test_tokens_get_the_white_space_that_the_completion_has(
    tokens: list[str], completion: str, texts: list[str]
) -> None:
    assert spaced(tokens, completion) == texts


def test_of_many_samples_the_first_the_last_and_some_between_are_shown(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 101):
        log.samples(step, [sample(completion=f"s{step}c{i}", tokens=[]) | {"per_token": []} for i in range(9)])
    found = samples_of([("", read_run(tmp_path))])
    steps = [one.step for one in found.samples]
    assert (steps[0], steps[-1], len(set(steps)), len(steps)) == (1, 100, 6, 24)
    assert found.total == 900


def of_turns(*turns: dict[str, Any], tokens: str = "abcdefg", values: Sequence[float] = ()) -> dict[str, Any]:
    given = list(values) or [0.0] * len(tokens)
    return sample(completion="assistant: ab", tokens=list(tokens), per_token=given, turns=list(turns))


TURNS = (
    {"start": 0, "own": True, "text": "a b"},
    {"start": 2, "own": False, "text": "cd"},
    {"start": 4, "own": True, "text": "efg"},
    {"start": 7, "own": False, "text": "The end."},
)


def test_a_trajectory_is_shown_turn_by_turn_with_its_divergences(tmp_path: Path) -> None:
    RunLog(tmp_path).samples(1, [of_turns(*TURNS, values=[1.0, 3.0, 0, 0, 0, 0.25, 0.5])])
    (shown,) = samples_of([("", read_run(tmp_path))]).samples
    assert [(part.whose, "".join(token.text for token in part.tokens), part.mean) for part in shown.parts] == [
        ("turn 1", "a b", 2.0),
        ("reply", "cd", None),
        ("turn 2", "efg", 0.375),
        ("reply", "", None),
    ]
    assert [token.divergence for token in shown.tokens] == [1.0, 3.0, 0, 0, 0, 0.25, 0.5]
    text = page_of(tmp_path).text
    places = [
        text.index(words)
        for words in ("turn 1, mean divergence 2 nats", "reply", "cd", "turn 2, mean divergence 0.375 nats", "The end.")
    ]
    assert places == sorted(places)
    assert "Mean divergence in nats: turn 1 2, turn 2 0.375." in markdown([("", read_run(tmp_path))], tmp_path / "r.md")


def test_a_long_trajectory_is_cut_and_turns_of_the_wrong_type_are_an_answer(tmp_path: Path) -> None:
    long = of_turns(*TURNS[:2], {"start": 1400, "own": True, "text": "late"}, tokens="x" * 2000)
    wrong = [of_turns() | {"turns": turns} for turns in ("two", [1], [{"start": "0"}], [{}], None)]
    RunLog(tmp_path).samples(1, [long, *wrong[:2]])
    RunLog(tmp_path, resume_step=1).samples(2, wrong[2:])
    first, *others = samples_of([("", read_run(tmp_path))]).samples
    assert [len(part.tokens) for part in first.parts] == [2, 1398, 100]
    assert first.omitted == 500
    assert all([(part.whose, part.text) for part in other.parts] == [("", "assistant: ab")] for other in others)


def test_a_completion_of_very_many_tokens_is_cut_and_says_so(tmp_path: Path) -> None:
    tokens = [" x"] * 4000
    RunLog(tmp_path).samples(1, [sample(completion="".join(tokens), tokens=tokens, per_token=[0.5] * 4000)])
    page = page_of(tmp_path)
    assert "2500 more tokens" in page.text
    assert len(shown_tokens(tmp_path)) == 1500


# What stands out.

NOTES: list[tuple[dict[str, float], dict[str, float], str]] = [
    ({}, {"self_distillation/reprompt_sample_fraction": 0.0}, "0 % of the completions were active"),
    ({}, {"self_distillation/flat_group_fraction": 1.0}, "all rewards were alike in 100 % of the groups"),
    ({}, {"completions/clipped_ratio": 0.5}, "50 % of the completions were cut"),
    ({"student/entropy": 2.0}, {"student/entropy": 0.1, "teacher/entropy": 0.3}, "entropy fell from 2 to 0.1 nats"),
    (
        {},
        {"loss/position_0": 3.0, "self_distillation/distillation_loss": 0.1},
        "first token's divergence is 30 times the mean",
    ),
    (
        {},
        {"teacher/context_kl": 1.0, "teacher/leak_kl": 0.9, "teacher/leak_ratio": 0.9, "teacher/content_kl": 0.1},
        "what is taught is style",
    ),
    (
        {},
        {"teacher/context_kl": 1.0, "teacher/leak_kl": 0.9, "teacher/leak_ratio": 0.9, "teacher/content_kl": 0.9},
        "believes whatever it reads",
    ),
    ({"context/overflow": 2}, {"context/overflow": 1}, "too long: 3."),
    ({"rewards/dropped": 0}, {"rewards/dropped": 4}, "lost to errors: 4."),
]


@pytest.mark.parametrize(("first", "last", "sentence"), NOTES, ids=[note[2][:30] for note in NOTES])
def test_what_stands_out_is_said(
    tmp_path: Path, first: dict[str, float], last: dict[str, float], sentence: str
) -> None:
    log = RunLog(tmp_path)
    log.metrics(1, dict.fromkeys(last, 0.5) | first, samples=1, tokens=1)
    log.metrics(2, last, samples=2, tokens=2)
    (note,) = notes_of(read_run(tmp_path))
    assert sentence in note


def test_an_entropy_that_falls_to_the_teachers_is_no_collapse(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step, entropy in ((1, 2.0), (2, 0.1)):
        log.metrics(step, {"student/entropy": entropy, "teacher/entropy": 0.05}, samples=step, tokens=step)
    assert notes_of(read_run(tmp_path)) == []


def test_of_a_healthy_run_nothing_stands_out(tmp_path: Path) -> None:
    assert notes_of(read_run(make_run(tmp_path))) == []


# Several runs, files, formats.


def test_several_runs_have_a_line_each_in_every_chart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "seed0" / "out"), make_run(tmp_path / "seed1" / "out", steps=3, offset=0.25)]
    path = write_report(runs, tmp_path / "compared.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "2 runs compared" in page.text
    assert page.text.count("seed0/out") >= 5
    found = series.charts_by_topic([(run.parent.name, read_run(run)) for run in runs])
    assert {len(chart.series) for of_topic in found.values() for chart in of_topic} == {2}
    reward = found["Reward and feedback"][0]
    assert [one.label for one in reward.series] == ["seed0", "seed1"]
    assert [one.y[-1] for one in reward.series] == [1.0, 1.25]


def test_the_output_is_a_file_or_a_directory_and_is_made(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report(str(run), str(tmp_path / "new" / "r.html")) == tmp_path / "new" / "r.html"
    assert write_report(run, tmp_path / "new") == tmp_path / "new" / "report.html"
    write_report(run, tmp_path / "new")


def test_wrong_arguments_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="must be the output directory of a run"):
        write_report(tmp_path)
    with pytest.raises(ArgumentError, match=r"format must be one of 'html', 'markdown', got 'pdf'"):
        write_report(tmp_path, format="pdf")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="run_directory must be a directory or a list"):
        write_report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLogError, match=r"could not write the report"):
        write_report(make_run(tmp_path / "run"), tmp_path / "file" / "report.html")


@pytest.mark.parametrize("format", ["html", "markdown"])
def test_without_matplotlib_it_says_what_to_install_before_any_work(
    format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "matplotlib" else find(name))
    with pytest.raises(ImportError, match=r'pip install "sdcore\[plot\]"'):
        write_report(tmp_path / "nothing", format=format)


def test_the_page_does_not_wait_for_torch(tmp_path: Path, run_python: Callable[..., str]) -> None:
    make_run(tmp_path / "run")
    code = """
import sys
from sdcore.report import write_report
write_report(sys.argv[1])
print(sorted({"torch", "transformers", "matplotlib.pyplot"} & set(sys.modules)))
"""
    assert run_python(code, str(tmp_path / "run")).strip() == "[]"


def test_markdown_has_pictures_tables_and_fenced_completions(tmp_path: Path) -> None:
    log = RunLog(make_run(tmp_path / "run", model="a|b\n# <b>$x$", steps=50), resume_step=50)
    text = "```\n# not a heading\n````\n<script>alert(1)</script>"
    log.samples(51, [sample(completion=text, tokens=["|", "<b>"], per_token=[1.0, 2.0], feedback="a\n\n# b")])
    log.metrics(51, {"$a|b$": 1.0, "loss": 2.0}, samples=1, tokens=1)
    path = write_report(tmp_path / "run", format="markdown")
    assert path.name == "report.md"
    written = path.read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", written)
    assert len(pictures) == 4
    assert all((path.parent / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert f"`````text\n{text}\n`````" in written
    outside = re.sub(r"(`{3,})text\n.*?\n\1\n", "", written, flags=re.DOTALL)
    assert "<" not in outside
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert headings[0] == r"# SDPO · a\|b \# &lt;b&gt;\$x\$"
    assert all(line.split()[1][0].isupper() or line.startswith("### step") for line in headings)
    tables = [line for line in outside.splitlines() if line.startswith("|")]
    assert all(re.sub(r"\\.", "", line).count("|") in (3, 5, 6) for line in tables)
    assert "Highest divergence in nats: “&lt;b&gt;” 2, “\\|” 1." in written


def test_markdown_of_several_runs_and_of_none_to_draw(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=1)]
    written = write_report(runs, tmp_path, format="markdown").read_text()
    assert "| at the end | a | b |" in written
    RunLog(tmp_path / "c").describe({"model": "m"})
    assert "No metrics were logged." in write_report(tmp_path / "c", format="markdown").read_text()
