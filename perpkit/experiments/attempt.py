"""One row of a sweep, whatever comes of it: finished, failed, or not to be kept."""

import gc
import traceback

import torch

from ..evaluation.cost import out_of_memory
from . import run as running
from .experiment import RESULT_FORMAT, Experiment
from .run import NotLoaded
from .shared import Cancel, Cancelled, check


def attempt(experiment: Experiment, cancelled: Cancel = None, key: str | None = None) -> dict:
    """The row of an experiment, or that of its failure: the inputs, `error` and `traceback`.

    `key` is what the row will be kept under. Raises NotLoaded, also when what the experiment is read from
    does not have that key, and Cancelled: they say nothing of the experiment.
    """
    check(cancelled)
    _check_files(experiment, key)
    row = _row(experiment, cancelled)
    # It may have changed while it was read.
    _check_files(experiment, key)
    return row


def failed_row(experiment: Experiment, error: str, details: str) -> dict:
    """The row of a run that has failed."""
    return {**experiment.asdict(), "error": error, "traceback": details, "format": RESULT_FORMAT}


def _row(experiment: Experiment, cancelled: Cancel) -> dict:
    try:
        return running.run(experiment, cancelled)
    except (NotLoaded, Cancelled):
        raise
    except Exception as error:
        if out_of_memory(error):
            running.forget()  # the next row may need less, if this one leaves nothing behind
        words = f"{type(error).__name__}: {error}"
        return failed_row(experiment, words, "".join(traceback.format_exception(error)))
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def _check_files(experiment: Experiment, key: str | None) -> None:
    if key is not None and experiment.key() != key:
        raise NotLoaded(
            "what the model, the text or the tasks are read from has changed since the sweep began, or is "
            "another one where this row was computed (other files, another perpkit); start the sweep again"
        )
