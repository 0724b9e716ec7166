"""What the distortion explorer sees of a model: the features of a picture, or the hidden states of a text."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator

from ...evaluation.distortion import (
    block_distortion,
    class_probabilities,
    feature_maps,
    map_layers,
    relative_error,
)
from ...evaluation.generation import next_tokens, room_after, unknown_characters
from ...experiments.shared import Cancelled
from ...sources import shapes
from ..plots.curves import plot_curves
from ..plots.features import plot_maps
from ..plots.figure import DataFigure
from .facts import described, of_versions
from .versions import Versions, picture_versions, text_versions

BEST = 5
# Whose hidden states are compared.
WINDOWS = 16
# So many unknown characters are told one by one.
NAMED = 8


@dataclass(frozen=True)
class Chosen:
    """Where the controls stood when the work was asked for; the picture is uint8 `[3, height, width]`."""

    model: str
    sparsity: float
    retrain: str
    picture: torch.Tensor
    layer: str
    filter: int
    prompt: str


@dataclass(frozen=True)
class Seen:
    """What there is to show: words and predictions in HTML, and a figure."""

    text: str
    predictions: str
    figure: DataFigure


Models = Mapping[str, Any]


class PictureView:
    """One picture, what one filter makes of it, and what it is taken for.

    >>> view = PictureView("shapes-resnet")
    >>> list(view.layers)[:2]
    ['conv1', 'bn1']
    """

    def __init__(self, name: str, steps: int | None = None):
        self.versions = picture_versions(name, steps)
        self.layers = map_layers(self.versions.dense)

    def look(self, models: Models, chosen: Chosen, cancelled: Callable[[], bool]) -> Seen:
        """See the first of the models, the dense one, and the others beside it."""
        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (shapes.MEAN, shapes.STD))
        picture = ((chosen.picture.float() / 255 - shift) / scale)[None]
        maps, predictions, errors = {}, {}, {}
        for version, model in models.items():
            if cancelled():
                raise Cancelled
            maps[version] = feature_maps(model, picture, chosen.layer)[0, chosen.filter]
            best = class_probabilities(model, picture)[0].topk(BEST)
            names = [shapes.CLASSES[i] for i in best.indices.tolist()]
            predictions[version] = pd.DataFrame({"name": names, "probability": best.values.tolist()})
            errors[version] = relative_error(maps["dense"], maps[version])
        said = _changes(errors, chosen.retrain)
        where = {"layer": chosen.layer, "filter": chosen.filter}
        titles = {
            f"{version}, error {errors[version]:.2f}" if version != "dense" else version: each
            for version, each in maps.items()
        }
        return Seen(
            f"filter {chosen.filter} of {html.escape(chosen.layer)}: relative error {said}",
            side_by_side("the picture is taken for", predictions),
            _described(
                plot_maps({"picture": chosen.picture, **titles}), self.versions, models, chosen, where
            ),
        )


class TextView:
    """The hidden states of a language model after each block, and what it says next.

    >>> view = TextView("tiny-opt", steps=3)
    >>> view.versions.steps
    3
    """

    def __init__(self, name: str, steps: int | None = None):
        self.versions, self._tokenizer, text = text_versions(name, steps, test=WINDOWS)
        self._text = text
        self._tables: dict[tuple[str, float, str], pd.DataFrame] = {}

    def look(self, models: Models, chosen: Chosen, cancelled: Callable[[], bool]) -> Seen:
        """See the first of the models, the dense one, and the others beside it."""
        # First of all: it is cheap, and shows what is wrong with the prompt.
        predictions = {
            version: next_tokens(model, self._tokenizer, chosen.prompt, count=BEST)
            for version, model in models.items()
        }
        tables = [self._table(models, version, chosen, cancelled) for version in models if version != "dense"]
        errors = {table["version"].iloc[0]: float(table["error"].iloc[-1]) for table in tables}
        table = pd.concat(tables, ignore_index=True)
        table["version"] = pd.Categorical(table["version"], categories=["dense", "pruned", "retrained"])
        named = table.rename(columns={"error": "relative error", "cka": "linear CKA"})
        figure = plot_curves(named, x="block", y=("relative error", "linear CKA"), hue="version")
        for axes, highest in zip(figure.axes, (None, 1.03), strict=True):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.get_yscale() == "linear":
                axes.set_ylim(0, highest)
        return Seen(
            f"hidden state after the last block, on {WINDOWS} test windows: relative error "
            f"{_changes(errors, chosen.retrain)}"
            f"{unknown_said(self._tokenizer, chosen.prompt)}",
            side_by_side(f"after “{chosen.prompt[-40:]}” comes", predictions, quoted=True),
            _described(figure, self.versions, models, chosen, {}),
        )

    def check(self, prompt: str) -> None:
        """Raise ValueError for a prompt that the model cannot read."""
        room_after(self.versions.dense, self._tokenizer, prompt)

    def _table(self, models: Models, version: str, chosen: Chosen, cancelled) -> pd.DataFrame:
        key = version, chosen.sparsity, chosen.retrain if version == "retrained" else ""
        if key not in self._tables:
            table = block_distortion(models["dense"], models[version], self._text.test, cancelled=cancelled)
            if cancelled():
                raise Cancelled
            self._tables[key] = table.assign(version=version, protocol=self._text.protocol)
        return self._tables[key]


def unknown_said(tokenizer, prompt: str) -> str:
    """Which characters of a prompt are outside the vocabulary, in HTML; empty for none.

    >>> import perpkit as pk
    >>> _, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> unknown_said(tokenizer, "It is a ☃")[-77:]
    'outside the vocabulary: ☃ (U+2603); the model reads their bytes as mere noise'
    """
    unknown = unknown_characters(tokenizer, prompt)
    if not unknown:
        return ""
    named = ", ".join(f"{c} (U+{ord(c):04X})" for c in unknown[:NAMED])
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    return (
        f"<br>characters outside the vocabulary: {html.escape(named)}{more}; the model reads their bytes as "
        "mere noise"
    )


def side_by_side(title: str, tables: Mapping[str, pd.DataFrame], *, quoted: bool = False) -> str:
    """Predictions in HTML, a column for each version: the first column of each table, and `probability`.

    >>> table = pd.DataFrame({"token": ["<b>"], "probability": [0.5]})
    >>> "&lt;b&gt;" in side_by_side("next", {"dense": table})
    True
    """
    columns = []
    for version, table in tables.items():
        rows = []
        for name, share in zip(table.iloc[:, 0], table["probability"], strict=True):
            # In quotes a leading space can be seen.
            said = html.escape(repr(str(name)) if quoted else str(name))
            rows.append(
                f'<tr><td style="padding: 0 8px 0 0; font-family: monospace; white-space: pre">{said}</td>'
                f'<td style="text-align: right; white-space: nowrap">{100 * share:.1f} %</td>'
                f'<td style="padding-left: 8px"><meter value="{share:.4f}"></meter></td></tr>'
            )
        columns.append(
            f'<td style="vertical-align: top; padding-right: 28px"><b>{html.escape(version)}</b>'
            f"<table>{''.join(rows)}</table></td>"
        )
    return f"<div>{html.escape(title)}</div><table><tr>{''.join(columns)}</tr></table>"


def _described(
    figure: DataFigure, versions: Versions, models: Models, chosen: Chosen, where: dict
) -> DataFigure:
    retrained = f"{chosen.retrain} retrained for {versions.steps} steps" if "retrained" in models else ""
    said = [
        chosen.model,
        *(f"{name} {value}" for name, value in where.items()),
        f"pruned by magnitude to {100 * chosen.sparsity:g} % of every layer",
        retrained,
    ]
    of = figure.table["version" if "version" in figure.table else "title"].astype(str)
    facts = of_versions(of, chosen.sparsity, chosen.retrain, versions.steps)
    return described(figure, ", ".join(filter(None, said)), model=chosen.model, **facts, **where)


def _changes(errors: Mapping[str, float], retrained: str) -> str:
    said = f"{errors['pruned']:.3f} pruned"
    if "retrained" in errors:
        said += f" → <b>{errors['retrained']:.3f}</b> after retraining {html.escape(retrained)}"
    return said
