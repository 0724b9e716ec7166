"""Texts side by side as a figure."""

import pandas as pd
import pytest

from perpkit.interactive.plots.texts import plot_texts


def table(*texts: str) -> pd.DataFrame:
    return pd.DataFrame({"version": [f"model {i}" for i in range(len(texts))], "text": list(texts)})


def drawn(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_column_for_each_version_and_the_prompt_above():
    figure = plot_texts(table(" once upon a time", "the the"), prompt="Tell me")
    assert drawn(figure) == ["model 0", "once upon a time", "model 1", "the the"]
    assert figure.axes[0].get_title(loc="left") == "prompt: Tell me"
    assert figure.table.equals(table(" once upon a time", "the the"))
    assert figure.png().startswith(b"\x89PNG")


def test_columns_do_not_overlap():
    figure = plot_texts(table(*["wide words everywhere " * 12] * 3))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts[1::2]]
    assert boxes[0].x1 < boxes[1].x0
    assert boxes[1].x1 < boxes[2].x0
    assert boxes[2].x1 <= figure.bbox.x1
    assert min(box.y0 for box in boxes) >= 0


def test_signs_are_drawn_as_they_are_and_what_the_font_lacks_as_boxes():
    figure = plot_texts(table("$5 and $6_x 你\x00\x07a", "_under"), prompt="$a$ 你")
    figure.png()
    assert drawn(figure)[1] == r"\$5 and \$6_x □□□a"
    assert figure.axes[0].get_title(loc="left") == r"prompt: \$a\$ □"


def test_paragraphs_stay():
    assert drawn(plot_texts(table("one\n\ntwo")))[1] == "one\n\ntwo"


def test_a_text_longer_than_a_page_is_cut_and_says_so():
    figure = plot_texts(table("word " * 3000))
    assert figure.get_supxlabel() == "texts that are longer are cut"
    assert figure.get_size_inches()[1] < 10
    assert figure.table["text"][0] == "word " * 3000
    assert plot_texts(table("word")).get_supxlabel() == ""


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (pd.DataFrame({"version": [], "text": []}), "no rows"),
        (pd.DataFrame({"text": ["a"]}), "no column 'version'"),
    ],
)
def test_bad_tables(bad, said):
    with pytest.raises(ValueError, match=said):
        plot_texts(bad)
