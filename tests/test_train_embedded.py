"""The recipe of the embedded model can be followed again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from perpkit.sources.embedded import data_folder

TOOL = Path(__file__).parents[1] / "tools" / "train_embedded.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_embedded", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_tokenizer_comes_out_as_it_is_shipped(tool, tmp_path):
    tool.train_tokenizer().save_pretrained(tmp_path)
    shipped = json.loads(data_folder("models", "tiny-opt", "tokenizer.json").read_text())
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"] == shipped["model"]


@pytest.mark.slow
def test_the_same_seed_trains_the_same_model_through_every_phase(tool, monkeypatch):
    for name, steps in {"COPY_STEPS": 2, "MIX_STEPS": 2, "STORY_STEPS": 4}.items():
        monkeypatch.setattr(tool, name, steps)
    first, _ = tool.train(0, [])
    again, _ = tool.train(0, [])
    other, _ = tool.train(1, [])
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_two_heads_start_by_matching_positions_one_and_two_apart(tool):
    torch.manual_seed(0)
    model = tool.fresh_model()
    # Positions alone: the embeddings of the tokens disturb the match until training has sorted it out.
    model.model.decoder.embed_tokens.weight.data.zero_()
    model.set_attn_implementation("eager")
    tokens = torch.randint(2, tool.VOCABULARY, (2, 32))
    with torch.no_grad():
        attention = model(tokens, output_attentions=True).attentions[0]
    for head in range(2):
        looked_at = attention[:, head, 4:].argmax(-1)
        distance = torch.arange(4, 32) - looked_at
        assert (distance == head + 1).float().mean() > 0.9


def test_copying_windows_repeat_with_a_short_period(tool):
    generator = torch.Generator().manual_seed(0)
    windows = tool.copying_windows(8, torch.arange(100, 600), generator)
    assert windows.shape == (8, tool.CONTEXT)
    for window in windows:
        assert any(torch.equal(window[period:], window[:-period]) for period in range(5, 20))


def test_the_rates_rise_then_fall_to_zero_and_copying_fades_out(tool):
    last = tool.COPY_STEPS + tool.STORY_STEPS - 1
    assert tool.learning_rate(0) == pytest.approx(tool.COPY_RATE / 100)
    assert tool.learning_rate(tool.COPY_STEPS + 99) == pytest.approx(tool.STORY_RATE, rel=1e-2)
    assert tool.learning_rate(last) < 1e-3 * tool.STORY_RATE
    assert tool.copied_share(tool.COPY_STEPS) == tool.BATCH // 2
    assert tool.copied_share(tool.COPY_STEPS + tool.MIX_STEPS) == 0
