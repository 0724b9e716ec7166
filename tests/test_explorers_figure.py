"""What a program gets from figure(): the picture of what was asked for last, or why there is none."""

import threading

import pytest
from explorer_parts import SOON, words

import perpkit as pk
from perpkit.interactive.explorers.scores import Scores


@pytest.fixture
def explorer():
    explorer = pk.MaskExplorer()
    assert explorer.wait(SOON)
    explorer.show(0.75, criterion="magnitude")
    return explorer


def kept(explorer) -> float:
    return explorer.figure().table["kept"].mean()


def test_what_was_cancelled_has_no_figure(explorer, monkeypatch):
    assert kept(explorer) == 0.25
    looking = threading.Event()

    def look(self, layer, criterion, watch):
        looking.set()
        while not watch(0, 1):
            threading.Event().wait(0.01)
        raise pk.Cancelled

    with monkeypatch.context() as endless:
        endless.setattr(Scores, "look", look)
        explorer.show(0.5, criterion="wanda")
        assert looking.wait(SOON)
        explorer.cancel.click()
        assert explorer.wait(SOON)
        with pytest.raises(ValueError, match="what was asked for last was stopped"):
            explorer.figure()
    explorer.again.click()
    assert explorer.wait(SOON)
    assert kept(explorer) == 0.5


def test_what_failed_has_no_figure_until_something_else_is_asked_for(explorer, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Scores, "mask", lambda *_: 1 / 0)
        explorer.show(0.5)
    with pytest.raises(ValueError, match="this has failed: ZeroDivisionError: division by zero") as caught:
        explorer.figure()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    explorer.show(0.25)
    assert kept(explorer) == 0.75


def test_what_could_not_be_begun_has_no_figure(explorer, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as crowded:
        crowded.setattr(threading.Thread, "start", start)
        explorer.show(0.5, criterion="wanda")
    assert "can't start new thread" in words(explorer)
    with pytest.raises(ValueError, match="this has failed: RuntimeError: can't start new thread"):
        explorer.figure()


def test_an_explorer_is_no_figure_but_has_one(explorer, tmp_path):
    with pytest.raises(ValueError, match=r"got a MaskExplorer; give its figure\(\)"):
        pk.save_figure(explorer, tmp_path / "mask")
    assert len(pk.save_figure(explorer.figure(), tmp_path / "mask")) == 4


def test_a_bad_argument_leaves_the_figure_as_it_was(explorer):
    with pytest.raises(ValueError, match="criterion is 'size'"):
        explorer.show(0.5, criterion="size")
    assert kept(explorer) == 0.25
