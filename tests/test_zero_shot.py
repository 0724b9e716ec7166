"""Zero-shot accuracy against a scoring loop made by hand."""

import functools
import math

import pandas as pd
import pytest
import torch
from task_parts import QUESTIONS, write

import perpkit as pk
from perpkit.evaluation import tasks as sources
from perpkit.evaluation.tasks import PAPERS, describe
from perpkit.evaluation.zero_shot import COLUMNS, _load, _quiet, mean_accuracy
from perpkit.sources.storyworld import ABILITIES
from perpkit.sources.storyworld import questions as made

COUNT = 12
ASKED = ("recall", "counting")
# Making questions takes longer than answering them.
questions = functools.lru_cache(made)


@torch.no_grad()
def by_hand(model, tokenizer, question: dict) -> int:
    """The choice whose tokens are the most likely after the context."""
    scores = []
    for choice in question["choices"]:
        context = tokenizer(question["context"]).input_ids
        whole = tokenizer(question["context"] + choice).input_ids
        assert whole[: len(context)] == context
        log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(context), len(whole))
        scores.append(sum(log_probabilities[at - 1, whole[at]].item() for at in places))
    return scores.index(max(scores))


def accuracy_by_hand(model, tokenizer, name: str) -> float:
    asked = questions(name, COUNT, 3)
    return sum(by_hand(model, tokenizer, question) == question["answer"] for question in asked) / COUNT


@pytest.fixture
def damaged(tiny_opt):
    """The embedded model, pruned so far that it is sometimes wrong."""
    pk.prune(tiny_opt, "magnitude", sparsity=0.7)
    return tiny_opt


@pytest.fixture
def measure(tokenizer, monkeypatch):
    """Ask a few questions of seed 3, those of two abilities for all."""

    def prepared(ability, count, seed):
        assert (count, seed) == (COUNT, 3)
        if ability in ABILITIES and ability not in ASKED:
            ability = ASKED[0]
        return questions(ability, count, seed)

    monkeypatch.setattr(sources, "questions", prepared)

    def ask(model, **options):
        options = {"questions_per_task": COUNT, "progress": False, **options}
        return pk.zero_shot(model, tokenizer, seed=3, **options)

    return ask


@pytest.fixture
def folder(tmp_path):
    """Files of the papers' seven."""
    for name in PAPERS:
        write(tmp_path, name)
    return tmp_path


def test_it_is_what_a_scoring_loop_by_hand_gives(damaged, tokenizer, measure, generators_unchanged):
    found = measure(damaged, tasks=",".join(ASKED))
    assert list(found.task) == list(ASKED)
    expected = [accuracy_by_hand(damaged, tokenizer, name) for name in ASKED]
    assert any(0 < accuracy < 1 for accuracy in expected)  # else much would go unnoticed
    assert list(found.accuracy) == pytest.approx(expected)
    assert list(found.stderr) == pytest.approx([(a * (1 - a) / (COUNT - 1)) ** 0.5 for a in expected])
    assert list(found.n) == [COUNT, COUNT]


def test_all_abilities_are_asked_by_one_name_and_small_batches_change_nothing(damaged, measure):
    found = measure(damaged, tasks="storyworld")
    assert list(found.columns) == COLUMNS == ["task", "accuracy", "stderr", "chance", "n"]
    assert tuple(found.task) == ABILITIES
    for name, chance in zip(found.task, found.chance, strict=True):
        asked = questions(name if name in ASKED else ASKED[0], COUNT, 3)
        assert chance == pytest.approx(sum(1 / len(question["choices"]) for question in asked) / COUNT)
    small = measure(damaged, tasks="recall", batch=1)
    assert small.accuracy[0] == found.accuracy[list(ABILITIES).index("recall")]


def test_the_papers_questions_are_scored_as_by_hand(damaged, tokenizer, folder):
    """Choices of one token and of several, and one ending for two texts."""
    found = pk.zero_shot(damaged, tokenizer, tasks="papers", tasks_dir=folder, batch=3, progress=False)
    for row in found.itertuples():
        with _quiet():
            task = _load(*describe(row.task, folder, None, 0))
            task.build_all_requests()
        right = []
        for number, question in task.doc_iterator():
            asked = [one for one in task.instances if one.doc_id == number]
            scores = [score(damaged, tokenizer, *one.args) for one in asked]
            answer = task.doc_to_text if row.task == "winogrande" else task.doc_to_target
            right.append(scores.index(max(scores)) == int(answer(question)))
        assert row.accuracy == sum(right) / len(right)
        assert row.n == len(right) == len(QUESTIONS[row.task])
    assert 0 < found.accuracy.mean() < 1


@torch.no_grad()
def score(model, tokenizer, context: str, continuation: str) -> float:
    """Log-likelihood of what is added to the context's tokens, one request at a time."""
    start, whole = (tokenizer(words).input_ids for words in (context, context + continuation))
    log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_probabilities[at - 1, whole[at]].item() for at in range(len(start), len(whole)))


def test_without_a_number_two_hundred_are_made_and_all_of_a_file_asked(loaded, folder, monkeypatch):
    asked = []

    def few(ability, count, seed):
        asked.append((ability, count, seed))
        return questions(ability, COUNT, 3)

    monkeypatch.setattr(sources, "questions", few)
    found = pk.zero_shot(*loaded, tasks="boolq,recall", tasks_dir=folder, seed=5, progress=False)
    assert asked == [("recall", 200, 5)]
    assert list(found.n) == [3, COUNT]
    first = pk.zero_shot(*loaded, tasks="boolq", tasks_dir=folder, questions_per_task=1, progress=False)
    assert first.n[0] == 1
    assert math.isnan(first.stderr[0])


@pytest.mark.parametrize("option", [{"questions_per_task": 0}, {"batch": 0}, {"batch": -3}])
def test_a_number_below_one_is_refused(loaded, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        pk.zero_shot(*loaded, **option)


def test_a_choice_longer_than_the_context_is_named(loaded, tmp_path):
    question = {**QUESTIONS["openbookqa"][1]}
    question["choices"] = {"text": ["good", "the cat " * 200], "label": ["A", "C"]}
    write(tmp_path, "openbookqa", [question])
    with pytest.raises(ValueError, match=r"'openbookqa': the choice ' the cat .*' after 'Frost forms when"):
        pk.zero_shot(*loaded, tasks="openbookqa", tasks_dir=tmp_path, progress=False)


def test_a_context_too_long_loses_its_beginning_without_a_word(tiny_opt, tokenizer, tmp_path, capfd):
    passage = "Anna has a red ball. " + "The cat is on the table. " * 60
    write(tmp_path, "boolq", [{"passage": passage, "question": "is the ball red", "label": 1}])
    read = []
    tiny_opt.register_forward_pre_hook(lambda _, inputs: read.extend(inputs[0].tolist()))
    pk.zero_shot(tiny_opt, tokenizer, tasks="boolq", tasks_dir=tmp_path, progress=False)
    context = f"{passage}\nQuestion: is the ball red?\nAnswer:"
    wanted = [tokenizer(context + answer, verbose=False).input_ids[:-1][-128:] for answer in (" no", " yes")]
    assert all(len(tokens) == 128 for tokens in wanted)
    assert {tuple(tokens) for tokens in read} == {tuple(tokens) for tokens in wanted}
    assert capfd.readouterr() == ("", "")


# --- the mean -------------------------------------------------------------------------------------


def test_every_task_has_the_same_weight_in_the_mean():
    table = pd.DataFrame({"accuracy": [0.2, 0.6, 1.0], "stderr": [0.03, 0.04, 0.0], "n": [10, 1000, 5]})
    mean, stderr = mean_accuracy(table)
    assert mean == pytest.approx(0.6)
    assert stderr == pytest.approx((0.03**2 + 0.04**2) ** 0.5 / 3)


def test_no_task_has_no_mean():
    assert all(map(math.isnan, mean_accuracy(pd.DataFrame(columns=COLUMNS))))
