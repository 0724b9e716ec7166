"""Measure pruning and retraining of a real pretrained model on real text.

    python tools/measure_real.py FOLDER

FOLDER holds models/stories260K (a Llama trained on TinyStories), tinystories/stories_1000.jsonl and
the two files of wikitext2. Magnitude pruning, then each subset retrained for 100 steps of 8 windows on 800
stories, the rate chosen once by the calibration stories at 50 %; perplexity on stories that were held apart
and on WikiText-2. The rows go to data/results/stories260K.csv. Llama has no biases, so there is no such row.
"""

import argparse
import copy
from pathlib import Path

import pandas as pd
import torch

import perpkit as pk

LENGTH = 256
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
SUBSETS = ("norms", "head", "full")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Every row is measured on the first 400 windows; the dense model once more on all of them.
WIKITEXT_WINDOWS = 400


def first_tokens_perplexity(model, tokenizer, stories: list[str]) -> float:
    """Perplexity on the first 256 tokens of each story, read on its own."""
    total, count = 0.0, 0
    for story in stories:
        ids = torch.tensor([tokenizer(story, verbose=False).input_ids[:LENGTH]])
        predicted = ids.shape[1] - 1
        total += predicted * torch.tensor(pk.perplexity(model, ids)).log().item()
        count += predicted
    return float(torch.tensor(total / count).exp())


def retrained(dense, sparsity: float, subset: str, lr: float, seed: int, windows: torch.Tensor):
    """A pruned and retrained copy, and the share of its parameters that was trained."""
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=sparsity)
    if subset == "none":
        return model, 0.0
    if subset == "head":
        pk.untie_head(model)
    pk.retrain(model, windows, masks=masks, subset=subset, lr=lr, steps=100, seed=seed, progress=False)
    masks.check(model)
    return model, pk.trainable_share(model, subset)


def best_rate(dense, subset: str, stories: pk.Text) -> float:
    """The rate that leads to the lowest perplexity on the calibration stories at 50 % sparsity."""
    reached: dict[float, float] = {}
    for rate in RATES:
        model, _ = retrained(dense, 0.5, subset, rate, 0, stories.train)
        reached[rate] = pk.perplexity(model, stories.calibration)
    return min(reached, key=reached.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/results/stories260K.csv"))
    options = parser.parse_args()
    dense, tokenizer = pk.load_model(options.folder / "models/stories260K", device="cpu")
    stories_file = options.folder / "tinystories/stories_1000.jsonl"
    stories = pk.load_text(stories_file, tokenizer, length=LENGTH)
    files = {"train": "wikitext2/train_excerpt_1000.txt", "test": "wikitext2/wiki.test.raw"}
    wikitext = pk.load_text(
        {split: options.folder / file for split, file in files.items()}, tokenizer, length=LENGTH
    )

    first = pd.read_json(stories_file, lines=True)["text"][:200].tolist()
    print(f"first 256 tokens of 200 stories: {first_tokens_perplexity(dense, tokenizer, first):.3f}")
    for windows in (50, WIKITEXT_WINDOWS, len(wikitext.test)):
        reached = pk.perplexity(dense, wikitext.test[:windows])
        print(f"WikiText-2 test, first {windows} windows of {LENGTH}: {reached:.2f}")

    def measured(model) -> dict:
        return {
            "tinystories_perplexity": pk.perplexity(model, stories.test),
            "wikitext2_perplexity": pk.perplexity(model, wikitext.test[:WIKITEXT_WINDOWS]),
        }

    rows: list[dict] = [{"sparsity": 0.0, "retrain": "dense", **measured(dense)}]
    rates = {"none": 0.0} | {subset: best_rate(dense, subset, stories) for subset in SUBSETS}
    for sparsity in SPARSITIES:
        for subset, lr in rates.items():
            for seed in range(1 if subset == "none" else 3):
                model, share = retrained(dense, sparsity, subset, lr, seed, stories.train)
                inputs = {"sparsity": sparsity, "retrain": subset, "seed": seed, "lr": lr}
                rows.append({**inputs, "trainable_share": share, **measured(model)})
                print(rows[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
