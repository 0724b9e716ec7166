"""The papers' figures, computed: resumed, drawn, and what a shell and a notebook see."""

import dataclasses
import html
import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from paper_parts import TINY, figures

import perpkit as pk
from perpkit.experiments.paper import scales
from perpkit.experiments.paper.cost import job_seconds, least_memory
from perpkit.experiments.paper.jobs import Job
from perpkit.experiments.paper.recipes import RECIPES, recipe, recipes
from perpkit.experiments.paper.reproduce import reproduce
from perpkit.experiments.paper.scales import SCALES
from perpkit.experiments.run import NotLoaded
from perpkit.interactive.paper import PaperFigure, draw
from perpkit.interactive.plots.beside import plot_beside

pytestmark = pytest.mark.usefixtures("tiny_scale")
QUICK = ("table-1", "throughput", "trainable-share")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "results.sqlite"


# --- computing ----------------------------------------------------------------------------------------


def test_what_the_store_has_is_not_computed_again(store):
    first = reproduce(recipes(QUICK), TINY, store=store, progress=False)
    rows = pk.Store(store).table()
    assert len(rows) == 2 * (1 + 5 * 2), "one row without retraining, two seeds of the others"
    again = reproduce(recipes(QUICK), TINY, store=store, progress=False)
    assert len(pk.Store(store).table()) == len(rows)
    for one, two in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one.table, two.table)
        assert one.seconds == two.seconds


def test_runs_without_retraining_count_once_and_others_by_their_seeds(store):
    (found,) = reproduce([recipe("table-1")], TINY, store=store, progress=False)
    seeds = found.table.dropna(subset=["ours"]).set_index(["retrain", "sparsity"])["seeds"]
    assert seeds["none", 0.7] == 1
    assert seeds["full", 0.7] == 2
    assert found.table["ours"].notna().sum() == 1 + 2 * 6
    assert not found.same


def test_failed_rows_are_told_and_the_others_stand(store):
    scale = dataclasses.replace(TINY, models=("tiny-opt",), text="storyworld", asked_sparsities=(0.5,))
    broken = dataclasses.replace(
        recipe("table-1"),
        experiments=lambda scale, model: [
            *recipe("table-1").experiments(scale, model),
            pk.Experiment(retrain="perp_v1:bn_recalibrate", lr=0.1),
        ],
    )
    (found,) = reproduce([broken], scale, store=store, progress=False)
    assert len(found.errors) == 1
    assert "has no batch normalisation" in found.errors[0]
    assert found.table["ours"].notna().sum() == 13


def test_a_figure_that_fails_altogether_has_no_rows(store):
    broken = dataclasses.replace(
        recipe("table-1"),
        experiments=lambda *_: [pk.Experiment(retrain="perp_v1:bn_recalibrate", lr=0.1)],
    )
    (found,) = reproduce([broken], TINY, store=store, progress=False)
    assert found.rows.empty
    assert found.errors
    assert draw(found) is None


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_written_with_a_report(store):
    done = figures(store, "--only", ",".join(QUICK))
    assert done.exit_code == 0, done.output
    out = store.parent / "out"
    for name in QUICK:
        assert {file.suffix for file in out.glob(f"{name}.*")} == {".pdf", ".svg", ".png", ".csv"}
    behind = pd.read_csv(out / "table-1.csv")
    assert set(behind["published"]) == {True, False}
    page = (out / "report.html").read_text()
    assert "a comparison of shapes, not of values" in page
    assert page.count("data:image/png;base64,") == 3
    # Nothing is fetched: the page is whole by itself.
    assert not re.search(r'(src|href)="(https?:)?//', page)
    words = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for said in (
        "12.47",
        "storyworld (seed 0), test split",
        "Device: ",
        "Time: ",
        "one rate for all",
        "34.39",
    ):
        assert said in words, said
    assert "table-1" in done.stdout
    assert "beside published ones" in done.stdout


def test_the_report_has_ours_the_published_and_the_difference_in_every_row(store):
    figures(store, "--only", "trainable-share")
    page = (store.parent / "out" / "report.html").read_text()
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["norms", "0.212 %", "0.21 %", "+0.00 points"] in rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--only", "tabel-1"],
            "unknown figure 'tabel-1'; did you mean 'table-1'? Valid are table-1, table-2",
        ),
        (["--scale", "embeded"], "unknown scale 'embeded'; did you mean 'embedded'?"),
        (["--only", "table-1,"], "a value between its commas is empty"),
        (["--classifier", "some.pt"], "give both classifier and images"),
    ],
)
def test_an_error_is_a_sentence_on_stderr(store, arguments, words):
    done = figures(store, *arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("perpkit figures: ")
    assert words in done.stderr
    assert done.stdout == ""


def test_what_a_scale_cannot_compute_is_said_and_not_pretended(store, monkeypatch):
    monkeypatch.setitem(scales.SCALES, "quick", dataclasses.replace(TINY, vision=None))
    done = figures(store, "--only", "sms,trainable-share")
    assert done.exit_code == 0
    assert "not computed: name an image classifier and its pictures" in done.stdout
    page = (store.parent / "out" / "report.html").read_text()
    assert "Left out" in page
    assert "Sparse model soups" in page


def test_failed_rows_have_an_exit_code_of_their_own(store, monkeypatch):
    broken = dataclasses.replace(recipe("trainable-share"), jobs=lambda *_: [Job(_fails, {})])
    monkeypatch.setitem(RECIPES, "trainable-share", broken)
    done = figures(store, "--only", "throughput,trainable-share")
    assert done.exit_code == 3
    assert "ValueError: it is broken" in done.stderr
    assert "Not everything could be computed" in (store.parent / "out" / "report.html").read_text()
    assert figures(store, "--only", "trainable-share").exit_code == 1


def _fails() -> list[dict]:
    raise ValueError("it is broken")


DRIVER = """
import sys
from perpkit import cli
from perpkit.experiments.paper import scales
import dataclasses
if __name__ == "__main__":
    scales.SCALES["quick"] = dataclasses.replace(scales.SCALES["quick"], steps=int(sys.argv.pop()))
    cli.main(["figures", "--scale", "quick", *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_keeps_the_finished_rows(tmp_path, store):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), "--only", "throughput,trainable-share", "--store", str(store)]
    command += ["--out", str(tmp_path / "out"), "--workers", "1", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (store.exists() and store.stat().st_size and len(pk.Store(store).table())):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.rstrip().endswith("Stopped. The finished rows are kept: the same command goes on from there.")
    assert "Traceback" not in said
    kept = len(pk.Store(store).table())
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{kept}/3" in done.stderr


# --- what a notebook sees -----------------------------------------------------------------------------


def test_a_notebook_has_figure_table_and_words():
    found = pk.paper_figure("throughput", scale=TINY, progress=False)
    assert isinstance(found, PaperFigure)
    assert found.figure is not None
    assert found.table["published"].tolist() == [3500, 6400, 7600]
    assert found.table["published_relative"].round(2).tolist() == [1.0, 1.83, 2.17]
    assert found.caption.startswith("Training speed. ")
    assert found.differs
    assert found._repr_png_() is not None


def test_all_figures_are_listed():
    assert pk.paper_figures().index.tolist() == list(RECIPES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "figure-9"}, "unknown figure 'figure-9'"),
        ({"name": "table-1", "model": "tiny-op"}, "table-1 has tiny-opt at this scale"),
        (
            {"name": "sms", "scale": "opt-125m"},
            "is of an image classifier, and the scale 'opt-125m' has none",
        ),
    ],
)
def test_bad_questions_are_answered_in_words(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        pk.paper_figure(**{"scale": TINY, "progress": False, **settings})


@pytest.mark.slow
def test_every_figure_is_drawn_from_its_tiny_rows(store, generators_unchanged):
    computed = reproduce(recipes(), TINY, store=store, progress=False)
    assert [each.recipe.name for each in computed] == list(RECIPES)
    for each in computed:
        assert each.errors == (), each.name
        assert PaperFigure(each).figure is not None, each.name
        both = each.table["difference"].notna().any()
        assert both or each.recipe.unpublished, each.name


def test_points_beside_each_other_are_told_apart_in_the_table():
    ours = pd.DataFrame(
        {"a": ["x", "x", "y"], "b": ["p", "p", "q"], "v": [1.0, 3.0, 30.0], "seed": [0, 1, 0]}
    )
    theirs = pd.DataFrame({"a": ["x"], "b": ["p"], "v": [2.0]})
    figure = plot_beside(ours, x="a", y="v", hue="b", published=theirs)
    assert figure.table["published"].tolist() == [False, False, False, True]
    assert figure.axes[0].get_yscale() == "log"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["p", "q", "here", "published"]


# --- what it will cost ----------------------------------------------------------------------------------


def slept(steps: int) -> list[dict]:
    time.sleep(0.01 * steps)
    return []


def test_jobs_are_tried_in_short(store):
    left = [Job(slept, {"steps": 100}, steps=100), Job(slept, {"steps": 200}, steps=200)]
    assert job_seconds(left, pk.Store(store)) == pytest.approx(3, rel=0.3)
    assert job_seconds([], pk.Store(store)) == 0


def lost(steps: int) -> list[dict]:
    raise NotLoaded("no pictures in 'nowhere'")


@pytest.mark.parametrize("settings", [{"steps": 100}, {"steps": 0}])
def test_a_job_that_cannot_be_tried_says_why_and_is_not_counted_as_no_time(store, settings):
    with pytest.raises(ValueError, match="no pictures in 'nowhere'"):
        job_seconds([Job(lost, settings, steps=100)], pk.Store(store))


def test_memory_is_that_of_weights_and_optimiser():
    few, full = least_memory(dataclasses.replace(SCALES["embedded"], dtype="float32"), ["tiny-opt"])[
        "tiny-opt"
    ]
    count = sum(parameter.numel() for parameter in pk.load_model("tiny-opt", device="cpu")[0].parameters())
    assert few == pytest.approx(4 * count, rel=0.3), "a tied head may be stored twice"
    # A gradient, Adam's two moments and the last good values, in float32.
    assert full == few + 16 * (few // 4)
    assert least_memory(SCALES["embedded"], ["somebody/model"]) == {}


def test_json_can_hold_every_jobs_settings():
    for each in RECIPES.values():
        for job in each.all_jobs(SCALES["embedded"]):
            assert json.loads(json.dumps(job.settings)) == job.settings
    assert torch.get_num_threads() == 1
