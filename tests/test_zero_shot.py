"""Zero-shot accuracy against a scoring loop made by hand."""

import functools

import pytest
import torch

import perpkit as pk
from perpkit.evaluation import zero_shot as asking
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

    monkeypatch.setattr(asking, "questions", prepared)

    def ask(model, **options):
        return pk.zero_shot(model, tokenizer, questions_per_task=COUNT, seed=3, **options)

    return ask


def test_it_is_what_a_scoring_loop_by_hand_gives(damaged, tokenizer, measure, generators_unchanged):
    found = measure(damaged, tasks=",".join(ASKED))
    assert list(found.task) == list(ASKED)
    expected = [accuracy_by_hand(damaged, tokenizer, name) for name in ASKED]
    assert any(0 < accuracy < 1 for accuracy in expected)  # else much would go unnoticed
    assert list(found.accuracy) == pytest.approx(expected)
    assert list(found.stderr) == pytest.approx([(a * (1 - a) / COUNT) ** 0.5 for a in expected])
    assert list(found.n) == [COUNT, COUNT]


def test_all_abilities_are_asked_by_one_name_and_small_batches_change_nothing(damaged, measure):
    found = measure(damaged, tasks="storyworld")
    assert list(found.columns) == ["task", "accuracy", "stderr", "chance", "n"]
    assert tuple(found.task) == ABILITIES
    for name, chance in zip(found.task, found.chance, strict=True):
        asked = questions(name if name in ASKED else ASKED[0], COUNT, 3)
        assert chance == pytest.approx(sum(1 / len(question["choices"]) for question in asked) / COUNT)
    small = measure(damaged, tasks="recall", batch=1)
    assert small.accuracy[0] == found.accuracy[list(ABILITIES).index("recall")]


def test_nothing_is_printed_even_where_there_is_no_repository(
    tiny_opt, measure, tmp_path, monkeypatch, capfd
):
    # As git looks for one in the folders above.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    measure(tiny_opt, tasks="recall")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tasks", ["boolq", "recall,recal", ""])
def test_an_unknown_task_is_refused_with_the_valid_ones(loaded, measure, tasks):
    with pytest.raises(ValueError, match=", ".join(ABILITIES)) as error:
        measure(loaded[0], tasks=tasks)
    assert repr(tasks.split(",")[-1]) in str(error.value)


def test_the_model_is_left_as_it_was(tiny_opt, measure):
    tiny_opt.train()
    tiny_opt.model.decoder.layers[0].eval()
    modes = [module.training for module in tiny_opt.modules()]
    before = {name: tensor.clone() for name, tensor in tiny_opt.state_dict().items()}
    measure(tiny_opt, tasks="recall")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_opt.state_dict().items())
    assert [module.training for module in tiny_opt.modules()] == modes
