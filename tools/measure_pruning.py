"""Measure every pruning criterion on a real pretrained model and on the embedded ones.

    python tools/measure_pruning.py FOLDER

FOLDER holds models/stories260K (a Llama trained on TinyStories) and tinystories/stories_1000.jsonl. Each
criterion prunes to 30, 50, 60 and 70 %, to 2:4 and to 4:8 (stories260K has a width of 172, which 8 does not
divide: no 4:8), calibrated on stories that are used for nothing
else; perplexity is measured on stories held apart from those. Random pruning: the mean of three seeds. The
rows go to data/results/pruning_criteria.csv.
"""

import argparse
import copy
import time
from pathlib import Path

import pandas as pd
import torch

import perpkit as pk
from perpkit.pruning.prune import CRITERIA

LENGTH = 256
TARGETS: tuple[dict, ...] = (
    *({"sparsity": sparsity} for sparsity in (0.3, 0.5, 0.6, 0.7)),
    {"pattern": "2:4"},
    {"pattern": "4:8"},
)


def measured(dense, text: pk.Text, criterion: str, target: dict) -> dict:
    """Perplexity after pruning, and the seconds that the pruning took."""
    reached, seconds = [], []
    for seed in range(3 if criterion == "random" else 1):
        model = copy.deepcopy(dense)
        started = time.perf_counter()
        masks = pk.prune(model, criterion, calibration=text.calibration, seed=seed, progress=False, **target)
        seconds.append(time.perf_counter() - started)
        masks.check(model)
        reached.append(pk.perplexity(model, text.test))
    return {"perplexity": sum(reached) / len(reached), "seconds": sum(seconds) / len(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/results/pruning_criteria.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in ("stories260K", "tiny-opt", "tiny-opt-outliers"):
        real = name == "stories260K"
        dense, tokenizer = pk.load_model(options.folder / "models" / name if real else name, device="cpu")
        source = options.folder / "tinystories/stories_1000.jsonl" if real else "storyworld"
        text = pk.load_text(source, tokenizer, length=LENGTH if real else None)
        reached = pk.perplexity(dense, text.test)
        windows, calibration = len(text.test), len(text.calibration)
        print(
            f"{name}: {text.protocol}, calibrated on {calibration} windows, dense {reached:.3f}", flush=True
        )
        protocol = {"model": name, "windows": windows, "calibration_windows": calibration}
        rows.append({**protocol, "criterion": "dense", "target": "0%", "perplexity": reached})
        for criterion in CRITERIA:
            for target in TARGETS:
                if real and target.get("pattern") == "4:8":
                    continue
                label = target.get("pattern") or f"{target['sparsity']:.0%}"
                row = measured(dense, text, criterion, target)
                rows.append({**protocol, "criterion": criterion, "target": label, **row})
                print(
                    f"  {criterion:10} {label:4} {row['perplexity']:10.3f} {row['seconds']:6.2f} s",
                    flush=True,
                )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
