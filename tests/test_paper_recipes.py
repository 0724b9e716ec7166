"""The recipes of the papers' figures: what they compute, and what stands beside."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import perpkit as pk
from perpkit.experiments.paper.abilities import PATTERNS
from perpkit.experiments.paper.classifiers import DEVIATION, ORDERS
from perpkit.experiments.paper.jobs import Job, attempt, job_store, run_jobs
from perpkit.experiments.paper.language import PERP, PROGRESS
from perpkit.experiments.paper.recipe import Recipe, compared, related, same_model
from perpkit.experiments.paper.recipes import RECIPES, recipe, recipes, work
from perpkit.experiments.paper.scales import SCALES, Scale, Vision, scale_of
from perpkit.experiments.paper.tables import table
from perpkit.experiments.paper.vision import plans, shares
from perpkit.experiments.run import NotLoaded

PAPER = SCALES["paper"]


def number(found: pd.DataFrame, value: str, **place) -> float:
    for key, wanted in place.items():
        found = found[found[key] == wanted]
    assert len(found) == 1
    return float(found[value].iloc[0])


# --- recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_published_has_the_columns_that_are_compared(name):
    found = recipe(name)
    for model in found.models or [theirs for _, theirs in found.pairs(SCALES["embedded"])]:
        published = found.published(model)
        if published.empty:
            assert found.unpublished, "nothing beside, and nobody says why"
            continue
        assert {*found.keys, found.value} <= set(published.columns)
        assert not published.duplicated(list(found.keys)).any()
        assert np.isfinite(published[found.value].astype(float)).all()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_has_work(name):
    found = recipe(name)
    grid, jobs = work([found], SCALES["embedded"])
    assert found.title
    assert found.source
    assert found.caption.endswith(".")
    assert len(grid) + len(jobs) > 0
    assert all(job.key() for job in jobs)
    assert set(found.base) <= set(found.keys)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("table-1", {"retrain": "biases+norms", "sparsity": 0.7}, 34.39),
        ("table-1", {"retrain": PERP, "sparsity": 0.5}, 16.38),
        ("table-1", {"retrain": "none", "sparsity": 0.0}, 12.47),
        ("perplexity-subsets", {"retrain": "full", "sparsity": 0.6}, 19.54),
        ("table-2", {"method": "wanda", "pattern": "2:4"}, 16.78),
        ("table-2", {"method": "magnitude+perp", "pattern": "50 %"}, 16.17),
        ("figure-3", {"pruned": "50 %", PROGRESS: 100.0}, 13.64),
        ("zero-shot", {"retrain": "mask_lora", "sparsity": 0.7}, 0.4156),
        ("reconstruction", {"reconstructed": "yes", "criterion": "magnitude"}, 0.4514),
        ("throughput", {"retrain": PERP}, 6400),
        ("table-3", {"order": "freeze from the output", "cycles": 4}, -6.67),
        ("table-3-shares", {"order": "unfreeze from the output"}, 0.8883),
        ("trainable-share", {"method": "norms"}, 0.0021),
        ("sms", {"method": "SMS of 10", "phase": 2}, 0.7649),
        ("sms", {"method": "IMP", "phase": 3}, 0.7359),
    ],
)
def test_published_numbers_stand_where_the_papers_have_them(name, place, value):
    found = recipe(name)
    published = found.published(found.reference or found.fixed[0][1])
    assert number(published, found.value, **place) == pytest.approx(value)


@pytest.mark.parametrize(
    "name", ["table-1", "table-2", "zero-shot", "figure-3", "reconstruction", "throughput"]
)
def test_the_papers_scale_computes_what_the_papers_have(name):
    found = recipe(name)
    pairs = found.pairs(PAPER)
    assert [theirs for _, theirs in pairs] == list(found.models)
    assert all(same_model(*pair) for pair in pairs)
    assert {each.model for each in found.all_experiments(PAPER)} == {ours for ours, _ in pairs}


def test_full_retraining_of_the_largest_models_is_not_asked_for():
    names = {each.retrain for each in recipe("table-1").experiments(PAPER, "facebook/opt-30b")}
    assert "full" not in names
    assert PERP in names


def test_rows_of_several_figures_are_computed_once():
    embedded = SCALES["embedded"]
    both, _ = work([recipe("table-1"), recipe("throughput"), recipe("figure-3")], embedded)
    apart = sum(len(work([recipe(name)], embedded)[0]) for name in ("table-1", "throughput", "figure-3"))
    assert len(both) < apart
    assert len(work([recipe("table-1"), recipe("table-1")], embedded)[0]) == 48


def test_an_unknown_figure_names_the_nearest_and_all():
    with pytest.raises(
        ValueError, match=r"unknown figure 'tabel-1'; did you mean 'table-1'\? Valid are table-1"
    ):
        recipes(["tabel-1"])


# --- scales -----------------------------------------------------------------------------------------


def test_a_folder_is_a_scale(tmp_path):
    text = tmp_path / "some.txt"
    text.touch()
    found = scale_of(str(tmp_path), text=str(text))
    assert (found.models, found.text, found.vision) == ((str(tmp_path),), str(text), None)
    assert recipe("sms").pairs(found) == []
    with pytest.raises(ValueError, match="unknown text 'storyword'; did you mean 'storyworld'"):
        scale_of("embedded", text="storyword")


def test_other_pictures_need_a_classifier_and_the_other_way_round():
    found = scale_of("opt-125m", classifier="some.pt", images="cifar10")
    assert found.vision == dataclasses.replace(found.vision, classifier="some.pt", images="cifar10")
    with pytest.raises(ValueError, match="give both classifier and images"):
        scale_of("embedded", images="cifar10")


def test_an_unknown_scale_names_the_nearest():
    with pytest.raises(ValueError, match="unknown scale 'embeded'; did you mean 'embedded'"):
        scale_of("embeded")


def test_a_model_of_the_papers_stands_beside_itself():
    scale = Scale("mine", models=("facebook/opt-13b", "tiny-opt"))
    assert recipe("table-1").pairs(scale) == [("facebook/opt-13b", "opt-13b"), ("tiny-opt", "opt-2.7b")]


# --- comparing, worked by hand ------------------------------------------------------------------------


def made(**more) -> Recipe:
    settings = {"keys": ("retrain", "sparsity"), "value": "perplexity", "tidy": lambda rows: rows, **more}
    return Recipe("made", "Made", "nowhere", "Nothing.", **settings)


OURS = pd.DataFrame(
    {
        "retrain": ["none", "none", "full", "full"],
        "sparsity": [0.0, 0.5, 0.5, 0.5],
        "perplexity": [2.0, 6.0, 3.0, 5.0],
        "seed": [0, 0, 0, 1],
    }
)
THEIRS = pd.DataFrame(
    {"retrain": ["none", "none", "full"], "sparsity": [0.0, 0.5, 0.7], "perplexity": [10.0, 100.0, 20.0]}
)


def test_points_are_means_beside_published_ones():
    found = compared(made(base={"retrain": "none", "sparsity": 0.0}), OURS, THEIRS)
    rows = found.set_index(["retrain", "sparsity"])
    assert rows.index.tolist() == [("none", 0.0), ("none", 0.5), ("full", 0.5), ("full", 0.7)]
    assert rows["ours"].tolist()[:3] == [2.0, 6.0, 4.0]
    assert rows["std"][("full", 0.5)] == pytest.approx(2**0.5)
    assert rows["seeds"].tolist() == [1, 1, 2, 0]
    assert rows["difference"][("none", 0.5)] == -94.0
    assert rows["ours_relative"].tolist()[:3] == [1.0, 3.0, 2.0]
    assert rows["published_relative"].dropna().tolist() == [1.0, 10.0, 2.0]
    assert np.isnan(rows["published"][("full", 0.5)])
    assert np.isnan(rows["ours"][("full", 0.7)])


def test_a_base_that_names_one_key_is_that_of_the_same_other_keys():
    phases = pd.DataFrame(
        {"method": ["sms", "imp", "sms", "imp"], "phase": [1, 1, 2, 2], "accuracy": [0.9, 0.8, 0.7, 0.4]}
    )
    found = made(keys=("method", "phase"), value="accuracy", base={"method": "imp"}, difference=True)
    assert related(found, phases).round(9).tolist() == [10.0, 0.0, 30.0, 0.0]


def test_without_published_numbers_ours_stand_alone():
    found = compared(made(), OURS, pd.DataFrame())
    assert found["ours"].tolist() == [2.0, 6.0, 4.0]
    assert found["published"].isna().all()
    assert "ours_relative" not in found


def test_the_better_of_pruned_and_retrained_counts_for_wanda_but_not_for_magnitude():
    patterns = dict.fromkeys([None, "2:4"])
    rows = pd.DataFrame(
        [
            {"pattern": pattern, "criterion": criterion, "retrain": retrain, "seed": 0, "perplexity": value}
            for pattern in patterns
            for criterion, retrain, value in [
                ("magnitude", "none", 9.0),
                ("magnitude", PERP, 5.0),
                ("wanda", "none", 4.0),
                ("wanda", PERP, 4.5),
            ]
        ]
    ).assign(dense_perplexity=2.0, model="m", protocol="p")
    tidy = recipe("table-2").tidy(rows)
    for pattern in (PATTERNS[None], "2:4"):
        mine = tidy[tidy["pattern"] == pattern].set_index("method")["perplexity"]
        assert mine.to_dict() == {"magnitude": 9.0, "magnitude+perp": 5.0, "wanda": 4.0}


def test_deviations_are_from_full_imp_with_as_many_cycles_and_the_same_seed():
    rows = pd.DataFrame(
        [
            {"freezing": None, "reverse": False, "cycles": 2, "seed": 0, "accuracy": 0.8},
            {"freezing": None, "reverse": False, "cycles": 3, "seed": 0, "accuracy": 0.5},
            {"freezing": "unfreeze", "reverse": True, "cycles": 3, "seed": 0, "accuracy": 0.47},
        ]
    )
    tidy = recipe("table-3").tidy(rows)
    assert tidy["order"].tolist() == [ORDERS["yes", "yes"]]
    assert tidy[DEVIATION].tolist() == pytest.approx([-3.0])


def test_shares_of_a_resnet_50_are_the_published_ones():
    found = {row["method"]: row["trainable_share"] for row in shares([1])}
    published = table("perp_v1_resnet50_trainable_share").set_index("method")["trainable_pct"]
    assert 100 * found["norms"] == pytest.approx(published["bn_parameters"], abs=0.005)
    assert 100 * found["linear_probing"] == pytest.approx(published["linear_probing"], abs=0.03)
    gradual = recipe("table-3-shares")
    both = compared(gradual, gradual.tidy(pd.DataFrame(plans())), gradual.published(""))
    assert both["difference"].abs().max() < 1e-4


# --- jobs ---------------------------------------------------------------------------------------------


def doubled(number: int) -> list[dict]:
    if number < 0:
        raise ValueError("below zero")
    return [{"twice": 2 * number}]


def test_jobs_are_kept_and_a_failed_one_does_not_stop_the_others(tmp_path):
    store = pk.Store(tmp_path / "jobs.sqlite")
    jobs = [Job(doubled, {"number": n}) for n in (3, -1, 3)]
    found = run_jobs(jobs, store, progress=False)
    assert len(found) == 2
    assert found[jobs[0].key()]["rows"] == [{"twice": 6}]
    assert found[jobs[1].key()]["error"] == "ValueError: below zero"
    seconds = found[jobs[0].key()]["seconds"]
    again = run_jobs(jobs, store, progress=False, retry_failed=True)
    assert again[jobs[0].key()]["seconds"] == seconds, "computed twice"


def missing(path: str) -> list[dict]:
    if not Path(path).exists():
        raise NotLoaded(f"{path} is not there")
    return [{"there": True}]


def test_a_job_whose_inputs_cannot_be_loaded_is_tried_again(tmp_path):
    store, file = pk.Store(tmp_path / "jobs.sqlite"), tmp_path / "model"
    job = Job(missing, {"path": str(file)})
    assert run_jobs([job], store, progress=False)[job.key()]["error"] == f"{file} is not there"
    file.touch()
    assert run_jobs([job], store, progress=False)[job.key()]["rows"] == [{"there": True}]


@pytest.mark.parametrize("job", ["reconstruction", "figure-1"])
def test_sources_that_are_not_there_are_no_result(job, tmp_path):
    scale = dataclasses.replace(
        SCALES["embedded"],
        models=(str(tmp_path),),
        vision=dataclasses.replace(TINY, classifier=str(tmp_path / "none.pt")),
    )
    done = attempt(recipe(job).all_jobs(scale)[0])
    assert done["error"]
    assert not done["loaded"]


def test_a_jobs_key_knows_the_files_that_it_reads(tmp_path):
    text, tasks = tmp_path / "text.txt", tmp_path / "tasks"
    tasks.mkdir()
    text.write_text("one")
    scale = dataclasses.replace(SCALES["embedded"], text=str(text), tasks_dir=str(tasks))
    keys = [recipe("reconstruction").all_jobs(scale)[0].key()]
    text.write_text("another")
    keys.append(recipe("reconstruction").all_jobs(scale)[0].key())
    (tasks / "boolq.jsonl").write_text("{}")
    keys.append(recipe("reconstruction").all_jobs(scale)[0].key())
    assert len({*keys}) == 3


def test_models_of_the_papers_have_the_batches_of_the_papers():
    sizes = {
        model: {
            (e.batch, e.accumulate)
            for e in recipe("table-1").experiments(PAPER, model)
            if e.retrain != "none"
        }
        for model in ("facebook/opt-2.7b", "facebook/opt-30b")
    }
    assert sizes == {"facebook/opt-2.7b": {(2, 4)}, "facebook/opt-30b": {(1, 2)}}
    assert PAPER.retraining(model="copies/opt-30b")["batch"] == 1


def test_a_key_tells_settings_apart_and_not_their_order():
    assert Job(doubled, {"number": 1}).key() != Job(doubled, {"number": 2}).key()
    assert Job(doubled, {"a": 1, "b": 2}).key() == Job(doubled, {"b": 2, "a": 1}).key()


def test_the_jobs_rows_lie_beside_the_sweeps(tmp_path):
    assert job_store(tmp_path / "mine.sqlite") == tmp_path / "mine-figures.sqlite"


TINY = Vision(counts={"train": 64, "validation": 20, "test": 20}, batch=16, epoch=1, sparsities=(0.7,))


@pytest.mark.parametrize("name", ["figure-1", "figure-2", "table-3", "sms"])
def test_a_tiny_scale_computes_the_figures_of_classifiers(name):
    found = recipe(name)
    scale = dataclasses.replace(SCALES["embedded"], vision=TINY)
    rows = []
    for job in found.all_jobs(scale):
        if name == "sms" and job.settings["phase"] > 1:
            continue
        done = attempt(job)
        assert done["error"] is None
        rows += done["rows"]
    both = compared(found, found.tidy(pd.DataFrame(rows)), found.published(found.reference))
    assert both["ours"].notna().any()
    if name in ("table-3", "sms"):
        assert both["difference"].notna().any()
