"""The model for photos that comes along: what its card says of its folder, and that it grounds a photo."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from epmvg_hf import EpmVGForVisualGrounding
from epmvg_hf.evaluation.accuracy import paired_iou
from tests.fixtures.paths import ROOT

FOLDER = ROOT / "model_cards" / "epmvg-small-flickr30k"
PHOTO = ROOT / "examples" / "images" / "astronaut.jpg"
WOMAN = [18.0, 14.0, 343.0, 480.0]  # the astronaut, drawn by hand


def test_the_folder_is_small_and_loads_as_float32():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 64e6
    weights = load_file(FOLDER / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    model = EpmVGForVisualGrounding.from_pretrained(FOLDER)
    assert model.dtype == torch.float32 and model.config.score_head
    card = (FOLDER / "README.md").read_text()
    assert f"{model.num_parameters() / 1e6:.1f} M parameters" in card and "non-commercial research only" in card


@pytest.mark.parametrize("task", ["visual-grounding", "zero-shot-object-detection"])
def test_it_finds_a_woman_and_no_dog(task):
    finder, names = pipeline(task, model=str(FOLDER)), ["the woman in the orange suit", "a dog"]
    if task == "visual-grounding":
        woman, dog = finder(str(PHOTO), names, threshold=0.3)
        assert dog["box"] is None and dog["score"] < 0.3
    else:
        (woman,) = finder(str(PHOTO), candidate_labels=names, threshold=0.3)
    assert woman["score"] > 0.5
    assert paired_iou(np.array([list(woman["box"].values())]), np.array([WOMAN]))[0] > 0.5
