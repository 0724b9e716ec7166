"""The mask explorer: which weights of one matrix go, and what two criteria agree on."""

import dataclasses
import functools
import html
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import torch
from torch import nn

from ...pruning.masks import Masks
from ...pruning.method import NEEDS_GRAM
from ...pruning.selection import GROUPS, parse_pattern
from ...sources.classifiers import load_classifier
from ...sources.embedded import EMBEDDED_CLASSIFIERS
from ...sources.images import load_images
from ...sources.models import load_model
from ...sources.text import load_text
from ..job import Job, Pace, Request
from ..plots.card import short_names
from ..plots.figure import DataFigure
from ..plots.mask_view import Frame, MaskView
from .explorer import Explorer, guarded
from .facts import described
from .offers import UNSTRUCTURED, check_sparsity
from .scores import SCORES, Scores, remember
from .words import bar

NOTHING = "nothing"
PATTERNS = (UNSTRUCTURED, "2:4", "4:8")
# Of matrices up to this size a frame is drawn before the slider's next position is asked for: were it left to
# a job, a hand that keeps moving would stop every frame before it is shown.
AT_ONCE = 2**20


@dataclass(frozen=True)
class Choice:
    """What the controls say."""

    layer: str
    criterion: str
    other: str
    pattern: str
    group: str
    sparsity: float

    @property
    def nm(self) -> tuple[int, int] | None:
        """The pattern as (N, M), None for none."""
        return None if self.pattern == UNSTRUCTURED else parse_pattern(self.pattern)

    @property
    def criteria(self) -> list[str]:
        """The one or two criteria that are looked at."""
        return [self.criterion] if self.other == NOTHING else [self.criterion, self.other]


class MaskExplorer(Explorer):
    """Drag the sparsity and watch scores, threshold and mask of one matrix of a model.

    Choose the layer, the criterion, N:M patterns (their groups are parted by lines) and whether weights are
    compared within the layer or within each row; compare with a second criterion to see by colour what both
    keep. Wanda, RIA and SparseGPT see the inputs that the dense model makes of the calibration data.

    `model` is an embedded name, a folder or a Hub id as `load_model` takes them, `"shapes-resnet"`, or a
    model with its `calibration`, token windows `[n, length]` or inputs `[n, …]`; without them a model is
    pruned by magnitude and at random only. The model is not changed.

    Raises ValueError for a model that cannot be loaded or has no matrix to prune, and for calibration data
    that it cannot read.

    >>> explorer = MaskExplorer(background=False)
    >>> explorer.show(0.75, criterion="wanda", other="magnitude")
    >>> explorer.figure().table["kept"].mean().item()
    0.25
    """

    name = "mask"

    def __init__(
        self,
        model: str | nn.Module = "tiny-opt",
        *,
        calibration: torch.Tensor | None = None,
        seed: int = 0,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        self._name = model if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            model, some = _loaded(model)
            calibration = some if calibration is None else calibration
        self._scores = Scores(model, calibration, seed)
        self._views: OrderedDict[tuple, MaskView] = OrderedDict()
        self._shown: tuple[MaskView, Frame, Choice] | None = None
        names = list(self._scores.matrices)
        self._labels = dict(zip(names, short_names(names), strict=True))
        wide = widgets.Layout(width="250px")
        self.layer = widgets.Dropdown(
            options=[(label, name) for name, label in self._labels.items()],
            value=max(names, key=self._scores.numel),
            description="layer",
            layout=wide,
        )
        self.criterion = widgets.Dropdown(options=self._scores.criteria, description="criterion", layout=wide)
        self.other = widgets.Dropdown(
            options=[NOTHING, *self._scores.criteria], description="beside", layout=wide
        )
        self.pattern = widgets.Dropdown(options=PATTERNS, description="pattern", layout=wide)
        self.group = widgets.Dropdown(options=GROUPS, description="within", layout=wide)
        self.sparsity = widgets.FloatSlider(
            0.5,
            min=0,
            max=0.99,
            step=0.01,
            description="sparsity",
            readout_format=".0%",
            layout=widgets.Layout(width="420px"),
        )
        shown = ("layer", "criterion", "other", "pattern", "group", "sparsity")
        controls = {name: getattr(self, name) for name in shown}
        super().__init__(controls, export_folder=export_folder, background=background)
        # Draws in the callback's own thread.
        self._frames = Job(self._work_failed, background=False, lock=self._job.lock)
        self._jobs = [self._job, self._frames]
        for control in controls.values():
            control.observe(self._on_change, names="value")
        self._on_change()

    def show(
        self,
        sparsity: float | None = None,
        *,
        layer: str | None = None,
        criterion: str | None = None,
        other: str | None = None,
        pattern: str | None = None,
        group: str | None = None,
    ) -> None:
        """Put the controls where a hand would, those that are given.

        `layer` is a name, or as much of its end as says which.
        Raises ValueError for what they do not offer, and beside a pattern for a sparsity that is not its own
        and for a group.
        """
        named = {"layer": layer, "criterion": criterion, "other": other, "pattern": pattern, "group": group}
        chosen = self._offered(sparsity=sparsity, **named)
        fixed = chosen.get("pattern", self.pattern.value)
        check_sparsity(sparsity, fixed, PATTERNS)
        if group is not None and fixed != UNSTRUCTURED:
            raise ValueError(
                f"group is {group!r}, but the pattern {fixed} compares weights within groups of its own; "
                f"give pattern={UNSTRUCTURED!r} with it"
            )
        self._set(chosen)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything asked for is shown; False when the time, in seconds, is over first."""
        pace = Pace()
        if not self._job.wait(timeout):
            return False
        return self._frames.wait(None if timeout is None else max(0.0, timeout - pace.passed()))

    def _current(self) -> DataFigure | None:
        if self._shown is None:
            return None
        view, frame, choice = self._shown
        facts = dataclasses.asdict(choice) | {"sparsity": frame.mask.logical_not().double().mean().item()}
        if choice.nm is not None:
            facts["group"] = None
        return described(view.figure(frame), model=self._name, **facts)

    @guarded
    def _on_change(self, _=None) -> None:
        if self._held:
            return
        choice = Choice(
            self.layer.value,
            self.criterion.value,
            self.other.value,
            self.pattern.value,
            self.group.value,
            self.sparsity.value,
        )
        # A pattern says itself how much is pruned, and within what.
        self.sparsity.disabled = self.group.disabled = choice.nm is not None
        self.sparsity.layout.visibility = "hidden" if choice.nm is not None else "visible"
        work = functools.partial(self._compute, choice=choice)
        if self._is_quick(choice):
            with self._job.lock:
                self._job.cancel()
                self._begin("drawing", work)
            self._frames.submit(work)
        else:
            with self._job.lock:
                # No older frame may come after this.
                self._frames.cancel()
                self._ask("looking at the layer's inputs", work)

    # --- the work ----------------------------------------------------------------------------------

    def _compute(self, request: Request, choice: Choice) -> None:
        masks, entered = [], []
        how = choice.sparsity, choice.group, choice.nm
        for criterion in choice.criteria:
            inputs = self._scores.look(choice.layer, criterion, self._looking(request, choice.layer))
            entered.append(inputs)
            masks.append(self._scores.mask(choice.layer, criterion, *how, inputs))
        mask, *others = masks
        other = others[0] if others else None
        scores = self._scores.of(choice.layer, choice.criterion, entered[0])
        thresholds = _thresholds(scores, mask, choice)
        said = [_pruned(mask, thresholds, choice), "" if other is None else _agreement(choice, mask, other)]
        label = self._labels[choice.layer]
        frame = Frame(mask, other, thresholds, "\n".join([f"{label} · {choice.criterion}", *said]).strip())
        view = self._view_of(choice, scores)
        png = view.png(frame)

        def update() -> None:
            self._shown = view, frame, choice
            self._show(None, png)
            self._say(f"<b>{html.escape(label)}</b>: {' · '.join(filter(None, said))}")

        request.show(update)

    def _looking(self, request: Request, layer: str) -> Callable[[int, int], bool]:
        place = 0, 1

        def news(_: int) -> str:
            return f"looking at what enters {html.escape(layer)} {bar(*place)}"

        cancelled = self._watch(request, news)

        def watch(done: int, batches: int) -> bool:
            nonlocal place
            place = done, batches
            return cancelled()

        return watch

    def _is_quick(self, choice: Choice) -> bool:
        """Whether nothing has to be looked at before the matrix is drawn."""
        there = all(self._scores.has_inputs(choice.layer, criterion) for criterion in choice.criteria)
        return there and self._scores.numel(choice.layer) <= AT_ONCE

    def _view_of(self, choice: Choice, scores: torch.Tensor) -> MaskView:
        names = None if choice.other == NOTHING else (choice.criterion, choice.other)
        m = choice.nm[1] if choice.nm else None
        key = choice.layer, choice.criterion, names, m
        found = self._views.get(key)
        if found is None:
            found = remember(self._views, key, MaskView(scores, SCORES[choice.criterion], m=m, names=names))
        return found


def _loaded(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model by name, and few calibration data for it."""
    if name in EMBEDDED_CLASSIFIERS:
        images = load_images("shapes", counts={"train": 64, "validation": 10, "test": 10}, progress=False)
        return load_classifier(name), images.train[0]
    model, tokenizer = load_model(name)
    text = load_text("storyworld", tokenizer, windows={"train": 1, "calibration": 32, "test": 1})
    return model, text.calibration


def _thresholds(scores: torch.Tensor, mask: torch.Tensor, choice: Choice) -> torch.Tensor:
    """The lowest kept score of the layer or of each row; empty where there is no such thing."""
    if choice.criterion in NEEDS_GRAM or choice.nm is not None:
        return scores.new_empty(0)
    kept = scores.masked_fill(~mask, torch.inf)
    lowest = kept.amin(1) if choice.group == "row" else kept.amin()[None]
    return lowest[torch.isfinite(lowest)]


def _pruned(mask: torch.Tensor, thresholds: torch.Tensor, choice: Choice) -> str:
    pruned = int((~mask).sum())
    words = f"{100 * pruned / mask.numel():.3g} % of {mask.numel():,} weights pruned"
    if choice.nm is not None:
        n, m = choice.nm
        return f"{words}, {n} of every {m} consecutive inputs of a row are kept"
    # Where nothing goes, nothing lies below a threshold.
    if not thresholds.numel() or not pruned:
        return words
    low, high = (float(end) for end in thresholds.aminmax())
    if choice.group == "row":
        return f"{words}, the threshold of a row lies between {low:.3g} and {high:.3g}"
    return f"{words}, threshold {low:.3g}"


def _agreement(choice: Choice, mask: torch.Tensor, other: torch.Tensor) -> str:
    row = Masks({choice.layer: mask}).overlap(Masks({choice.layer: other})).iloc[0]
    return (
        f"with {choice.other} it agrees on {100 * row['agreement']:.1f} % of the weights; "
        f"of those that either keeps, both keep {100 * row['overlap']:.1f} %"
    )
