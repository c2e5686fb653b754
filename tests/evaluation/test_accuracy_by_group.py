import pytest

from epmvg_hf.evaluation.accuracy_by_group import GroupAccuracy, accuracy_by_group, size_of_box


def test_an_expression_counts_in_each_of_its_groups():
    names = [["people"], ["people", "clothing"], None, "clothing", []]
    groups = accuracy_by_group([True, False, True, False, True], names)
    assert groups == [GroupAccuracy("clothing", 2, 0.0), GroupAccuracy("people", 2, 0.5)]


def test_every_expression_has_a_name():
    with pytest.raises(ValueError, match="2 answers and 1 names"):
        accuracy_by_group([True, False], ["people"])


@pytest.mark.parametrize(("side", "size"), [(19.9, "small"), (20, "medium"), (49.9, "medium"), (50, "large")])
def test_sizes_are_shares_of_the_image(side, size):
    assert size_of_box([5, 5, 5 + side, 5 + side], 100, 100) == size
    assert size_of_box([0, 0, 2 * side, 2 * side], 200, 200) == size
