"""Next tokens and continuations against slow loops without a cache."""

import itertools
import math

import pytest
import torch
from conftest import CONTEXT, VOCABULARY

from perpkit.evaluation.generation import generate, next_tokens, unknown_characters

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456"


@pytest.fixture(scope="session")
def letters():
    """A tokenizer with a token for each of 59 letters, one for unknown ones and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<end>": 1, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")


def slow_logits(model, ids: list[int], count: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1, :count].double()


# --- next tokens ----------------------------------------------------------------------------------


def test_next_tokens_are_the_likeliest(make_model, letters):
    model = make_model("llama")
    table = next_tokens(model, letters, "abc", count=7)
    logits = slow_logits(model, letters("abc").input_ids, len(letters))
    wanted = logits.exp() / logits.exp().sum()
    order = sorted(range(len(letters)), key=lambda i: -wanted[i])[:7]
    assert table["probability"].tolist() == pytest.approx([float(wanted[i]) for i in order], rel=1e-5)
    assert table["token"].tolist() == [letters.decode([i], skip_special_tokens=True) for i in order]


def test_all_next_tokens_make_one(tiny_opt, tokenizer):
    table = next_tokens(tiny_opt, tokenizer, "It is a", count=10_000)
    assert len(table) == len(tokenizer) == 1024
    assert table["probability"].sum() == pytest.approx(1)


def test_what_the_padding_of_a_vocabulary_predicts_does_not_count(make_model, letters):
    assert len(letters) < VOCABULARY
    model = make_model("llama")
    model.lm_head.weight.data[len(letters) :] *= 100
    assert next_tokens(model, letters, "abc", count=100)["probability"].sum() == pytest.approx(1)
    assert len(generate(model, letters, "abc", tokens=5)) <= 5


# --- continuations --------------------------------------------------------------------------------


def test_greedy_continuations_of_every_architecture(any_model, letters):
    ids = letters("abcd").input_ids
    for _ in range(8):
        best = int(slow_logits(any_model, ids, len(letters)).argmax())
        if best == letters.eos_token_id:
            break
        ids.append(best)
    said = generate(any_model, letters, "abcd", tokens=8)
    assert said == letters.decode(ids[4:], skip_special_tokens=True)


def test_a_continuation_is_text_of_the_language(tiny_opt, tokenizer):
    prompt = "It is a"
    said = generate(tiny_opt, tokenizer, prompt, tokens=12)
    short = generate(tiny_opt, tokenizer, prompt, tokens=6)
    assert said.startswith(" ")
    assert said.startswith(short)
    assert len(said) > len(short)
    assert said.startswith(next_tokens(tiny_opt, tokenizer, prompt, count=1)["token"][0])


def test_drawn_tokens_follow_the_probabilities(make_model, letters):
    model = make_model("llama")
    draws = [generate(model, letters, "ab", tokens=1, temperature=0.5, seed=seed) for seed in range(400)]
    logits = slow_logits(model, letters("ab").input_ids, len(letters)) / 0.5
    wanted = logits.softmax(0)
    for i in wanted.topk(4).indices.tolist():
        share = draws.count(letters.decode([i], skip_special_tokens=True)) / len(draws)
        deviation = math.sqrt(float(wanted[i] * (1 - wanted[i])) / len(draws))
        assert abs(share - float(wanted[i])) < 4 * deviation


def test_a_seed_is_a_text(tiny_opt, tokenizer, generators_unchanged):
    def drawn(seed: int, temperature: float = 1.0) -> str:
        return generate(tiny_opt, tokenizer, "It is a", tokens=20, temperature=temperature, seed=seed)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(5)}) > 1
    assert drawn(1, 1e-6) == drawn(2, 0.0)


def test_models_that_agree_say_the_same(make_model, letters):
    one, two = make_model("opt"), make_model("opt")
    two.model.decoder.final_layer_norm.bias.data += 1e-6
    texts = [generate(m, letters, "ab", tokens=10, temperature=1.0, seed=4) for m in (one, two)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 3


def test_it_ends_where_the_context_is_full(make_model, letters):
    steps = []
    generate(make_model("opt"), letters, "a" * (CONTEXT - 3), tokens=50, on_token=steps.append)
    assert len(steps) == 3


def test_it_ends_at_the_end_of_the_text(make_model, letters, monkeypatch):
    model = make_model("llama")
    whole = generate(model, letters, "abc", tokens=8)
    second = letters(whole).input_ids[1]
    monkeypatch.setattr(
        letters, "_special_tokens_map", {**letters._special_tokens_map, "eos_token": whole[1]}
    )
    assert letters.eos_token_id == second
    assert len(generate(model, letters, "abc", tokens=8)) == 1


def test_each_token_is_told_and_a_cancel_ends_it(tiny_opt, tokenizer):
    told, asked = [], []
    whole = generate(tiny_opt, tokenizer, "It is a", tokens=9, on_token=told.append)
    assert len(told) == 9
    assert told[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(told))

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 4

    assert generate(tiny_opt, tokenizer, "It is a", tokens=9, cancelled=cancelled) == told[3]


def test_the_model_is_left_as_it_was(make_model, letters, generators_unchanged):
    model = make_model("opt", dropout=0.5)
    model.train()
    assert generate(model, letters, "abc", tokens=6) == generate(model, letters, "abc", tokens=6)
    next_tokens(model, letters, "abc")
    assert all(module.training for module in model.modules())


# --- characters and bad input ---------------------------------------------------------------------


def test_unknown_characters_by_bytes(tokenizer):
    assert unknown_characters(tokenizer, "It is a cold Monday.\n\tÉa ☃, ☃ 你 a") == ["É", "☃", "你"]
    assert unknown_characters(tokenizer, "") == []


def test_unknown_characters_by_letters(letters):
    assert unknown_characters(letters, "a?b c!?") == ["?", "!"]


def test_bytes_are_read_all_the_same(tiny_opt, tokenizer):
    assert len(next_tokens(tiny_opt, tokenizer, "☃")) == 5
    assert generate(tiny_opt, tokenizer, "☃", tokens=3)


def test_what_the_tokenizer_loses_is_refused_by_name(make_model, letters):
    for call in (next_tokens, generate):
        with pytest.raises(ValueError, match=r"no way to write '\?' \(U\+003F\), '☃' \(U\+2603\)"):
            call(make_model("llama"), letters, "a?b☃?")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(tiny_opt, tokenizer, prompt):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(tiny_opt, tokenizer, prompt)
    with pytest.raises(ValueError, match="the prompt is empty"):
        next_tokens(tiny_opt, tokenizer, prompt)


def test_a_prompt_must_leave_room(make_model, letters):
    model = make_model("llama")
    assert len(next_tokens(model, letters, "a" * CONTEXT)) == 5
    with pytest.raises(ValueError, match="17 tokens but the model's context is 16; shorten"):
        next_tokens(model, letters, "a" * 17)
    with pytest.raises(ValueError, match="which leaves no room for 1 more"):
        generate(model, letters, "a" * 16)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_numbers(tiny_opt, tokenizer, setting, said):
    with pytest.raises(ValueError, match=said):
        generate(tiny_opt, tokenizer, "It", **setting)


def test_no_next_token_is_refused(tiny_opt, tokenizer):
    with pytest.raises(ValueError, match="count is 0"):
        next_tokens(tiny_opt, tokenizer, "It", count=0)


def test_predictions_that_are_not_finite_are_an_error(tiny_opt, tokenizer):
    tiny_opt.model.decoder.final_layer_norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="predictions are not finite"):
        generate(tiny_opt, tokenizer, "It", tokens=2)
