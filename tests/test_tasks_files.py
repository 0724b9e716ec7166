"""Damaged files of questions are refused with file, line and field."""

import copy
import json

import pytest
from task_parts import QUESTIONS, write

import perpkit as pk
from perpkit.evaluation.tasks import PAPERS, read_questions


def damaged(name: str, field: str, value) -> list[dict]:
    """The questions of a task with one value of the second one changed, or taken away for `...`."""
    questions = copy.deepcopy(QUESTIONS[name])
    at = questions[1]
    *way, last = field.split(".")
    for part in way:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return questions


NEEDED = {
    "boolq": ("passage", "question", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in NEEDED for field in NEEDED[name]])
def test_a_missing_field_is_named(name, field, tmp_path):
    file = write(tmp_path, name, damaged(name, field, ...))
    with pytest.raises(ValueError, match=f"{name}.jsonl', line 2 has no field '{field}'") as error:
        read_questions(name, file)
    assert all(other in str(error.value) for other in NEEDED[name])
    for wrong in (None, 3.5, [], {}):
        file = write(tmp_path, name, damaged(name, field, wrong))
        with pytest.raises(ValueError, match=f"{name}.jsonl', line 2: field '{field}' is ") as error:
            read_questions(name, file)
        assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("boolq", "label", -1, "field 'label' is -1; it must be 0 or 1"),
        ("boolq", "label", True, "field 'label' is True; it must be 0 or 1"),
        ("rte", "label", "entailment", "field 'label' is 'entailment'"),
        ("rte", "sentence1", "  ", "field 'sentence1' is '  '; it must be a text that is not empty"),
        ("hellaswag", "label", "4", "field 'label' is 4 of 4 endings"),
        ("hellaswag", "label", "", "field 'label' is ''; it must be the number of an ending"),
        ("hellaswag", "endings", ["one"], "it must be a list of texts"),
        ("hellaswag", "endings", ["one", ""], "it must be a list of texts"),
        ("winogrande", "sentence", "no blank", "field 'sentence' is 'no blank'"),
        ("winogrande", "sentence", "nothing after _", "words after a blank"),
        ("winogrande", "answer", "", "field 'answer' is ''; it must be '1' or '2'"),
        ("winogrande", "answer", 1, "field 'answer' is 1; it must be '1' or '2'"),
        ("arc_easy", "answerKey", "D", "field 'answerKey' is 'D', none of \\['1', '2', '3'\\]"),
        ("arc_easy", "answerKey", " 1", "field 'answerKey' is ' 1'"),
        ("arc_challenge", "choices.text", ["one"], "field 'choices' is "),
        ("arc_challenge", "choices.label", ["A", "B"], "two lists of equally many texts"),
        ("openbookqa", "choices.text", ["a", "b", "c", 4], "field 'choices' is "),
        ("openbookqa", "choices", ["a", "b"], "field 'choices' is \\['a', 'b'\\]"),
    ],
)
def test_a_value_that_cannot_be_scored_is_named(name, field, value, words, tmp_path):
    file = write(tmp_path, name, damaged(name, field, value))
    with pytest.raises(ValueError, match=f"{name}.jsonl', line 2: .*{words}"):
        read_questions(name, file)


def test_a_long_value_is_cut(tmp_path):
    file = write(tmp_path, "boolq", damaged("boolq", "label", "y" * 500))
    with pytest.raises(ValueError, match="yyy…; it must be 0 or 1") as error:
        read_questions("boolq", file)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n{broken\n", "line 2 is not JSON: Expecting property name"),
        (b"\n\n[1, 2]\n", r"line 3 is \[1, 2\]; want an object with passage, question, label"),
        (b'{"passage": "\xff"}\n', "line 1 is not JSON: 'utf-8' codec can't decode"),
        (b"", "is empty; want one question of boolq a line"),
        (b"\n \n", "is empty"),
    ],
)
def test_a_file_that_is_none_is_named(content, words, tmp_path):
    file = tmp_path / "boolq.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"boolq.jsonl',? .*{words}"):
        read_questions("boolq", file)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read '.*gone.jsonl'"):
        read_questions("rte", tmp_path / "gone.jsonl")


def test_a_damaged_file_shows_before_any_question_is_asked(loaded, tmp_path, monkeypatch):
    write(tmp_path, "rte")
    write(tmp_path, "boolq", damaged("boolq", "label", 7))
    monkeypatch.setattr("lm_eval.evaluate", None)
    with pytest.raises(ValueError, match="line 2: field 'label' is 7"):
        pk.zero_shot(*loaded, tasks="rte,boolq", tasks_dir=tmp_path, progress=False)


@pytest.mark.parametrize("name", PAPERS)
def test_only_what_is_needed_is_kept(name, tmp_path):
    """Other fields may differ from line to line, which a table of the data would not bear."""
    questions = copy.deepcopy(QUESTIONS[name])
    questions[0] |= {"id": 1, "more": [1]}
    questions[1] |= {"id": "two", "more": {"a": None}}
    if "choices" in questions[0]:
        questions[0]["choices"]["more"] = 1
    found = read_questions(name, write(tmp_path, name, questions))
    fields = NEEDED[name]
    wanted = [{field: question[field] for field in fields} for question in QUESTIONS[name]]
    assert found == wanted


def test_separators_inside_texts_and_marks_before_them_do_no_harm(tmp_path):
    question = {"passage": "one\u2028two\x85three", "question": "é", "label": 1}
    file = tmp_path / "boolq.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(question, ensure_ascii=False).encode() + b"\r\n\r\n")
    assert read_questions("boolq", file) == [question]


def test_a_number_for_the_right_ending_will_do(tmp_path):
    file = write(tmp_path, "hellaswag", damaged("hellaswag", "label", 3))
    assert read_questions("hellaswag", file) == read_questions("hellaswag", write(tmp_path, "hellaswag"))
