import pytest

from epmvg_hf import load_grounding_dataset
from epmvg_hf.runs.training_rows import split_labelled


def test_the_first_images_keep_their_boxes_and_the_others_lose_them():
    dataset = load_grounding_dataset("shapes", split="train", num_images=5)
    labelled, captioned = split_labelled(dataset, 2)
    assert list(dict.fromkeys(labelled["image_id"])) == list(dict.fromkeys(dataset["image_id"]))[:2]
    assert len(labelled) + len(captioned) == len(dataset) and "box" not in captioned.column_names
    assert split_labelled(dataset, None) == (dataset, None)
    with pytest.raises(ValueError, match="expected 1 to 4 of the 5 images"):
        split_labelled(dataset, 5)


def test_expressions_that_describe_nothing_are_no_captions():
    dataset = load_grounding_dataset("shapes", split="train", num_images=5, absent_per_image=2)
    labelled, captioned = split_labelled(dataset, 2)
    assert sum(labelled["absent"]) == 2 * 2
    assert not any(captioned["absent"]) and len(captioned) == len(dataset) - len(labelled) - 3 * 2
