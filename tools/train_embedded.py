"""Train the embedded model tiny-opt from nothing: tokenizer, weights, log and final numbers.

    python tools/train_embedded.py --seed 0 --out data/models/tiny-opt

About fifteen minutes on one core. Two things were done to make recall learnable for so small a model: the
positions start as sinusoids, with two heads of the first layer made to match positions one and two apart; and
the first steps are spent on copying random sequences, before any story.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from perpkit.evaluation.perplexity import perplexity
from perpkit.evaluation.zero_shot import zero_shot
from perpkit.pruning.prune import prune
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.subsets import SUBSETS
from perpkit.sources.models import load_model
from perpkit.sources.storyworld import stories
from perpkit.sources.text import load_text

CONTEXT = 128
VOCABULARY = 1024
WIDTH, LAYERS, HEADS = 56, 3, 4
BATCH, COPY_BATCH = 8, 16
COPY_STEPS, MIX_STEPS, STORY_STEPS = 2_000, 2_000, 12_000
COPY_RATE, STORY_RATE = 2e-3, 4e-3
RATES = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.2, 0.4)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1024 tokens, from 20,000 stories."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((story.text + "\n\n" for story in islice(stories("train"), 20_000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=CONTEXT,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def fresh_model() -> OPTForCausalLM:
    """The untrained model, two heads of its first layer prepared for looking back."""
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=4 * WIDTH,
            max_position_embeddings=CONTEXT,
            word_embed_proj_dim=WIDTH,
            init_std=0.08,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: OPTForCausalLM, scale: float = 0.1, sharpness: float = 6.0) -> None:
    """Start positions as sinusoids; head h of the first layer matches positions h + 1 apart, h = 0, 1.

    Shifting a sinusoid is a rotation of its sine and cosine, so query and key projections that differ by
    that rotation agree most at the wanted distance. The tokens' embeddings disturb this at first (a token
    agrees with itself), so it is a head start and not yet a head that looks back.
    """
    decoder = model.model.decoder
    decoder.embed_tokens.weight.normal_(0, scale)
    half, size = WIDTH // 2, WIDTH // HEADS
    frequency = torch.exp(-math.log(200) * torch.arange(half) / half)
    angle = torch.arange(decoder.embed_positions.weight.shape[0])[:, None] * frequency
    decoder.embed_positions.weight.copy_(scale * torch.cat([angle.sin(), angle.cos()], 1))
    attention = decoder.layers[0].self_attn
    for head in range(2):
        key, query = torch.zeros(size, WIDTH), torch.zeros(size, WIDTH)
        for i in range(size // 2):
            cosine, sine = math.cos((head + 1) * frequency[i]), math.sin((head + 1) * frequency[i])
            key[2 * i, i] = key[2 * i + 1, half + i] = 1
            query[2 * i, i], query[2 * i, half + i] = cosine, -sine
            query[2 * i + 1, i], query[2 * i + 1, half + i] = sine, cosine
        rows = slice(head * size, (head + 1) * size)
        attention.k_proj.weight[rows], attention.q_proj.weight[rows] = sharpness * key, sharpness * query


def copying_windows(count: int, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Windows `[count, 128]`, each a random sequence of 5 to 19 tokens again and again."""
    windows = []
    for _ in range(count):
        period = int(torch.randint(5, 20, (1,), generator=generator))
        sequence = tokens[torch.randint(len(tokens), (period,), generator=generator)]
        windows.append(sequence.repeat(CONTEXT // period + 1)[:CONTEXT])
    return torch.stack(windows)


def story_windows(tokenizer, seed: int) -> Iterator[torch.Tensor]:
    """Windows of the training stories without end, one after the other."""
    told = stories("train", seed)
    ids: list[int] = []
    while True:
        while len(ids) < CONTEXT:
            ids += tokenizer("".join(s.text + "\n\n" for s in islice(told, 2000)), verbose=False).input_ids
        for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
            yield torch.tensor(ids[start : start + CONTEXT])
        ids = ids[len(ids) - len(ids) % CONTEXT :]


def train(seed: int, log: list[dict]) -> tuple[OPTForCausalLM, PreTrainedTokenizerFast]:
    """Train from nothing; every thousand steps a line in the log."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_tokenizer()
    text = load_text("storyworld", tokenizer)
    model = fresh_model()
    used = torch.unique(text.train)
    told = story_windows(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    started = time.perf_counter()
    for step in range(COPY_STEPS + STORY_STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        # Nothing but copying at first, then less and less of it among the stories.
        copies = COPY_BATCH if step < COPY_STEPS else copied_share(step)
        kept = [] if step < COPY_STEPS else [next(told) for _ in range(BATCH - copies)]
        tokens = torch.stack([*kept, *copying_windows(copies, used, generator)] if copies else kept)
        logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 1000 == 0:
            seconds = round(time.perf_counter() - started)
            reached = perplexity(model, text.test)
            log.append({"step": step + 1, "loss": loss.item(), "perplexity": reached, "seconds": seconds})
            print(log[-1], flush=True)
    return model, tokenizer


def learning_rate(step: int) -> float:
    """Constant for copying, a cosine to zero for the stories, each after 100 steps of warm-up."""
    if step < COPY_STEPS:
        return COPY_RATE * min(1.0, (step + 1) / 100)
    step -= COPY_STEPS
    return STORY_RATE * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / STORY_STEPS)))


def copied_share(step: int) -> int:
    """How many of the eight windows of a story batch are still for copying."""
    left = 1 - (step - COPY_STEPS) / MIX_STEPS
    return max(1, round(BATCH / 2 * left)) if left > 0 else 0


def measure(folder: Path) -> dict:
    """Everything that is said of the model, measured on the files as they are loaded."""
    model, tokenizer = load_model(folder)
    text = load_text("storyworld", tokenizer)
    accuracy = zero_shot(model, tokenizer)
    pruned = {}
    for sparsity in (0.3, 0.4, 0.5, 0.6, 0.7):
        copied = copy.deepcopy(model)
        prune(copied, "magnitude", sparsity=sparsity)
        pruned[str(sparsity)] = round(perplexity(copied, text.test), 3)
    return {
        "parameters": model.num_parameters(),
        "protocol": text.protocol,
        "floor": round(text.floor or math.nan, 4),
        "perplexity": round(perplexity(model, text.test), 4),
        "accuracy": dict(zip(accuracy.task, accuracy.accuracy.round(3), strict=True)),
        "magnitude": pruned,
    }


def search_rates(folder: Path) -> dict[str, float]:
    """The learning rate of each subset with the lowest perplexity on the calibration stories,
    after 100 steps at 60 % magnitude."""
    model, tokenizer = load_model(folder)
    text = load_text("storyworld", tokenizer)
    best = {}
    for subset in SUBSETS:
        reached = {}
        for lr in RATES:
            copied = copy.deepcopy(model)
            masks = prune(copied, "magnitude", sparsity=0.6)
            try:
                retrain(copied, text.train, masks=masks, subset=subset, lr=lr, progress=False)
            except ValueError:
                continue
            reached[lr] = perplexity(copied, text.calibration)
        best[subset] = min(reached, key=reached.__getitem__)
        print(subset, {lr: round(value, 3) for lr, value in reached.items()}, flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/models/tiny-opt"))
    parser.add_argument("--measure", action="store_true", help="keep the weights, measure them again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.measure:
        log: list[dict] = []
        model, tokenizer = train(options.seed, log)
        model.half().save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        for file in options.out.iterdir():
            file.chmod(0o644)
        pd.DataFrame(log).to_csv(options.out / "training_log.csv", index=False, float_format="%.4f")
    recipe = {
        "command": f"python tools/train_embedded.py --seed {options.seed}",
        "steps": {"copying": COPY_STEPS, "stories": STORY_STEPS},
        "torch": torch.__version__,
        "measured": measure(options.out),
        "retraining_rates": search_rates(options.out),
    }
    (options.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
