"""What a sweep refuses before it computes anything."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

import perpkit as pk
from perpkit.experiments import run as running


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    listed = []
    monkeypatch.setattr(running, "run", lambda experiment, cancelled: listed.append(experiment) or {})
    return listed


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (pk.Experiment(), "one experiment; put it in a list"),
        ({"sparsity": [0.1]}, "want a Grid or a list of experiments, got {'sparsity': [0.1]}"),
        ("grid.yaml", "Grid.from_file"),
        (None, "want a Grid or a list of experiments, got None"),
        ([pk.Experiment(), {"sparsity": 0.1}], "among the experiments is {'sparsity': 0.1}"),
    ],
    ids=str,
)
def test_what_is_no_grid_is_refused(grid, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        pk.sweep(grid, store=tmp_path / "results.sqlite", progress=False)


@pytest.mark.parametrize("options", [{"on_row": 3}, {"cancelled": True}], ids=str)
def test_what_cannot_be_called_is_refused_before_the_first_row(options, tmp_path, ran):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; want a function"):
        pk.sweep([pk.Experiment()], store=tmp_path / "results.sqlite", progress=False, **options)
    assert ran == []


@pytest.mark.parametrize("text", ["nofile.txt", "storyword", "."])
def test_a_text_that_is_not_there_is_refused_before_the_first_row(text, tmp_path, ran):
    grid = pk.Grid(text=["storyworld", text], sparsity=[0.1, 0.2])
    near = r"; did you mean 'storyworld'\?" if text == "storyword" else r"\."
    words = (
        rf"^unknown text '{re.escape(text)}'{near} Valid: storyworld, wikitext2, c4, c4-wikitext2, a file$"
    )
    with pytest.raises(ValueError, match=words):
        pk.sweep(grid, store=tmp_path / "results.sqlite", progress=False)
    assert ran == []


@pytest.mark.parametrize("executor", ["threads", 4, ThreadPoolExecutor])
def test_what_is_no_executor_is_refused(executor, tmp_path):
    with pytest.raises(ValueError, match=r"executor is .*; want one of concurrent\.futures"):
        pk.sweep([pk.Experiment()], store=tmp_path / "results.sqlite", executor=executor, progress=False)


def test_a_client_of_dask_is_not_its_executor(tmp_path):
    class Client:
        """As dask's: its futures are of another kind."""

        def submit(self, function, *arguments):
            raise AssertionError

        def get_executor(self):
            raise AssertionError

    with pytest.raises(ValueError, match=r"write executor=client\.get_executor\(\)"):
        pk.sweep([pk.Experiment()], store=tmp_path / "results.sqlite", executor=Client(), progress=False)


def test_a_store_to_read_from_is_refused_before_the_work_unless_all_is_there(tmp_path, ran):
    grid = pk.Grid(sparsity=[0.1, 0.2])
    store = pk.Store(tmp_path / "results.sqlite")
    reader = pk.Store(store.path, readonly=True)
    with pytest.raises(ValueError, match=r"2 rows are missing.*readonly=True"):
        pk.sweep(grid, store=reader, progress=False)
    assert ran == []
    for experiment in grid:
        store.put(experiment.key(), experiment.asdict())
    assert pk.sweep(grid, store=reader, progress=False).sparsity.tolist() == [0.1, 0.2]
