"""Text as token windows: exact cuts, disjoint splits, and the floor of the story world."""

import json
import math
import zlib

import pytest
import torch

from perpkit.sources import text as module
from perpkit.sources.storyworld import SPLITS, stories
from perpkit.sources.text import Text, check_windows, load_text

LINES = [f"The {number} bats sleep in the cave and dream of {number} moths." for number in range(200)]


@pytest.fixture
def file(tmp_path):
    """A text file of two hundred documents."""
    path = tmp_path / "bats.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def cut(tokenizer, lines, length):
    """What a split must be: joined by two newlines, tokenised once, the rest dropped."""
    ids = tokenizer("\n\n".join(lines), verbose=False).input_ids
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


# --- the story world ------------------------------------------------------------------------------


def test_storyworld_windows_have_the_shapes_asked_for(tokenizer):
    text = load_text("storyworld", tokenizer, length=32, windows={"train": 5, "calibration": 3, "test": 2})
    for split, count in (("train", 5), ("calibration", 3), ("test", 2)):
        assert getattr(text, split).shape == (count, 32)
        assert getattr(text, split).dtype == torch.int64


def test_storyworld_windows_are_consecutive_stories_of_their_split(tokenizer, text):
    for split in SPLITS:
        told = tokenizer.decode(getattr(text, split).flatten()).split("\n\n")
        stream = stories(split, 0)
        assert told[:-1] == [next(stream).text for _ in told[:-1]]
        assert next(stream).text.startswith(told[-1])
        assert {zlib.crc32(story.encode()) % 4 for story in told[:-1]} <= {
            "train": {0, 1},
            "calibration": {2},
            "test": {3},
        }[split]


def test_seed_changes_what_is_learned_from_and_not_what_is_measured_on(tokenizer):
    windows = {"train": 4, "calibration": 4, "test": 4}
    one, other = (load_text("storyworld", tokenizer, windows=windows, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.train, other.train)
    assert not torch.equal(one.calibration, other.calibration)
    assert torch.equal(one.test, other.test)
    assert one.floor == other.floor


def test_the_same_call_gives_the_same_text(tokenizer, generators_unchanged):
    windows = {"train": 4, "calibration": 4, "test": 4}
    one, other = (load_text("storyworld", tokenizer, windows=windows, seed=3) for _ in range(2))
    assert all(torch.equal(getattr(one, split), getattr(other, split)) for split in SPLITS)


@pytest.mark.parametrize("length", [16, 50, 128])
def test_floor_equals_a_slow_computation_from_characters(tokenizer, length):
    count = 12
    text = load_text("storyworld", tokenizer, length=length, windows={"train": 1, "test": count})
    # charge every choice to the character after it, then every token with its characters
    charged = []
    stream = stories("test", 0)
    while len(charged) < 8 * count * length:
        story = next(stream)
        nats = [0.0] * len(story.text + "\n\n")
        for position, amount in story.surprisals:
            nats[position] += amount
        charged += nats
    total, predicted, start = 0.0, 0, 0
    for i, token in enumerate(text.test.flatten().tolist()):
        end = start + len(tokenizer.decode([token]))
        if i % length:
            total += sum(charged[start:end])
            predicted += 1
        start = end
    assert predicted == count * (length - 1)
    assert text.floor == pytest.approx(math.exp(total / predicted), rel=1e-9)


def test_floor_is_the_probability_of_whole_stories(tokenizer):
    # one window that ends where a story ends: nothing is cut off, and its first token, "It", is certain
    stream = stories("test", 0)
    told = [next(stream) for _ in range(4)]
    length = len(tokenizer("\n\n".join(story.text for story in told), verbose=False).input_ids)
    text = load_text("storyworld", tokenizer, length=length, windows={"train": 1, "test": 1})
    nats = -sum(story.log_probability for story in told)
    assert text.floor == pytest.approx(math.exp(nats / (length - 1)), rel=1e-9)


# --- files ----------------------------------------------------------------------------------------


def test_a_single_file_is_cut_into_eight_one_and_one_tenth(tokenizer, file):
    text = load_text(file, tokenizer, length=32)
    assert text.train.tolist() == cut(tokenizer, LINES[:160], 32)
    assert text.calibration.tolist() == cut(tokenizer, LINES[160:180], 32)
    assert text.test.tolist() == cut(tokenizer, LINES[180:], 32)
    assert text.floor is None
    assert text.name == "bats.txt"
    assert load_text(str(file), tokenizer, length=32).test.tolist() == text.test.tolist()


def test_windows_cap_each_split(tokenizer, file):
    whole = load_text(file, tokenizer, length=16)
    text = load_text(file, tokenizer, length=16, windows={"train": 7, "test": 10_000})
    assert torch.equal(text.train, whole.train[:7])
    assert torch.equal(text.calibration, whole.calibration)
    assert torch.equal(text.test, whole.test)


def test_jsonl_is_read_by_its_text_field(tokenizer, file, tmp_path):
    rows = tmp_path / "bats.jsonl"
    rows.write_text("".join(json.dumps({"id": i, "text": line}) + "\n" for i, line in enumerate(LINES)))
    one, other = load_text(rows, tokenizer, length=32), load_text(file, tokenizer, length=32)
    assert all(torch.equal(getattr(one, split), getattr(other, split)) for split in SPLITS)


def test_jsonl_may_hold_any_separator_inside_a_text(tokenizer, tmp_path):
    # all of these end a line for str.splitlines, none of them for JSON
    strange = [f"{line}\n{line}\u2028{line}\x85{line}" for line in LINES]
    rows = tmp_path / "strange.jsonl"
    lines = [json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in strange]
    rows.write_text("".join(lines), encoding="utf-8", newline="\r\n")
    text = load_text(rows, tokenizer, length=16)
    assert text.test.tolist() == cut(tokenizer, strange[180:], 16)


def test_a_mapping_names_the_file_of_each_split(tokenizer, tmp_path):
    files = {}
    for i, split in enumerate(SPLITS):
        files[split] = tmp_path / f"{split}.txt"
        files[split].write_text("\n".join(LINES[i::3]))
    text = load_text(files, tokenizer, length=32)
    for i, split in enumerate(SPLITS):
        assert getattr(text, split).tolist() == cut(tokenizer, LINES[i::3], 32)
    assert text.name == "train.txt / calibration.txt / test.txt"


def test_calibration_is_taken_from_the_end_of_training(tokenizer, file, tmp_path):
    test = tmp_path / "test.txt"
    test.write_text("\n".join(LINES[:30]))
    text = load_text({"train": str(file), "test": str(test)}, tokenizer, length=32)
    assert text.train.tolist() == cut(tokenizer, LINES[:180], 32)
    assert text.calibration.tolist() == cut(tokenizer, LINES[180:], 32)
    assert text.test.tolist() == cut(tokenizer, LINES[:30], 32)


def test_a_path_may_start_at_home(tokenizer, file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setenv("USERPROFILE", str(file.parent))
    assert load_text("~/bats.txt", tokenizer, length=32).name == "bats.txt"


def test_length_is_the_tokenizers_context_up_to_2048(tokenizer, file, tmp_path, monkeypatch):
    assert load_text(file, tokenizer).test.shape[1] == tokenizer.model_max_length
    long = tmp_path / "long.txt"
    long.write_text("\n".join(LINES * 50))
    monkeypatch.setattr(tokenizer, "model_max_length", int(1e30))
    assert load_text(long, tokenizer).test.shape[1] == 2048


def test_protocol_says_what_is_measured_on(tokenizer, file):
    text = load_text(file, tokenizer, length=16, windows={"test": 3})
    assert text.protocol == "bats.txt, test split, 3 windows of 16 tokens"
    assert repr(text) == "Text(name='bats.txt', floor=None)"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n", "  \n\t\n"])
def test_an_empty_file_is_said_to_be_empty(tokenizer, tmp_path, content):
    path = tmp_path / "nothing.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"nothing\.txt' is empty"):
        load_text(path, tokenizer)


def test_a_short_text_names_the_split_and_the_length(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("\n".join(LINES[:10]))
    with pytest.raises(ValueError, match=r"calibration split of 'short\.txt' .* one window of 64 tokens"):
        load_text(path, tokenizer, length=64)


def test_bytes_that_are_not_utf8(tokenizer, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Käse\n".encode("latin-1") * 100)
    with pytest.raises(ValueError, match=r"cannot read the text file .*latin\.txt.*utf-8"):
        load_text(path, tokenizer)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '"text"', "3", "null", '{"title": "x"}', '{"text": 3}', '{"text": null}', ""]
)
def test_a_bad_json_line_is_named_with_its_field(tokenizer, tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "one"}}\n{{"text": "two"}}\n{line}\n{{"text": "four"}}\n')
    with pytest.raises(ValueError, match=r'rows\.jsonl, line 3: .*"text"'):
        load_text(path, tokenizer)


@pytest.mark.parametrize(
    ("name", "meant"), [("storywold", "storyworld"), ("wikitext-2", "wikitext2"), ("c44", "c4")]
)
def test_an_unknown_text_suggests_the_nearest(tokenizer, name, meant):
    with pytest.raises(ValueError, match=f"unknown text '{name}'; did you mean '{meant}'\\?"):
        load_text(name, tokenizer)


def test_an_unknown_text_lists_the_valid_ones(tokenizer, tmp_path):
    for name in ("Ulysses", tmp_path / "no.txt", tmp_path):
        with pytest.raises(ValueError, match=r"unknown text .*\. A text is 'storyworld', 'wikitext2', 'c4'"):
            load_text(name, tokenizer)


@pytest.mark.parametrize("source", ["storyworld", "file"])
def test_unknown_splits_are_refused(tokenizer, file, source):
    source = file if source == "file" else source
    with pytest.raises(ValueError, match="unknown split 'valid' in windows; the splits are train"):
        load_text(source, tokenizer, windows={"valid": 3})


@pytest.mark.parametrize("source", ["storyworld", "file"])
@pytest.mark.parametrize("count", [0, -1])
def test_a_split_needs_a_window(tokenizer, file, source, count):
    source = file if source == "file" else source
    with pytest.raises(ValueError, match=rf"windows\['train'\] is {count}; it must be at least 1"):
        load_text(source, tokenizer, length=16, windows={"train": count})


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_window_needs_two_tokens(tokenizer, length):
    with pytest.raises(ValueError, match=f"length is {length}; a window needs at least 2 tokens"):
        load_text("storyworld", tokenizer, length=length)


def test_mappings_need_train_and_test_and_nothing_unknown(tokenizer, file):
    with pytest.raises(ValueError, match="no 'test' split"):
        load_text({"train": file}, tokenizer)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        load_text({"train": file, "test": file, "dev": file}, tokenizer)
    with pytest.raises(ValueError, match=r"cannot read the text file .*no\.txt"):
        load_text({"train": file, "test": file.with_name("no.txt")}, tokenizer)
    with pytest.raises(ValueError, match="cannot read the text file"):
        load_text({"train": file, "test": file.parent}, tokenizer)


# --- texts of the Hub, without a Hub --------------------------------------------------------------


def test_the_papers_train_on_one_text_and_test_on_another(tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, split, **recipe):
        asked.append((path, split))
        return {"text": LINES * 100 if path == "allenai/c4" else LINES[::-1]}

    monkeypatch.setattr(module, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = load_text("c4-wikitext2", tokenizer, length=4)
    assert asked == [("allenai/c4", "train"), ("Salesforce/wikitext", "test")]
    assert text.train.tolist() == cut(tokenizer, LINES * 100, 4)[:4096]
    assert len(text.calibration) == 128
    # Of WikiText-2 the whole test split, of C4 none of the test split.
    assert text.test.tolist() == cut(tokenizer, LINES[::-1], 4)
    assert text.protocol.startswith("c4-wikitext2, test split, ")


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_hub_texts_are_loaded_by_their_recipe(tokenizer, monkeypatch, name):
    import datasets

    asked = []

    def load_dataset(**recipe):
        asked.append(recipe)
        return {"text": LINES if recipe["split"] == "train" else LINES[::-1]}

    monkeypatch.setattr(module, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = load_text(name, tokenizer, length=32)
    assert text.name == name
    assert text.train.tolist() == cut(tokenizer, LINES[:180], 32)
    assert text.calibration.tolist() == cut(tokenizer, LINES[180:], 32)
    assert text.test.tolist() == cut(tokenizer, LINES[::-1], 32)
    assert [recipe.pop("split") for recipe in asked] == ["train", "test"]
    if name == "wikitext2":
        assert asked == [{"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}] * 2
    else:
        assert asked[0]["path"] == "allenai/c4"
        assert set(asked[0]["data_files"]) == {"train", "test"}


def test_a_crawl_of_the_web_is_not_tokenised_whole(tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(module, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda **recipe: {"text": LINES * 100})
    text = load_text("c4", tokenizer, length=4)
    assert [len(getattr(text, split)) for split in SPLITS] == [4096, 128, 256]
    assert text.test.tolist() == cut(tokenizer, LINES * 2, 4)[:256]
    capped = load_text("c4", tokenizer, length=4, windows={"train": 9, "test": 5000})
    assert [len(getattr(capped, split)) for split in SPLITS] == [9, 128, 5000]


def test_other_errors_of_the_dataset_client_are_passed_on(tokenizer, monkeypatch):
    import datasets

    def load_dataset(**recipe):
        raise ValueError("no such builder")

    monkeypatch.setattr(module, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="cannot load the text 'c4': no such builder"):
        load_text("c4", tokenizer)


# --- windows that do not fit a model ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 1), (2, 2, 4)])
def test_windows_of_another_shape_are_refused(make_model, shape):
    with pytest.raises(ValueError, match=r"windows have shape .*; want \[windows, length >= 2\]"):
        check_windows(make_model("opt"), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("token", [64, -1])
def test_tokens_of_another_vocabulary_are_refused(make_model, token):
    windows = torch.zeros(2, 4, dtype=torch.int64)
    windows[1, 3] = token
    with pytest.raises(ValueError, match=f"{token} .*vocabulary has 64 tokens.*another model's tokenizer"):
        check_windows(make_model("opt"), windows)


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_windows_beyond_the_context_are_refused(make_model, architecture):
    model = make_model(architecture)
    check_windows(model, torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="windows of 17 tokens exceed the model's context of 16"):
        check_windows(model, torch.zeros(2, 17, dtype=torch.int64))


def test_a_model_without_positions_has_no_longest_window(make_model):
    check_windows(make_model("bloom"), torch.zeros(2, 4096, dtype=torch.int64))


def test_a_whole_text_is_no_windows(make_model, text):
    with pytest.raises(ValueError, match=r"whole text; give one split of it, such as text\.test"):
        check_windows(make_model("opt"), text)


def test_text_is_immutable(text):
    with pytest.raises(AttributeError):
        text.floor = 1.0
    assert isinstance(text, Text)
