"""A real model on real questions: the same as the harness's own call."""

import json

import pytest
from task_parts import hub_of, stock_task

import perpkit as pk
from perpkit.evaluation.tasks import task_file

pytestmark = pytest.mark.real

TASKS = ("openbookqa", "arc_easy", "rte")
COUNT = 80


def test_accuracies_are_those_of_the_harness_to_the_last_digit(real_data, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = pk.load_model(real_data / "models" / "stories260K", device="cpu")
    folder = real_data / "zeroshot"
    ours = pk.zero_shot(
        model, tokenizer, tasks=",".join(TASKS), tasks_dir=folder, questions_per_task=COUNT, progress=False
    ).set_index("task")
    files = {name: task_file(name, folder).read_text(encoding="utf-8").splitlines() for name in TASKS}
    held = {name: list(map(json.loads, lines)) for name, lines in files.items()}
    monkeypatch.setattr("datasets.load_dataset", hub_of(held))
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=[stock_task(name) for name in TASKS],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        limit=COUNT,
    )["results"]
    for name in TASKS:
        assert ours.accuracy[name] == theirs[name]["acc,none"]
        assert ours.stderr[name] == pytest.approx(theirs[name]["acc_stderr,none"], rel=1e-12)
        assert ours.n[name] == theirs[name].get("sample_len", COUNT) == COUNT
    assert all(ours.accuracy > 0)
    assert list(ours.chance) == pytest.approx([0.25, 0.25, 0.5], abs=0.01)
