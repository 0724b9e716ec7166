"""One flag for each axis of a grid, made from the fields of `Experiment`."""

import inspect
from dataclasses import fields
from functools import cache
from typing import Any

import typer
from typer.core import TyperCommand

from .tables import print_json

# What the flags say; the fields' names and defaults are those of `Experiment`.
MEANINGS = {
    "model": "Embedded name, local folder or Hub id.",
    "text": "storyworld, wikitext2, c4, c4-wikitext2 or a local file.",
    "dtype": "Type of the weights: float32, bfloat16, float16, float64.",
    "length": "Tokens of a window; none: the model's context.",
    "criterion": "Which weights go: magnitude, random, wanda, ria, sparsegpt, sparsefw.",
    "sparsity": "Share of the weights that go.",
    "pattern": "N:M, such as 2:4, which says the sparsity itself.",
    "group": "What scores compete in: row, layer, global; none: the criterion's own.",
    "allocation": "How sparsity spreads over layers: uniform, uniform+, global, erk, lamp, owl.",
    "unit": "Reconstruct by matrix, submodule, block or window:2.",
    "unit_steps": "Steps of a unit's reconstruction by gradients.",
    "unit_lr": "Rate of a unit's reconstruction by gradients.",
    "retrain": "Nothing (none), subsets such as biases+norms or full, adapters such as mask_lora.",
    "rank": "Rank of the adapters; none: 16.",
    "alpha": "Scale of the adapters; none: twice the rank.",
    "start": "Start of scale_lora: published or symmetry_breaking.",
    "steps": "Retraining steps.",
    "lr": "Largest learning rate; none: the recommended one of the model.",
    "batch": "Windows of a batch.",
    "accumulate": "Batches whose gradients make one step.",
    "schedule": "Course of the rate: llr, clr, linear, cosine, constant and others.",
    "weight_decay": "Weight decay of the retraining.",
    "tasks": "Zero-shot tasks: storyworld, papers, or names with commas. Repeat the flag for several values.",
    "tasks_dir": "Folder of the tasks' files; none: the Hub.",
    "seed": "Order of the training windows, start of the adapters, random pruning.",
}
# Their values have commas of their own.
WHOLE = ("tasks",)


class AxesCommand(TyperCommand):
    """A command that also takes a flag for each axis; what was given is in `ctx.obj` as lists of values."""

    def get_params(self, ctx) -> list:
        # Only now, not when the command is defined: `Experiment` needs torch.
        return [*super().get_params(ctx), *_options()]

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        as_json = "--json" in args  # parsing empties the list
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Of click or of the copy of it that newer typers carry.
            if type(error).__name__ == "NoSuchOption":
                error.message += f" The axes are {', '.join(map(_flag, MEANINGS))}."  # type: ignore[attr-defined]
            if as_json and (words := getattr(error, "message", None)):
                print_json({"error": words})
            raise

    def invoke(self, ctx) -> Any:
        given = {axis: ctx.params.pop(axis) for axis in [option.name for option in _options()]}
        ctx.obj = {axis: words for axis, words in given.items() if words}
        return super().invoke(ctx)


def axis_values(given: dict[str, list[str]]) -> dict[str, list]:
    """The axes of a grid from the words of their flags.

    Raises ValueError for an empty value.

    >>> axis_values({"sparsity": ["0.5,0.7"], "pattern": ["none,2:4"], "tasks": ["boolq,rte"]})
    {'sparsity': ['0.5', '0.7'], 'pattern': [None, '2:4'], 'tasks': ['boolq,rte']}
    """
    return {axis: [_value(axis, word) for word in split(axis, words)] for axis, words in given.items()}


def split(axis: str, words: list[str]) -> list[str]:
    """The values that an axis is given in one or several lists with commas."""
    values = [value.strip() for word in words for value in ([word] if axis in WHOLE else word.split(","))]
    if "" in values:
        raise ValueError(f"{axis} is {','.join(words)!r}; a value between its commas is empty")
    return values


def _value(axis: str, word: str) -> str | None:
    # Experiment makes the numbers. "none" is a retraining, and elsewhere what was not chosen.
    return None if word == "none" and axis != "retrain" else word


def _flag(axis: str) -> str:
    return f"--{axis.replace('_', '-')}"


@cache
def _options() -> list:
    """The options of the axes, as typer makes them for a function that has them as parameters."""
    from ..experiments.experiment import Experiment

    def axes(**_: list[str]) -> None:
        pass

    parameters = []
    for field in fields(Experiment):
        default = "" if field.default is None else f" Default: {field.default}."
        option = typer.Option(
            _flag(field.name),
            help=MEANINGS.get(field.name, "") + default,
            metavar=_kind(field.type),
            show_default=False,
            rich_help_panel="Axes of the grid: a value or several joined by commas; they override the file's",
        )
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=list[str]
            )
        )
    for parameter in parameters:
        parameter.default.default = []
    axes.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    axes.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    application = typer.Typer(add_completion=False)
    application.command()(axes)
    return list(typer.main.get_command(application).params)


def _kind(annotation) -> str:
    """What a flag's values look like."""
    kinds = {"int": "INTEGER,…", "float": "NUMBER,…"}
    return kinds.get(getattr(annotation, "__name__", str(annotation)).split(" ")[0], "TEXT,…")
