"""Measure what magnitude pruning does to the embedded models: perplexity and each ability by sparsity.

    python tools/measure_embedded.py

The rows go to data/results/tiny_opt_abilities.csv.
"""

import copy
from pathlib import Path

import pandas as pd

import perpkit as pk

SPARSITIES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)
OUT = Path("data/results/tiny_opt_abilities.csv")


def main() -> None:
    rows = []
    for name in ("tiny-opt", "tiny-opt-outliers"):
        dense, tokenizer = pk.load_model(name, device="cpu")
        text = pk.load_text("storyworld", tokenizer)
        for sparsity in SPARSITIES:
            model = copy.deepcopy(dense)
            pk.prune(model, "magnitude", sparsity=sparsity)
            row = {"model": name, "sparsity": sparsity, "perplexity": pk.perplexity(model, text.test)}
            if name == "tiny-opt":
                accuracy = pk.zero_shot(model, tokenizer)
                row |= dict(zip(accuracy.task, accuracy.accuracy, strict=True))
            rows.append(row)
            print(row, flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(OUT, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
