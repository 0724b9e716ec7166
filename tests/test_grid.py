"""Grids: products, unions, files, and what is run only once."""

import json

import numpy as np
import pytest

import perpkit as pk

# --- grids ----------------------------------------------------------------------------------------


def test_a_grid_is_the_product_in_the_order_of_its_axes():
    grid = pk.Grid(retrain=["norms", "biases"], sparsity=[0.7, 0.3], seed=range(2))
    found = [(e.retrain, e.sparsity, e.seed) for e in grid]
    assert found == [
        ("norms", 0.7, 0),
        ("norms", 0.7, 1),
        ("norms", 0.3, 0),
        ("norms", 0.3, 1),
        ("biases", 0.7, 0),
        ("biases", 0.7, 1),
        ("biases", 0.3, 0),
        ("biases", 0.3, 1),
    ]
    assert len(grid) == 8
    assert repr(grid) == "Grid(8 experiments)"


def test_equal_experiments_are_kept_once_where_they_first_stood():
    grid = pk.Grid(seed=range(3), retrain=["biases", "none"], sparsity=[0.5, 0.5])
    assert [(e.retrain, e.seed) for e in grid] == [("biases", 0), ("none", 0), ("biases", 1), ("biases", 2)]


def test_a_single_value_needs_no_list():
    assert [e.asdict() for e in pk.Grid(retrain="biases", sparsity=0.7, seed=4)] == [
        pk.Experiment(retrain="biases", sparsity=0.7, seed=4).asdict()
    ]


def test_arrays_are_axes():
    grid = pk.Grid(sparsity=np.linspace(0.1, 0.9, 3), retrain="biases", seed=np.arange(2))
    assert len({e.key() for e in grid}) == len(grid) == 6


def test_an_empty_axis_is_refused():
    with pytest.raises(ValueError, match=r"axis 'sparsity' is empty"):
        pk.Grid(sparsity=[])


def test_an_unknown_axis_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown axis 'sparsities'; did you mean 'sparsity'\?.*criterion"):
        pk.Grid(sparsities=[0.5])


def test_a_bad_value_anywhere_in_a_grid_is_refused_before_anything_is_run():
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        pk.Grid(sparsity=[0.5, 1.5])


def test_an_axis_counts_only_where_it_means_something():
    grid = pk.Grid(
        retrain=["none", "biases", "mask_lora"], rank=[2, 4], unit=[None, "matrix"], unit_lr=[0.1, 0.2]
    )
    assert len(grid) == 2 * (1 + 1 + 2)
    assert {(e.retrain, e.rank) for e in grid} == {
        ("none", None),
        ("biases", None),
        ("mask_lora", 2),
        ("mask_lora", 4),
    }


def test_grids_are_united():
    union = pk.Grid(sparsity=[0.1, 0.2]) + pk.Grid(sparsity=[0.2, 0.3])
    assert [e.sparsity for e in union] == [0.1, 0.2, 0.3]


# --- files ----------------------------------------------------------------------------------------


def written(tmp_path, words: str, name: str = "grid.yaml"):
    file = tmp_path / name
    file.write_text(words)
    return file


def test_a_grid_is_read_from_yaml(tmp_path):
    words = """
    # what the lecture shows
    sparsity: [0.5, .7]
    retrain: [none, biases]
    lr: 1e-3
    pattern: [null, 2:4]
    seed: [0, 1]
    """
    grid = pk.Grid.from_file(written(tmp_path, words))
    same = pk.Grid(
        sparsity=[0.5, 0.7], retrain=["none", "biases"], lr=1e-3, pattern=[None, "2:4"], seed=[0, 1]
    )
    assert list(grid) == list(same)
    assert {e.pattern for e in grid} == {None, "2:4"}


def test_a_grid_is_read_from_json(tmp_path):
    words = json.dumps({"sparsity": [0.5, 0.7], "retrain": "biases"}, indent="\t")
    assert list(pk.Grid.from_file(written(tmp_path, words, "grid.json"))) == list(
        pk.Grid(sparsity=[0.5, 0.7], retrain="biases")
    )


def test_a_list_of_mappings_is_their_union_and_given_axes_replace_theirs(tmp_path):
    file = written(tmp_path, "- {sparsity: [0.1, 0.2]}\n- {sparsity: 0.2, criterion: random}\n")
    assert [(e.sparsity, e.criterion) for e in pk.Grid.from_file(str(file))] == [
        (0.1, "magnitude"),
        (0.2, "magnitude"),
        (0.2, "random"),
    ]
    assert [(e.sparsity, e.criterion) for e in pk.Grid.from_file(file, sparsity=0.9)] == [
        (0.9, "magnitude"),
        (0.9, "random"),
    ]


def test_what_yaml_merges_in_may_be_said_again(tmp_path):
    words = """
    - &base {sparsity: [0.5, 0.7], criterion: wanda}
    - <<: *base
      criterion: magnitude
    """
    grid = pk.Grid.from_file(written(tmp_path, words))
    assert [(each.sparsity, each.criterion) for each in grid] == [
        (0.5, "wanda"),
        (0.7, "wanda"),
        (0.5, "magnitude"),
        (0.7, "magnitude"),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sparsity: [0.5", "line 1"),
        ("{a: b}: 1", "unhashable"),
        ("seed: 2020-13-45", "month must be in 1..12"),
        ("seed: !!int abc", "invalid literal"),
        ("[" * 3000 + "]" * 3000, "recursion"),
        ("sparsitty: 0.5", "did you mean 'sparsity'"),
        ("sparsity: 1.5", "sparsity is 1.5"),
        ("0.5", "mapping from axes"),
        ("- 0.5", "mapping from axes"),
        ("1: 0.5", "mapping from axes"),
        ("", "mapping from axes"),
        ("[]", "is empty"),
        ("sparsity: []", "the axis 'sparsity' is empty"),
        ("sparsity: {a: 1}", "the axis 'sparsity' is {'a': 1}; it must be one value or a list of values"),
        ("model: {a: 1}", "the axis 'model' is {'a': 1}; it must be"),
        ("text: {train: a, test: b}", "the axis 'text' is {'train': 'a', 'test': 'b'}; it must be"),
        ("- text: [{train: a, test: b}]", "text is {'train': 'a', 'test': 'b'}; it must be text: storyworld"),
        ("retrain: [no, biases]", "retrain is False; it must be text: none, biases"),
        ("retrain: no", 'unless quoted, as "no"'),
        ("start: on", 'unless quoted, as "yes"'),
        ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_bad_grid_file_is_named_with_what_is_wrong(tmp_path, words, said):
    with pytest.raises(ValueError, match=r"grid\.yaml") as error:
        pk.Grid.from_file(written(tmp_path, words))
    assert said in str(error.value)


def test_a_grid_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot read the grid"):
        pk.Grid.from_file(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"text: caf\xe9")
    with pytest.raises(ValueError, match="cannot read the grid"):
        pk.Grid.from_file(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("grid.yaml", "sparsity: 0.5\nseed: 1\nsparsity: 0.7"),
        ("grid.yaml", "- seed: 1\n- {sparsity: 0.5, seed: 1, sparsity: 0.7}"),
        ("grid.json", '{"sparsity": 0.5, "seed": 1, "sparsity": 0.7}'),
    ],
)
def test_an_axis_that_a_file_has_twice_is_refused(tmp_path, name, words):
    """YAML and JSON would silently take the last."""
    (tmp_path / name).write_text(words)
    with pytest.raises(ValueError, match=r"has 'sparsity' twice; give all its values in one list"):
        pk.Grid.from_file(tmp_path / name)


def test_an_array_of_no_dimension_is_one_value():
    assert [e.sparsity for e in pk.Grid(sparsity=np.array(0.25))] == [0.25]
