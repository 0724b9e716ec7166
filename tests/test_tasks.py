"""Tasks: their names, where their questions come from, and that the harness's prompts are kept."""

import json
import time

import pytest
from task_parts import DEFINED, QUESTIONS, hub_of, requests_of, stock_task, write

import perpkit as pk
from perpkit.evaluation import zero_shot as asking
from perpkit.evaluation.tasks import PAPERS, check_tasks, describe, task_file, task_names
from perpkit.sources.storyworld import ABILITIES

# The first question of each, written by hand: its contexts and continuations.
BREAD = "Baking bread: A man mixes flour. The dough"
FIRST = {
    "boolq": [
        ("Mia has a red kite.\nQuestion: is the kite red?\nAnswer:", answer) for answer in (" no", " yes")
    ],
    "rte": [
        ("Anna fed the cat.\nQuestion: The cat was fed. True or False?\nAnswer:", answer)
        for answer in (" True", " False")
    ],
    "hellaswag": [
        (BREAD, ending) for ending in (" flies away.", " rests in a bowl.", " sings . a song.", " is a car.")
    ],
    "winogrande": [
        ("The ball hit the glass because the ball", " was rolling."),
        ("The ball hit the glass because the glass", " was rolling."),
    ],
    "arc_easy": [
        ("Question: What melts in the sun?\nAnswer:", answer)
        for answer in (" a stone", " ice", " sand", " a pan")
    ],
    "arc_challenge": [
        ("Question: Why do leaves fall?\nAnswer:", answer)
        for answer in (" wind and cold", " noise", " paint", " maps", " tea")
    ],
    "openbookqa": [("A fish lives in", answer) for answer in (" water", " fire", " sand", " air")],
}


@pytest.fixture
def requests(monkeypatch):
    """What we ask of a model, and what the harness's own task asks about the same questions."""

    def both(name, folder, questions):
        monkeypatch.setattr("datasets.load_dataset", None)  # ours asks nobody
        with asking._quiet():
            ours = requests_of(asking._load(*describe(name, folder, None, 0)))
            monkeypatch.setattr("datasets.load_dataset", hub_of({name: questions}))
            return ours, requests_of(stock_task(name))

    return both


@pytest.mark.parametrize("name", PAPERS)
def test_the_requests_are_those_of_the_harness(name, requests, tmp_path):
    write(tmp_path, name)
    ours, theirs = requests(name, tmp_path, QUESTIONS[name])
    assert ours == theirs
    assert [request[2:] for request in ours if request[0] == 0] == FIRST[name]
    assert {request[0] for request in ours} == set(range(len(QUESTIONS[name])))


@pytest.mark.real
@pytest.mark.parametrize("name", ["openbookqa", "arc_easy", "rte"])
def test_the_requests_for_real_questions_are_those_of_the_harness(name, requests, real_data):
    file = task_file(name, real_data / "zeroshot")
    questions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    ours, theirs = requests(name, file.parent, questions)
    assert ours == theirs
    assert ours[-1][0] == len(questions) - 1 > 270


@pytest.mark.parametrize("name", PAPERS)
def test_the_right_answers_are_those_of_the_data_set(name, loaded, tmp_path, monkeypatch):
    """A model that knows them is always right, one that knows them not is always wrong."""
    write(tmp_path, name)
    from lm_eval.models.huggingface import HFLM

    right = {"boolq": [1, 0, 0], "rte": [0, 1], "hellaswag": [1, 3], "winogrande": [0, 1]}
    right |= {"arc_easy": [1, 0, 0], "arc_challenge": [4, 1], "openbookqa": [0, 2]}
    for correct in (True, False):

        def loglikelihood(self, requests, disable_tqdm=True, correct=correct):
            return [(float((one.idx == right[name][one.doc_id]) == correct), False) for one in requests]

        monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
        table = pk.zero_shot(*loaded, tasks=name, tasks_dir=tmp_path, progress=False)
        assert table.accuracy[0] == correct
    sizes = {"arc_easy": [4, 3, 2], "arc_challenge": [5, 4]}
    sizes = sizes.get(name, [len(FIRST[name])] * len(QUESTIONS[name]))
    assert table.chance[0] == pytest.approx(sum(1 / size for size in sizes) / len(sizes))
    assert table.n[0] == len(QUESTIONS[name])


# --- names ----------------------------------------------------------------------------------------


def test_sets_and_names_are_joined_in_their_order_and_once():
    assert task_names("papers") == list(PAPERS) == list(DEFINED)
    assert task_names("storyworld") == list(ABILITIES)
    assert task_names("rte, storyworld,recall,boolq") == ["rte", *ABILITIES, "boolq"]


@pytest.mark.parametrize(
    ("tasks", "bad", "near"),
    [("bolq", "bolq", "boolq"), ("rte,arc-easy", "arc-easy", "arc_easy"), ("story", "story", "storyworld")],
)
def test_an_unknown_task_is_refused_with_the_nearest_and_the_valid_ones(tasks, bad, near):
    with pytest.raises(ValueError, match=f"unknown task '{bad}'; did you mean '{near}'") as error:
        check_tasks(tasks)
    assert all(name in str(error.value) for name in (*PAPERS, *ABILITIES, "papers", "storyworld"))


@pytest.mark.parametrize("tasks", ["", "rte,", "xyz"])
def test_a_name_near_to_nothing_is_refused_with_the_valid_ones(tasks):
    with pytest.raises(ValueError, match=r"unknown task '(xyz)?'\. Valid are storyworld, papers, agreement"):
        check_tasks(tasks)


def test_another_type_is_refused():
    with pytest.raises(ValueError, match=r"tasks is \['rte'\]; it must be a text"):
        check_tasks(["rte"])


# --- files ----------------------------------------------------------------------------------------


def test_a_file_may_be_named_after_its_split_and_the_plain_name_comes_first(tmp_path):
    for name in ("rte_validation.jsonl", "rte_val.jsonl", "rte.jsonl"):
        (tmp_path / name).touch()
        assert task_file("rte", tmp_path).name == name


def test_a_missing_file_is_refused_with_the_names_that_would_do_and_those_there(tmp_path):
    write(tmp_path, "rte")
    check_tasks("rte,storyworld", tmp_path)
    with pytest.raises(ValueError, match=r"no questions for 'boolq'") as error:
        check_tasks("rte,boolq", tmp_path)
    wanted = "want boolq.jsonl or boolq_val.jsonl or boolq_validation.jsonl but there is rte.jsonl"
    assert str(tmp_path) in str(error.value)
    assert str(error.value).endswith(wanted)


def test_a_long_list_of_other_files_is_cut(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").touch()
    with pytest.raises(ValueError, match=r"there is 00.txt, .*, 09.txt, …$"):
        check_tasks("rte", tmp_path)


@pytest.mark.parametrize("tasks", ["rte", "recall"])
def test_a_folder_that_is_none_is_refused(tasks, tmp_path):
    with pytest.raises(ValueError, match=r"tasks_dir is '.*nowhere', which is no folder"):
        check_tasks(tasks, tmp_path / "nowhere")


def test_an_empty_folder_has_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"there is no files$"):
        check_tasks("rte", tmp_path)


# --- the Hub --------------------------------------------------------------------------------------


def test_questions_from_the_hub_come_by_the_harness(loaded, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", hub_of(QUESTIONS, asked))
    monkeypatch.setattr(asking, "hub_reachable", lambda: True)
    from_hub = pk.zero_shot(*loaded, tasks="papers", progress=False)
    assert asked == [tuple(where) for _, *where in DEFINED.values()]
    for name in PAPERS:
        write(tmp_path, name)
    from_files = pk.zero_shot(*loaded, tasks="papers", tasks_dir=tmp_path, progress=False)
    assert from_hub.equals(from_files)
    assert list(from_hub.task) == list(PAPERS)
    few = pk.zero_shot(*loaded, tasks="boolq,rte", questions_per_task=2, progress=False)
    assert list(few.n) == [2, 2]


def test_without_the_hub_the_cache_is_tried_and_then_the_ways_out_are_told(loaded, monkeypatch, tmp_path):
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    seen = []

    def absent(*_, **__):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", absent)
    monkeypatch.setattr(asking, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match=r"the task 'rte' is not in the local cache") as error:
        pk.zero_shot(*loaded, tasks="rte", progress=False)
    assert all(way in str(error.value) for way in ("tasks='storyworld'", "tasks_dir=", "rte.jsonl"))
    assert seen == [True]
    assert before == datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(asking, "hub_reachable", lambda: True)
    with pytest.raises(ValueError, match=r"cannot load the task 'rte' from the Hub: offline"):
        pk.zero_shot(*loaded, tasks="rte", progress=False)
    assert seen == [True, False]


def test_what_the_cache_lacks_is_told_soon(loaded, monkeypatch):
    monkeypatch.setattr(asking, "hub_reachable", lambda: False)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"the task 'winogrande' is not in the local cache"):
        pk.zero_shot(*loaded, tasks="winogrande", progress=False)
    # The client's own retries take most of a minute.
    assert time.monotonic() - start < 15
