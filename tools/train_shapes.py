"""Train the embedded classifier shapes-resnet from nothing: weights, log and final numbers.

    python tools/train_shapes.py --seed 0 --out data/models/shapes-resnet

About five minutes on two cores. The training is that of the papers' networks for CIFAR-10: SGD with momentum
and weight decay, crops and flips, and a rate that falls linearly, here from epoch to epoch.
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file

from perpkit.evaluation.accuracy import accuracy, corrupted_accuracy
from perpkit.pruning.masks import Masks
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.schedules import linear_decay
from perpkit.sources.augment import crop_and_flip
from perpkit.sources.classifiers import load_classifier
from perpkit.sources.images import Images, load_images
from perpkit.sources.resnet import CifarResNet

DEPTH = 20
EPOCHS, BATCH = 25, 64
LARGEST_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


def factor(step: int, steps: int) -> float:
    """The factor of the largest rate η₁: constant in an epoch; 1/T in the last, where the rate is η_T."""
    return linear_decay(step * EPOCHS // steps / EPOCHS)


def train(images: Images, seed: int) -> tuple[CifarResNet, pd.DataFrame]:
    """The trained network and the log: a line for each epoch with its rate and mean loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CifarResNet(DEPTH, len(images.classes))
    per_epoch = len(images.train[0]) // BATCH
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if step % per_epoch == 0:
            print(f"epoch {step // per_epoch}: {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)

    history = retrain(
        model,
        images.train,
        masks=Masks({}),
        subset="full",
        steps=EPOCHS * per_epoch,
        lr=LARGEST_RATE,
        schedule=factor,
        optimizer="sgd",
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        batch=BATCH,
        augment=crop_and_flip,
        seed=seed,
        progress=False,
        on_step=report,
    )
    history["epoch"] = (history.step - 1) // per_epoch + 1
    log = history.groupby("epoch").agg(steps=("step", "max"), rate=("lr", "last"), loss=("loss", "mean"))
    return model.eval(), log.reset_index()


def measure(folder: Path, images: Images) -> dict:
    """Everything that is said of the model, measured on the file as it is loaded."""
    model = load_classifier(folder / "model.safetensors", device="cpu")
    corrupted = corrupted_accuracy(model, images)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "protocol": images.protocol,
        "train_accuracy": round(accuracy(model, images.train), 4),
        "validation_accuracy": round(accuracy(model, images.validation), 4),
        "test_accuracy": round(accuracy(model, images.test), 4),
        "corrupted_test_accuracy": round(corrupted.accuracy.mean(), 4),
        "corrupted": {kind: some.accuracy.round(4).tolist() for kind, some in corrupted.groupby("kind")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/models/shapes-resnet"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help="keep the weights, measure them again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load_images("shapes")
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.measure:
        model, log = train(images, options.seed)
        save_file(model.state_dict(), options.out / "model.safetensors")
        (options.out / "model.safetensors").chmod(0o644)
        log.to_csv(options.out / "training_log.csv", index=False, float_format="%.6g")
    log = pd.read_csv(options.out / "training_log.csv")
    recipe = {
        "command": f"python tools/train_shapes.py --seed {options.seed}",
        "seed": options.seed,
        "torch": torch.__version__,
        "training": {
            "pictures": len(images.train[0]),
            "epochs": EPOCHS,
            "steps": int(log.steps.iloc[-1]),
            "batch": BATCH,
            "optimizer": "sgd",
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "augment": "crop_and_flip",
            "schedule": "linear_decay, from epoch to epoch",
            "largest_rate": LARGEST_RATE,
            "last_rate": round(LARGEST_RATE / EPOCHS, 8),
            "final_loss": float(log.loss.iloc[-1]),
        },
        "measured": measure(options.out, images),
    }
    (options.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
