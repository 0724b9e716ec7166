"""Train the embedded model tiny-opt from nothing: tokenizer, weights, log and final numbers.

    python tools/train_embedded.py --seed 0 --out data/models/tiny-opt

About fifteen minutes on one core. Two things make who-has-what learnable for so small a model: the positions
start as sinusoids with two heads of the first layer looking one and two tokens back, and the first steps are
spent on copying random sequences, before any story.
"""

import argparse
import hashlib
import json
import math
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from perpkit.evaluation.perplexity import perplexity
from perpkit.evaluation.zero_shot import zero_shot
from perpkit.sources.storyworld import stories
from perpkit.sources.text import load_text

CONTEXT = 128
VOCABULARY = 1024
WIDTH, LAYERS, HEADS = 64, 3, 4


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
    """The untrained model, its first layer able to look back."""
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
    """Start positions as sinusoids and let head h of the first layer attend h + 1 tokens back, h = 0, 1.

    Shifting a sinusoid is a rotation of its sine and cosine, so query and key projections that differ by
    that rotation agree most at the wanted distance.
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


def copying_windows(count: int, tokens: torch.Tensor, glue: int, generator: torch.Generator) -> torch.Tensor:
    """Windows `[count, 128]` of a random sequence repeated, its period 5 to 19; a quarter is the glue token.

    The glue (the possessive "'s") follows everything, so one token of context does not tell what comes next.
    """
    period = int(torch.randint(5, 20, (1,), generator=generator))
    sequence = tokens[torch.randint(len(tokens), (count, period), generator=generator)]
    sequence[torch.rand(sequence.shape, generator=generator) < 0.25] = glue
    return sequence.repeat(1, CONTEXT // period + 1)[:, :CONTEXT]


def story_windows(tokenizer, seed: int):
    """Batches without end of windows `[8, 128]` of the training stories, one after the other."""
    told = stories("train", seed)
    ids: list[int] = []
    while True:
        while len(ids) < 8 * CONTEXT:
            ids += tokenizer("".join(s.text + "\n\n" for s in islice(told, 2000)), verbose=False).input_ids
        yield torch.tensor(ids[: 8 * CONTEXT]).view(8, CONTEXT)
        ids = ids[8 * CONTEXT :]
