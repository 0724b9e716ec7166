"""What a language model says next: its likeliest tokens, and its continuation of a prompt."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unknown_characters(tokenizer, text: str) -> list[str]:
    """The different characters of a text that no token of the vocabulary shows, in their order.

    A tokenizer over bytes still spells them, byte by byte; a model that was not trained on them reads noise.
    White space is never among them.

    >>> import perpkit as pk
    >>> _, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> unknown_characters(tokenizer, "It is a ☃ and a Ü, a ☃.")
    ['☃', 'Ü']
    """
    return [c for c in dict.fromkeys(text) if not c.isspace() and not _shown(tokenizer, c)]


def _shown(tokenizer, character: str) -> bool:
    ids = tokenizer(character, add_special_tokens=False, verbose=False).input_ids
    # Some tokenizers turn all letters into small ones.
    wanted = character.casefold()
    return any(wanted in tokenizer.decode([i], skip_special_tokens=False).casefold() for i in ids)


@torch.no_grad()
def next_tokens(model: "PreTrainedModel", tokenizer, prompt: str, *, count: int = 5) -> pd.DataFrame:
    """The `count` likeliest next tokens after a prompt: columns `token` (its text) and `probability`.

    The model's mode is left as it was.

    Raises ValueError for an empty prompt, one that is longer than the model's context and one with characters
    that the tokenizer loses.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> table = next_tokens(model, tokenizer, "It is a", count=3)
    >>> table["token"].tolist(), bool(table["probability"].is_monotonic_decreasing)
    ([' Monday', ' Friday', ' Saturday'], True)
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    ids = _prompt(model, tokenizer, prompt)
    with _Evaluating(model):
        logits = _next_logits(model, ids, None)[0]
    best = logits[: len(tokenizer)].softmax(0).topk(min(count, len(tokenizer)))
    tokens = [_decoded(tokenizer, [*ids, i])[len(_decoded(tokenizer, ids)) :] for i in best.indices.tolist()]
    return pd.DataFrame({"token": tokens, "probability": best.values.tolist()})


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    tokenizer,
    prompt: str,
    *,
    tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> str:
    """Continue a prompt by up to `tokens` tokens and return the continuation.

    At temperature 0 every token is the likeliest one; above, it is drawn from the probabilities, sharper
    below 1 and flatter above, by the `seed`: the same noise for every model, so that two models that agree
    say the same. It ends early at the model's end-of-text token and where its context is full. After each
    token `on_token` is given the continuation so far; `cancelled()`, asked before each, ends it. The model's
    mode is left as it was.

    Raises ValueError for a bad number, an empty prompt, one that leaves no room in the model's context and
    one with characters that the tokenizer loses.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> generate(model, tokenizer, "It is", tokens=3).startswith(" a")
    True
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it is 0, always the likeliest token, or positive")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    ids = _prompt(model, tokenizer, prompt, room=1)
    context = _context(model)
    last = len(ids) + tokens if context is None else min(len(ids) + tokens, context)
    begun, past, said = _decoded(tokenizer, ids), None, ""
    fresh = list(ids)
    noise = torch.Generator().manual_seed(seed)
    with _Evaluating(model):
        while len(ids) < last and not (cancelled is not None and cancelled()):
            logits, past = _next_logits(model, fresh, past)
            # A vocabulary may be padded with tokens that mean nothing.
            chosen = _choose(logits[: len(tokenizer)], temperature, noise)
            if chosen == tokenizer.eos_token_id:
                break
            ids.append(chosen)
            fresh = [chosen]
            said = _decoded(tokenizer, ids)[len(begun) :]
            if on_token is not None:
                on_token(said)
    return said


def room_after(model: Any, tokenizer, prompt: str, *, least: int = 0) -> float:
    """How many tokens fit into the model's context after a prompt; infinite where it has no limit.

    Raises ValueError for a prompt that leaves less than the `least`, and as `generate` does.

    >>> import perpkit as pk
    >>> room_after(*pk.load_model("tiny-opt", device="cpu"), "It is")
    126
    """
    ids, context = _prompt(model, tokenizer, prompt, least), _context(model)
    return float("inf") if context is None else context - len(ids)


def _prompt(model: "PreTrainedModel", tokenizer, prompt: str, room: int = 0) -> list[int]:
    """The tokens of a prompt, with room for more in the model's context."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; write how the text begins")
    if lost := _lost(tokenizer, prompt):
        raise ValueError(f"the tokenizer has no way to write {_quoted(lost)}; leave them out of the prompt")
    ids = tokenizer(prompt, verbose=False).input_ids
    context = _context(model)
    if context is not None and len(ids) + room > context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens but the model's context is {context}"
            + (f", which leaves no room for {room} more" if room else "")
            + "; shorten it"
        )
    return ids


def _lost(tokenizer, prompt: str) -> list[str]:
    """The characters that the tokenizer cannot even spell."""
    lost = []
    for character in unknown_characters(tokenizer, prompt):
        ids = tokenizer(character, add_special_tokens=False, verbose=False).input_ids
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        if tokenizer.unk_token_id in ids or character.casefold() not in whole.casefold():
            lost.append(character)
    return lost


def _quoted(characters: list[str]) -> str:
    return ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters)


def _context(model: "PreTrainedModel") -> int | None:
    """How many tokens the model can read; None where there is no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _next_logits(model: "PreTrainedModel", fresh: list[int], past):
    """The logits of the next token, float64 on the CPU, and what the model remembers."""
    tokens = torch.tensor([fresh], device=next(model.parameters()).device)
    output = model(input_ids=tokens, past_key_values=past, use_cache=True)
    logits = output.logits[0, -1].float().cpu().double()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's predictions are not finite: its weights or its 16 bits have overflowed")
    return logits, output.past_key_values


def _choose(logits: torch.Tensor, temperature: float, noise: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # Gumbel's way to draw: for one noise, close probabilities give the same token.
    uniform = torch.rand(len(logits), generator=noise, dtype=torch.float64).clamp_min(1e-300)
    return int((logits / temperature - (-uniform.log()).log()).argmax())


class _Evaluating:
    """Inside, the model evaluates; afterwards its modes are as before."""

    def __init__(self, model: torch.nn.Module):
        self._model = model

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()

    def __exit__(self, *_) -> None:
        for module, mode in self._modes:
            module.training = mode
