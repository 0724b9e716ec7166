"""The distortion explorer: what pruning does to features, and what a short retraining gives back."""

import functools
import html
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch

from ...sources import shapes
from ...sources.embedded import EMBEDDED_CLASSIFIERS, EMBEDDED_MODELS
from ..job import Pace, Request
from ..upload import FORMATS, read_picture
from .explorer import Explorer, guarded
from .offers import offered, within
from .versions import RETRAININGS, SPARSITIES, is_classifier
from .views import Chosen, Models, PictureView, TextView
from .words import SPINNER, bar

UPLOADED = "your upload"
# A larger message than the notebook server takes ends its connection, and no kernel hears of it.
LIMITS = '<span style="font-size: 85%; opacity: 0.75">up to 20 MB; servers may take less, often 10 MB</span>'
# The first maps behind a normalisation, and one that is visibly distorted and comes back.
FIRST_LAYER, FIRST_FILTER = "bn1", 8


class DistortionExplorer(Explorer):
    """See what pruning does to the features of a picture or a text, and what retraining gives back.

    Of `"shapes-resnet"` it shows a picture, one of the test split or one that is uploaded, and what one
    filter makes of it: dense, pruned by magnitude, retrained, with the relative errors and what each of the
    three takes the picture for. Of a language model, by the names that `load_model` takes, it shows the
    relative error and the linear CKA of each block's hidden state, and the likeliest next tokens after the
    prompt. Retrained models are kept. `steps` is the length of a retraining, 40 for pictures and 80 for
    language unless told. Uploads are decoded in memory and written nowhere.

    Raises ValueError for a model that cannot be loaded.

    >>> explorer = DistortionExplorer(steps=1, background=False)
    >>> explorer.show(picture="star", layer="conv1", filter=3)
    >>> explorer.message.value[:34]
    'filter 3 of conv1: relative error '
    """

    name = "distortion"

    def __init__(
        self,
        model: str = EMBEDDED_CLASSIFIERS[0],
        *,
        steps: int | None = None,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        self._steps = steps
        self._views: dict[str, PictureView | TextView] = {}
        self._pictures = _examples()
        pictured = self._view(model if is_classifier(model) else EMBEDDED_CLASSIFIERS[0])
        assert isinstance(pictured, PictureView)
        self._layers = pictured.layers
        # A model that cannot be loaded is an error now; one that is chosen later is loaded then.
        self._view(model)
        names = [model, *EMBEDDED_CLASSIFIERS, EMBEDDED_MODELS[0]]
        self.model = _menu("model", list(dict.fromkeys(names)), model)
        self.sparsity = widgets.SelectionSlider(
            options=[(f"{100 * value:g} %", value) for value in SPARSITIES],
            value=0.8 if is_classifier(model) else 0.7,
            description="sparsity",
            continuous_update=False,
            layout=_wide(),
        )
        self.retrain = _menu("retrain", RETRAININGS, RETRAININGS[0])
        self.subject = _menu("picture", list(self._pictures), "star")
        self.layer = _menu("layer", list(self._layers), FIRST_LAYER)
        self.filter = widgets.IntSlider(
            FIRST_FILTER,
            min=0,
            max=self._layers[FIRST_LAYER] - 1,
            description="filter",
            continuous_update=False,
            layout=_wide(),
        )
        self.upload = widgets.FileUpload(
            accept="image/*",
            description="picture",
            tooltip=f"{', '.join(FORMATS)}; it is written nowhere",
            layout=widgets.Layout(width="130px"),
        )
        self.limits = widgets.HTML(LIMITS)
        self.prompt = widgets.Text(
            "It is a", description="prompt", continuous_update=False, layout=widgets.Layout(width="608px")
        )
        names = ["model", "sparsity", "retrain", "subject", "layer", "filter", "prompt", "upload", "limits"]
        controls = {name: getattr(self, name) for name in names}
        super().__init__(controls, export_folder=export_folder, background=background)
        self.predictions = widgets.HTML()
        self.predictions.add_class("perpkit-predictions")
        self.set_trait("children", [*self.children, self.predictions])
        for name, control in self._controls.items():
            if name != "limits":
                control.observe(self._on_upload if name == "upload" else self._on_change, names="value")
        self._on_change()

    def show(
        self,
        model: str | None = None,
        *,
        sparsity: float | None = None,
        retrain: str | None = None,
        picture: str | None = None,
        layer: str | None = None,
        filter: int | None = None,
        prompt: str | None = None,
    ) -> None:
        """Put the controls where a hand would, those that are given, and ask for what they say.

        `picture`, `layer` and `filter` are for the classifier, `prompt` is for a language model.

        Raises ValueError for what they do not offer, and for what the model has no use for.
        """
        chosen = self._offered(model=model, sparsity=sparsity, retrain=retrain, layer=layer, prompt=prompt)
        if picture is not None:
            chosen["subject"] = offered(self.subject, "picture", picture)
        filters = self._layers[chosen.get("layer", self.layer.value)]
        if filter is not None:
            chosen["filter"] = within("filter", filter, 0, filters - 1)
        pictured = is_classifier(now := chosen.get("model", self.model.value))
        useless = ["prompt"] if pictured else ["subject", "layer", "filter"]
        if given := [self._controls[name].description for name in useless if name in chosen]:
            raise ValueError(f"{now} has no {' and no '.join(given)}; give another model with it")
        # Of a model that is still to be loaded the work will say it.
        if prompt is not None and isinstance(view := self._views.get(now), TextView):
            view.check(chosen["prompt"])
        with self._job.lock:
            self._fit_filters(filters)
            self._set(chosen)

    # --- callbacks ---------------------------------------------------------------------------------

    @guarded
    def _on_change(self, _=None) -> None:
        with self._job.lock:
            if self._held:
                return
            self._fit_filters(self._layers[self.layer.value])
            pictured = is_classifier(self.model.value)
            for name in ("subject", "layer", "filter", "prompt", "upload", "limits"):
                self._controls[name].layout.display = "none" if (name == "prompt") == pictured else None
            chosen = Chosen(
                model=self.model.value,
                sparsity=self.sparsity.value,
                retrain=self.retrain.value,
                picture=self._pictures[self.subject.value],
                layer=self.layer.value,
                filter=self.filter.value,
                prompt=self.prompt.value,
            )
            said = "working" if chosen.model in self._views else f"loading {html.escape(chosen.model)}"
            self._ask(said, functools.partial(self._compute, chosen=chosen))

    def _fit_filters(self, filters: int) -> None:
        """Let the filter be one of so many."""
        held, self._held = self._held, True
        try:
            self.filter.max = filters - 1
        finally:
            self._held = held

    @guarded
    def _on_upload(self, _) -> None:
        with self._job.lock:
            if self._held or not self.upload.value:
                return
            file = self.upload.value[0]
            # What runs would hide what is said about the file.
            self._job.cancel()
            self._held = True
            try:
                self._pictures[UPLOADED] = read_picture(file["name"], file["content"], shapes.SIDE)
                self.subject.options = list(self._pictures)
                self.subject.value = UPLOADED
            except Exception as error:
                self._failed(error)
                return
            finally:
                # The same file may be given again.
                self.upload.value = ()
                self._held = False
            self._on_change()

    # --- the work ----------------------------------------------------------------------------------

    def _compute(self, request: Request, chosen: Chosen) -> None:
        """Show the pruned model before the retraining begins, and all three after it."""
        view = self._view(chosen.model)
        versions, subset = view.versions, chosen.retrain
        models: dict[str, Any] = {"dense": versions.dense, "pruned": versions.pruned(chosen.sparsity)}
        text = ""
        if not versions.has(chosen.sparsity, subset):
            text = self._look(request, view, models, chosen, busy=True)
        pace = Pace()

        def news(step: int) -> str:
            left = pace.left(step, versions.steps)
            return (
                f"{text} → retraining {html.escape(subset)}, step {min(step, versions.steps)} of "
                f"{versions.steps} {bar(step, versions.steps, left)}"
            )

        watch = self._watch(request, news)
        models["retrained"] = versions.retrained(chosen.sparsity, subset, watch)
        self._look(request, view, models, chosen, busy=False)

    def _look(self, request: Request, view, models: Models, chosen: Chosen, *, busy: bool) -> str:
        seen = view.look(models, chosen, request.cancelled)
        png = seen.figure.png()

        def update() -> None:
            self._show(seen.figure, png)
            self.predictions.value = seen.predictions
            self._say(f"{seen.text} → retraining {SPINNER}" if busy else seen.text, busy=busy)

        request.show(update)
        return seen.text

    def _view(self, name: str) -> PictureView | TextView:
        if name not in self._views:
            made = PictureView if is_classifier(name) else TextView
            self._views[name] = made(name, self._steps)
        return self._views[name]


def _menu(description: str, options, value: str) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, value=value, description=description, layout=_wide())


def _wide() -> widgets.Layout:
    # One for each: hiding a control must not hide another.
    return widgets.Layout(width="300px")


def _examples() -> dict[str, torch.Tensor]:
    """The first picture of each class in the test split."""
    pictures, labels = shapes.shapes("test", 10)
    return {name: pictures[labels.tolist().index(i)] for i, name in enumerate(shapes.CLASSES)}
