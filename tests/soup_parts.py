"""What the tests of soups share: short calls, and whether two soups are the same to the bit."""

import torch

from perpkit.retraining.soups.sms import sms

IMAGES = {"subset": "full", "steps": 3, "lr": 1e-2, "batch": 4, "optimizer": "sgd", "weight_decay": 0.1}
TOKENS = {"subset": "full", "steps": 3, "lr": 1e-3, "batch": 4}


def cook(model, data, **changes):
    common = IMAGES if isinstance(data, tuple) else TOKENS
    options = {"sparsity": 0.7, "m": 3, "cycles": 2, "progress": False, **common, **changes}
    return sms(model, "magnitude", data, **options)


def same_tensors(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def same_soup(one, other):
    """Same weights, masks, losses and choices; only the seconds differ."""
    tables = [soup.candidates.drop(columns="seconds") for soup in (one, other)]
    return (
        same_tensors(one.model, other.model)
        and all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())
        and tables[0].equals(tables[1])
        and one.history.equals(other.history)
        and one.comparison.drop(columns="seconds").equals(other.comparison.drop(columns="seconds"))
    )
