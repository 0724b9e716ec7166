"""A few questions of each of the papers' tasks, our own, in the data sets' fields; and the harness's task."""

import json
from pathlib import Path

import lm_eval.tasks


def science(stem: str, asked: str, answers: list[str], key: str, labels: str = "ABCD", **more) -> dict:
    choices = {"text": answers, "label": list(labels[: len(answers)])}
    return {"id": asked[:4], stem: asked, "choices": choices, "answerKey": key, **more}


QUESTIONS = {
    "boolq": [
        {"passage": "Mia has a red kite.", "question": "is the kite red", "label": 1, "idx": 0},
        {"passage": "Tom sleeps.\n\nIt rains.", "question": "does tom swim", "label": 0, "idx": 1},
        {"passage": "The cup is “full”.", "question": "is the cup empty", "label": 0, "idx": 2},
    ],
    "rte": [
        {"sentence1": "Anna fed the cat.", "sentence2": "The cat was fed.", "label": 0, "idx": 0},
        {"sentence1": "A lamp fell.", "sentence2": "A lamp rose.", "label": 1, "idx": 1},
    ],
    "hellaswag": [
        {
            **{
                "ind": 4,
                "activity_label": "Baking bread",
                "ctx_a": "A man mixes flour.",
                "ctx_b": "the dough",
            },
            **{"ctx": "A man mixes flour. the dough", "source_id": "a~1", "split": "val"},
            "endings": ["flies away.", "rests in a bowl.", "sings [loudly] [title] a song.", "is a  car."],
            "label": "1",
        },
        {
            **{"ind": 9, "activity_label": "How to knot", "ctx_a": "[header] Take a rope [title] Hold it."},
            **{"ctx_b": "", "ctx": "Take a rope", "source_id": "w~2", "split": "val"},
            "endings": [
                "[step] Eat it.",
                "Paint the sky.",
                "Throw a fish.",
                "Make a loop [substeps] and pull.",
            ],
            "label": "3",
        },
    ],
    "winogrande": [
        {
            "sentence": "The ball hit the glass because _ was rolling.",
            **{"option1": "the ball", "option2": "the glass", "answer": "1"},
        },
        {
            "sentence": "_ cried while Ben laughed, for he was sad.",
            **{"option1": "Ben", "option2": "Karl", "answer": "2"},
        },
    ],
    "arc_easy": [
        science("question", "What melts in the sun?", ["a stone", "ice", "sand", "a pan"], "B"),
        science("question", "Which one is a plant?", ["fern", "fox", "fog"], "1", "1234"),
        science("question", "When was the day?", ["2001-02-03", "2001-02-04"], "A"),
    ],
    "arc_challenge": [
        science(
            "question",
            "Why do leaves fall?",
            ["wind and cold", "noise", "paint", "maps", "tea"],
            "E",
            "ABCDE",
        ),
        science("question", "What pulls a stone down?", ["light", "gravity", "salt", "song"], "B"),
    ],
    "openbookqa": [
        science("question_stem", "A fish lives in", ["water", "fire", "sand", "air"], "A"),
        science("question_stem", "Frost forms when it is", ["hot", "loud", "cold", "late"], " C"),
    ],
}
DEFINED = {
    "boolq": ("super_glue/boolq/default.yaml", "aps/super_glue", "boolq"),
    "rte": ("glue/rte/default.yaml", "nyu-mll/glue", "rte"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "Rowan/hellaswag", None),
    "winogrande": ("winogrande/default.yaml", "allenai/winogrande", "winogrande_xl"),
    "arc_easy": ("arc/arc_easy.yaml", "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "allenai/openbookqa", "main"),
}


def write(folder: Path, name: str, questions: list[dict] | None = None) -> Path:
    """Write the file of one task, by default with the questions above."""
    file = folder / f"{name}.jsonl"
    asked = QUESTIONS[name] if questions is None else questions
    file.write_text("".join(json.dumps(question) + "\n" for question in asked), encoding="utf-8")
    return file


def hub_of(questions: dict[str, list[dict]], asked: list | None = None):
    """A `datasets.load_dataset` that has these questions as every split of the tasks' data sets."""
    from datasets import Dataset

    names = {where: name for name, (_, *where) in DEFINED.items() for where in [tuple(where)]}

    def load_dataset(path: str, name: str | None = None):
        if asked is not None:
            asked.append((path, name))
        held = Dataset.from_list(questions[names[path, name]])
        return dict.fromkeys(("train", "validation", "test"), held)

    return load_dataset


def stock_task(name: str):
    """The task as the harness defines it, with what `datasets.load_dataset` gives."""
    file = Path(lm_eval.tasks.__file__).parent / DEFINED[name][0]
    return lm_eval.tasks.TaskManager(include_defaults=False).load(str(file))["tasks"][name]


def requests_of(task) -> list[tuple]:
    """Everything that a model is asked: question, choice, context and continuation."""
    task.build_all_requests()
    return [(request.doc_id, request.idx, *request.args) for request in task.instances]
