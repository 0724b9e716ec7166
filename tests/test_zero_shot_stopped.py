"""Zero-shot accuracy: progress, stopping, and that all is left as it was."""

import copy
import logging
import os
import threading

import pytest
import torch
from task_parts import write

import perpkit as pk
from perpkit.evaluation import zero_shot as asking
from perpkit.evaluation.tasks import PAPERS


@pytest.fixture
def folder(tmp_path):
    """Files of the papers' seven, and a working directory that is none of a repository."""
    folder = tmp_path / "questions"
    folder.mkdir()
    for name in PAPERS:
        write(folder, name)
    return folder


@pytest.fixture
def ask(folder):
    def ask(model, tokenizer, tasks="papers", **options):
        return pk.zero_shot(
            model, tokenizer, **{"tasks": tasks, "tasks_dir": folder, "progress": False, **options}
        )

    return ask


# --- progress and stopping ------------------------------------------------------------------------


class Bar:
    """What a progress bar is told."""

    made: list

    def __init__(self, *, total, desc, disable, leave):
        self.total, self.desc, self.disable, self.count = total, desc, disable, 0
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count):
        self.count += count


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_for_each_task_reaches_its_end(loaded, ask, monkeypatch, progress):
    monkeypatch.setattr(Bar, "made", [], raising=False)
    monkeypatch.setattr(asking, "tqdm", Bar)
    ask(*loaded, progress=progress, batch=3)
    assert [bar.desc for bar in Bar.made] == [f"zero-shot {name}" for name in PAPERS]
    assert all(bar.count == bar.total > 0 for bar in Bar.made)
    assert all(bar.disable is not progress for bar in Bar.made)


@pytest.mark.parametrize("progress", [True, False])
def test_only_the_bar_is_printed_even_where_there_is_no_repository(
    loaded, ask, tmp_path, monkeypatch, capfd, progress
):
    # As git looks for one in the folders above.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    ask(*loaded, tasks="hellaswag,recall", questions_per_task=2, progress=progress)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert bool(printed.err) == progress
    lines = [line for line in printed.err.replace("\r", "\n").split("\n") if line.strip()]
    assert all(line.startswith("zero-shot ") for line in lines)


def test_a_stop_leaves_the_finished_tasks(loaded, ask):
    whole = ask(*loaded, tasks="boolq,rte,openbookqa", batch=1)
    calls, finished = [], []
    for limit in range(40):
        calls.clear()

        def cancelled(limit=limit):
            calls.append(1)
            return len(calls) > limit

        found = ask(*loaded, tasks="boolq,rte,openbookqa", batch=1, cancelled=cancelled)
        assert list(found.columns) == list(whole.columns)
        assert found.to_dict("records") == whole.head(len(found)).to_dict("records")
        finished.append(len(found))
        if len(found) == 3:
            break
    # Nothing at once, then one after the other, and a question is asked before every batch.
    assert finished == sorted(finished)
    assert set(finished) == {0, 1, 2, 3}
    batches = 3 + 2 * 2 + 2 * 4  # of boolq both answers have one token
    assert 3 + 6 < limit <= 3 + 2 * 3 + batches


def test_a_stop_before_the_start_makes_no_questions(loaded, monkeypatch):
    monkeypatch.setattr("perpkit.evaluation.tasks.questions", None)
    found = pk.zero_shot(*loaded, progress=False, cancelled=lambda: True)
    assert list(found.columns) == ["task", "accuracy", "stderr", "chance", "n"]
    assert found.empty


# --- left as it was -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_model_tokenizer_loggers_and_generators_are_left_as_they_were(
    tiny_opt, tokenizer, ask, ending, monkeypatch, generators_unchanged
):
    from datasets.utils.logging import is_progress_bar_enabled
    from lm_eval.api import task

    tiny_opt.train()
    tiny_opt.model.decoder.layers[0].eval()
    mute = copy.deepcopy(tokenizer)
    mute.pad_token = None

    def state() -> tuple:
        names = ("lm_eval", "lm_eval.models.huggingface", "transformers.tokenization_utils_base")
        levels = [logging.getLogger(name).level for name in names]
        modes = [module.training for module in tiny_opt.modules()]
        attributes = [sorted(vars(module)) for module in tiny_opt.modules()]
        return levels, modes, attributes, is_progress_bar_enabled(), task.tqdm, mute.pad_token, len(mute)

    weights = {name: tensor.clone() for name, tensor in tiny_opt.state_dict().items()}
    before = state()
    if ending == "failed":
        monkeypatch.setattr(tiny_opt, "forward", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            ask(tiny_opt, mute)
    else:
        stop = iter([False] * 3 + [True] * 99).__next__ if ending == "stopped" else None
        found = ask(tiny_opt, mute, cancelled=stop)
        assert list(found.task) == list(PAPERS)[: 1 if ending == "stopped" else None]
    monkeypatch.undo()
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_opt.state_dict().items())


def fail(*_, **__):
    raise RuntimeError("on purpose")


def test_a_head_untied_by_hand_stays_its_own(tiny_opt, tokenizer, ask):
    head, embedding = tiny_opt.get_output_embeddings(), tiny_opt.get_input_embeddings()
    assert head.weight is embedding.weight
    head.weight = torch.nn.Parameter(2 * head.weight.detach())
    assert tiny_opt.config.tie_word_embeddings
    before = head.weight.detach().clone()
    ask(tiny_opt, tokenizer, tasks="rte")
    assert head.weight is not embedding.weight
    assert torch.equal(head.weight, before)


def test_no_file_is_written(loaded, ask, tmp_path, monkeypatch):
    import datasets

    for name in ("work", "temporary", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    found = ask(*loaded, tasks="papers,recall", questions_per_task=2)
    assert len(found) == len(PAPERS) + 1
    # The library of data sets keeps an empty folder for its whole process, which removes it at its end.
    left = [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]
    assert left == []
    assert os.listdir(tmp_path / "work") == os.listdir(tmp_path / "cache") == []


def test_threads_do_not_leave_each_other_quiet(loaded, ask):
    from lm_eval.api import task

    bar, level = task.tqdm, logging.getLogger("lm_eval").level
    inside, go = threading.Barrier(2), threading.Event()

    def first():
        with asking._quiet():
            inside.wait()
            go.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with asking._quiet():
        go.set()
        thread.join()
        # The other one, which made it quiet, has gone.
        assert logging.getLogger("lm_eval").level == logging.ERROR
        assert task.tqdm is not bar
    assert task.tqdm is bar
    assert logging.getLogger("lm_eval").level == level


def test_a_model_spread_over_devices_is_asked_all_the_same(loaded, ask, tmp_path):
    from accelerate import cpu_offload

    model, tokenizer = loaded
    expected = ask(model, tokenizer, batch=3)
    waiting = copy.deepcopy(model)
    # Every weight waits elsewhere until it is needed: on the device "meta" in between.
    cpu_offload(waiting, torch.device("cpu"))
    assert next(waiting.parameters()).is_meta
    assert ask(waiting, tokenizer, batch=3).equals(expected)
