"""perpkit figures without computing: what is stored, what is left, and whose models they are."""

import pytest
from paper_parts import figures

from perpkit.experiments.paper.jobs import job_store
from perpkit.experiments.paper.recipe import same_model
from perpkit.experiments.paper.recipes import recipe
from perpkit.experiments.paper.scales import scale_of

pytestmark = pytest.mark.usefixtures("tiny_scale")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "results.sqlite"


def test_a_dry_run_counts_and_computes_nothing(store):
    done = figures(store, "--only", "table-1,trainable-share", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "table-1              22 rows and jobs, 0 of them in the store" in done.stdout
    assert "together 23 rows: 0 finished, 23 left, about " in done.stdout
    assert "memory: tiny-opt takes " in done.stdout
    assert not store.exists()
    assert not job_store(store).exists()
    assert not (store.parent / "out").exists()
    figures(store, "--only", "throughput")
    done = figures(store, "--only", "table-1", "--dry-run")
    assert "22 rows and jobs, 6 of them in the store" in done.stdout
    assert "finished rows took up to" in done.stdout


def test_what_is_stored_is_drawn_without_computing_the_rest(store):
    figures(store, "--only", "throughput")
    before = store.read_bytes()
    done = figures(store, "--only", "table-1,throughput,trainable-share", "--stored")
    assert done.exit_code == 0, done.output
    assert "table-1: " not in done.stderr
    assert "16 of 22 are not computed yet" in done.stderr
    assert "1 of 1 are not computed yet" in done.stderr
    assert "2 figures as PDF" in done.stdout
    assert (store.parent / "out" / "table-1.pdf").exists()
    page = (store.parent / "out" / "report.html").read_text()
    assert "16 of 22 are not computed yet" in page
    # Of what has no rows nothing is said as if it had.
    assert page.count("Protocol: ") == 2
    assert "Retraining: 3 steps of 2 windows." in page
    assert store.read_bytes() == before
    assert not job_store(store).exists()
    assert figures(store, "--only", "trainable-share", "--stored").exit_code == 1


def test_a_folder_with_the_name_of_a_papers_model_is_a_copy_of_it(tmp_path):
    (tmp_path / "opt-13b").mkdir()
    scale = scale_of(str(tmp_path / "opt-13b"), dtype="bfloat16")
    assert scale.dtype == "bfloat16"
    assert recipe("table-1").pairs(scale) == [(str(tmp_path / "opt-13b"), "opt-13b")]
    assert same_model(str(tmp_path / "opt-13b"), "opt-13b")
    # What is no folder is whatever its owner says.
    assert not same_model("somebody/opt-13b", "opt-13b")
    with pytest.raises(ValueError, match="dtype"):
        scale_of("paper", dtype="float3")


def test_a_dry_run_counts_also_what_cannot_be_had(store, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = figures(store, "--scale", "paper", "--only", "table-1", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "table-1              290 rows and jobs, 0 of them in the store" in done.stdout
    assert "memory: facebook/opt-30b takes 59.9 GB, to retrain it whole 659 GB" in done.stdout
    assert "290 left; how long is not known: the model 'facebook/opt-1.3b' is not in the" in done.stdout
