"""Computing all rows of a grid in the background: a button, and how far it is."""

import html
import statistics
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import traitlets

from ...experiments.experiment import Experiment
from ...experiments.run import prepared_key
from ...experiments.store import Store
from ...experiments.sweep import NothingComputed, sweep
from ..job import Job, Pace, Request
from .explorer import SECONDS_BETWEEN_NEWS
from .rows import Rows
from .words import SPINNER, bar


class Filling(widgets.HBox):
    """A button that computes those rows of a grid that are missing, one after the other, and its progress.

    New rows are added to `rows`, and `on_row` is told, with the request, when one may be shown;
    `first(experiment)` is true for those to begin with. A row that fails is counted and the others go on. The
    lock of `job` guards what is shown, here too.
    """

    running = traitlets.Bool(False)

    def __init__(
        self,
        experiments: Sequence[Experiment],
        store: Store,
        job: Job,
        rows: Rows,
        *,
        on_row: Callable[[Request], None],
        on_click: Callable[..., None],
        first: Callable[[Experiment], bool],
    ):
        self._store, self._job = store, job
        self._rows, self._on_row, self._first = rows, on_row, first
        self._wanted = {experiment.key(): experiment for experiment in experiments}
        self._around = "", ""
        self.button = widgets.Button(
            description="Compute all",
            icon="play",
            tooltip="compute all rows of the grid that are missing",
            layout=widgets.Layout(width="130px"),
        )
        self.button.on_click(on_click)
        self.said = widgets.HTML()
        self.button.add_class("perpkit-fill")
        self.said.add_class("perpkit-filling")
        super().__init__([self.button, self.said], layout=widgets.Layout(flex_flow="row wrap"))
        self.tell()

    def start(self) -> None:
        """Compute what is missing, unless that is being done."""
        with self._job.lock:
            if self.running:
                return
            self.running = True
            self.button.disabled = True
            self.said.value = f"{self._count()} {SPINNER}"
            self._job.submit(self._work)

    def stop(self) -> None:
        """Stop within a training step; finished rows are kept."""
        with self._job.lock:
            if self.running:
                self._job.cancel()
                self.tell("cancelled: ")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is computed any more; False when the time, in seconds, is over first."""
        return self._job.wait(timeout)

    def tell(self, before: str = "", after: str = "") -> None:
        """Say how many rows are there, nothing being computed; both texts are HTML."""
        with self._job.lock:
            self.running = False
            self._around = before, after
            self.refresh()

    def refresh(self) -> None:
        """Count again: a row may have been computed for itself."""
        with self._job.lock:
            if not self.running:
                self.said.value = self._count().join(self._around)
                self.button.disabled = set(self._wanted) <= self._rows.keys()

    def _missing(self) -> dict[str, Experiment]:
        """What is to be done, in an order that keeps the rows of one pruned model together."""
        known, places = self._rows.keys(), dict[tuple, int]()
        rest = {key: each for key, each in self._wanted.items() if key not in known}

        def place(item: tuple[str, Experiment]) -> tuple[bool, int]:
            return not self._first(item[1]), places.setdefault(prepared_key(item[1]), len(places))

        return dict(sorted(rest.items(), key=place))

    def _count(self) -> str:
        total = len(self._wanted)
        done = len(self._rows.keys() & set(self._wanted))
        return f"{f'all {total}' if done == total else f'{done} of {total}'} rows of the grid finished"

    def _work(self, request: Request) -> None:
        progress = _Progress(self._missing())
        failed: list[str] = []
        for key, experiment in progress.left.copy().items():
            if key not in self._rows:
                try:
                    self._compute(request, progress, key, experiment)
                except NothingComputed as error:
                    if not self._store.get([key]):
                        # Not the row's fault, and so that of all: its model cannot be loaded.
                        raise
                    failed.append(error.first)
                progress.finished(key)
            self._on_row(request)
        words = f"; {len(failed)} failed, the first with {html.escape(failed[0])}" if failed else ""
        request.show(lambda: self.tell(after=words))

    def _compute(self, request: Request, progress: "_Progress", key: str, experiment: Experiment) -> None:
        step = 0

        def cancelled() -> bool:
            nonlocal step
            step += 1
            if progress.due():
                progress.skip(self._rows.keys())
                text = f"{self._count()} {progress.words(step, experiment)}"
                request.show(lambda: setattr(self.said, "value", text))
            return request.cancelled()

        results = sweep(
            [experiment], store=self._store, retry_failed=True, progress=False, cancelled=cancelled
        )
        self._rows.keep(key, results.to_dict("records")[0])


class _Progress:
    """How far the rows are, and when to say so again."""

    def __init__(self, left: dict[str, Experiment]):
        self.left = left
        self._count = len(left)
        # Seconds that finished rows took, by their retraining.
        self._took: dict[str, list[float]] = {}
        self._row, self._told = Pace(), Pace()

    def finished(self, key: str) -> None:
        if experiment := self.left.pop(key, None):
            self._took.setdefault(experiment.retrain, []).append(self._row.passed())
        self._row = Pace()

    def skip(self, known: set[str]) -> None:
        """Leave out what has been computed meanwhile, for itself."""
        for key in known & set(self.left):
            del self.left[key]

    def due(self) -> bool:
        """Whether the last news are old enough."""
        if self._told.passed() < SECONDS_BETWEEN_NEWS:
            return False
        self._told = Pace()
        return True

    def words(self, step: int, experiment: Experiment) -> str:
        """Rows left, the row in work, and the time that is left."""
        share = min(1.0, step / (experiment.steps + 1)) if experiment.steps else 0.0
        done = self._count - len(self.left) + share
        what = " ".join(filter(None, (experiment.criterion, experiment.pattern, experiment.retrain)))
        now = f"{html.escape(what)} at {100 * experiment.sparsity:.4g} %"
        seconds = self.seconds(share, experiment)
        return f"· {len(self.left)} left · {now} {bar(round(done, 2), self._count, seconds)}"

    def seconds(self, share: float, now: Experiment) -> float | None:
        """The time that is left, a share of one row being done; None while it is too early to tell."""
        known = {name: statistics.median(took) for name, took in self._took.items()}
        passed = self._row.passed()
        if now.retrain not in known:
            # The first of its kind: it says itself how long it takes.
            if share == 0 or passed < 1:
                return None
            known[now.retrain] = passed / share
        usual = max(known.values())
        rest = sum(known.get(each.retrain, usual) for each in self.left.values())
        return max(0.0, rest - min(passed, known[now.retrain]))
