"""The page of all explorers: each is made when its tab is opened, and one that fails harms no other."""

import base64

import ipywidgets as widgets
import pytest

import perpkit as pk
from perpkit.interactive.explorers import gallery as page
from perpkit.interactive.explorers.explorer import Explorer
from perpkit.interactive.plots.figure import DataFigure

NAMES = ("Sparsity", "Masks", "Outliers", "Distortion", "Adapters", "Soups", "Generation")
MADE = ("SparsityExplorer", "MaskExplorer", "OutlierExplorer", "DistortionExplorer")
MADE += ("AdapterExplorer", "SoupExplorer", "GenerationExplorer")


class Quiet(Explorer):
    """An explorer that shows an empty picture."""

    def __init__(self, *_, export_folder, store=None):
        super().__init__({}, export_folder=export_folder)
        figure = DataFigure(figsize=(1, 1))
        self._show(figure, figure.png())


@pytest.fixture
def made(monkeypatch):
    """The explorers that were made, which cost nothing here."""
    made = []

    def maker(name):
        def make(*arguments, **options):
            made.append(name)
            return Quiet(*arguments, **options)

        return make

    for name in MADE:
        monkeypatch.setattr(page, name, maker(name))
    return made


def test_an_explorer_is_made_when_its_tab_is_first_opened(made, tmp_path):
    gallery = pk.Gallery(export_folder=tmp_path)
    assert gallery.titles == NAMES
    assert made == ["SparsityExplorer"]
    for place in (3, 0, 3, 6):
        gallery.selected_index = place
    assert made == ["SparsityExplorer", "DistortionExplorer", "GenerationExplorer"]
    opened = [len(tab.children) == 2 for tab in gallery.children]
    assert opened == [True, False, False, True, False, False, True]
    assert gallery.children[3].children[1] is gallery.explorer("Distortion")


def test_every_tab_says_what_to_do(made):
    gallery = pk.Gallery()
    for name, tab in zip(NAMES, gallery.children, strict=True):
        gallery.explorer(name)
        assert len(tab.children[0].value) > 40
    assert sorted(made) == sorted(MADE)


def test_one_that_cannot_be_made_says_why_and_can_be_tried_again(made, monkeypatch):
    def broken(**_):
        raise ValueError("no <model> here")

    with monkeypatch.context() as broke:
        broke.setattr(page, "MaskExplorer", broken)
        gallery = pk.Gallery()
    gallery.selected_index = 1
    said = gallery.children[1].children[1]
    assert isinstance(said, widgets.HTML)
    assert "ValueError: no &lt;model&gt; here" in said.value
    gallery.selected_index = 2
    assert made == ["SparsityExplorer", "OutlierExplorer"]
    gallery._makers["Masks"] = page.MaskExplorer
    gallery.selected_index = 1
    assert made[-1] == "MaskExplorer"
    assert len(gallery.children[1].children) == 2


def test_a_page_without_a_kernel_has_a_picture(made):
    bundle = pk.Gallery()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_an_unknown_name_is_refused(made):
    with pytest.raises(ValueError, match="unknown explorer 'Mask'; the explorers are Sparsity, Masks"):
        pk.Gallery().explorer("Mask")
