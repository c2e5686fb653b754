"""Boxes that a teacher draws, against a loop over cells and against pictures with one coloured rectangle each."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from torch import nn

from epmvg_hf import add_teacher_boxes, confirm_boxes
from epmvg_hf.distillation.teacher_boxes import boxes_of_maps
from epmvg_hf.model.letterbox import Letterbox
from tests.fixtures.tiny_teacher import TinyTeacher

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourTeacher(TinyTeacher):
    """Its patches are as similar to the name of a colour as their colour is."""

    def encode_images(self, pixel_values, output_patches=True):
        patches = nn.functional.adaptive_avg_pool2d(pixel_values.float(), 16).permute(0, 2, 3, 1)
        return patches.mean((1, 2)), patches

    def encode_texts(self, expressions):
        return torch.tensor([COLOURS[text] for text in expressions]) / 255


def _picture(size: tuple[int, int], **boxes: tuple[int, int, int, int]) -> PILImage.Image:
    picture = PILImage.new("RGB", size)
    for colour, box in boxes.items():
        picture.paste(COLOURS[colour], box)
    return picture


@pytest.fixture
def rows() -> Dataset:
    wide = _picture((320, 160), red=(40, 20, 120, 100), blue=(200, 60, 300, 140))
    high = _picture((96, 256), green=(10, 130, 80, 240))
    columns = {
        "image": [wide, high, wide, wide],
        "image_id": ["wide", "high", "wide", "wide"],
        "expression": ["red", "green", "blue", "green"],
        "box": [None, [float("nan")] * 4, [1.0, 2.0, 3.0, 4.0], None],
        "absent": [False, False, False, True],
    }
    box, boolean = List(Value("float32"), length=4), Value("bool")
    types = {
        "image": Image(),
        "image_id": Value("string"),
        "expression": Value("string"),
        "box": box,
        "absent": boolean,
    }
    return Dataset.from_dict(columns, features=Features(types))


def test_boxes_are_around_what_is_named_and_others_stay(rows, tmp_path):
    drawn = add_teacher_boxes(rows, ColourTeacher(), cache_dir=tmp_path, disable_tqdm=True)
    boxes = drawn["box"][:]
    # A patch is 20 pixels of the wide picture and 16 of the high one, and edges lie on quarters of a patch.
    np.testing.assert_allclose(boxes[0], [40, 20, 120, 100], atol=10)
    np.testing.assert_allclose(boxes[1], [10, 130, 80, 240], atol=8)
    assert boxes[2:] == [[1.0, 2.0, 3.0, 4.0], None]
    assert drawn.features == rows.features and drawn["expression"][:] == rows["expression"][:]


def test_captions_get_a_column_of_boxes(rows, tmp_path):
    captions = rows.select([0, 1]).remove_columns(["box", "absent"])
    drawn = add_teacher_boxes(captions, ColourTeacher(), cache_dir=tmp_path, disable_tqdm=True)
    np.testing.assert_allclose(drawn["box"][0], [40, 20, 120, 100], atol=10)
    # Nothing is computed twice, and what has all its boxes needs no teacher.
    again = add_teacher_boxes(captions, ColourTeacher(), cache_dir=tmp_path, disable_tqdm=True)
    assert again["box"][:] == drawn["box"][:] and again._fingerprint == drawn._fingerprint
    assert add_teacher_boxes(drawn, ColourTeacher())["box"][:] == drawn["box"][:]


def test_boxes_are_confirmed_where_student_and_teacher_agree(rows, tmp_path):
    # Of the first image about the red rectangle, far from the green one, and half of the blue one.
    predicted = np.array([[42, 22, 118, 98], [0, 0, 20, 20], [200, 60, 250, 140], [0, 0, 320, 160]], np.float32)
    rows = rows.select([3, 0, 1, 2]).select([1, 2, 3])
    drawn = add_teacher_boxes(rows.remove_columns(["box", "absent"]), ColourTeacher(), disable_tqdm=True)["box"][:]
    means = (predicted[:3] + np.array(drawn, np.float32)) / 2
    kept = confirm_boxes(rows, predicted[:3], ColourTeacher(), cache_dir=tmp_path, disable_tqdm=True)
    assert kept.column_names == ["image", "image_id", "expression", "box"] and kept["expression"][:] == ["red"]
    assert kept["box"][:] == [means[0].tolist()]
    both = confirm_boxes(rows, predicted[:3], ColourTeacher(), min_iou=0.3, cache_dir=tmp_path, disable_tqdm=True)
    assert both["expression"][:] == ["red", "blue"] and both["box"][1] == means[2].tolist()
    none = confirm_boxes(rows, predicted[:3], ColourTeacher(), min_iou=1.0, cache_dir=tmp_path, disable_tqdm=True)
    assert len(none) == 0 and none.features["box"] == kept.features["box"]
    with pytest.raises(ValueError, match="there are 4 boxes for 3 rows"):
        confirm_boxes(rows, predicted, ColourTeacher())


@pytest.mark.parametrize("size", [(100, 100), (90, 160), (200, 120)])
def test_boxes_of_maps_equal_a_loop_over_cells(size):
    maps = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    letterbox = Letterbox.place([size] * 5, canvas=128)
    (top, left, height, width), *_ = letterbox.windows()
    fine = nn.functional.interpolate(maps[:, None], size=(16, 16), mode="bilinear")[:, 0]
    for fraction in (0.3, 0.6, 0.9):
        boxes = boxes_of_maps(maps, letterbox, fraction)
        for cells, box in zip(fine, boxes, strict=True):
            values = {
                (row, column): cells[row, column].item()
                for row in range(16)
                for column in range(16)
                if top < 8 * row + 8 and 8 * row < top + height and left < 8 * column + 8 and 8 * column < left + width
            }
            lowest, highest = min(values.values()), max(values.values())
            inside = [cell for cell, value in values.items() if value >= lowest + fraction * (highest - lowest)]
            y, x = zip(*inside, strict=True)
            corners = torch.tensor([8 * min(x) - left, 8 * min(y) - top, 8 * max(x) + 8 - left, 8 * max(y) + 8 - top])
            pixels = (corners / letterbox.ratio[0]).clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
            torch.testing.assert_close(box, pixels.float(), atol=1e-3, rtol=1e-5)


def test_what_no_box_can_be_drawn_from_is_an_error(rows, tmp_path, monkeypatch):
    teacher = ColourTeacher()
    with pytest.raises(ValueError, match="fraction is 1, expected a number between 0 and 1"):
        add_teacher_boxes(rows, teacher, fraction=1)
    monkeypatch.setitem(COLOURS, "green", (float("nan"), 0, 0))
    with pytest.raises(ValueError, match="Teacher: expressions: text_embeds of number 1 has NaN"):
        add_teacher_boxes(rows, teacher, cache_dir=tmp_path, disable_tqdm=True)
    teacher.has_patches = False
    with pytest.raises(ValueError, match="the teacher has no patches"):
        add_teacher_boxes(rows, teacher)


def test_a_strip_has_a_box_within_it(tmp_path):
    strip = Dataset.from_list([{"image": _picture((2000, 6), red=(0, 0, 900, 6)), "expression": "red", "box": None}])
    ((x0, y0, x1, y1),) = add_teacher_boxes(strip, ColourTeacher(), cache_dir=tmp_path, disable_tqdm=True)["box"][:]
    assert 0 <= x0 < x1 <= 2000 and 0 <= y0 < y1 <= 6


@pytest.mark.parametrize("kind", ["int64", "float64"])
def test_drawn_boxes_keep_their_fractions(rows, tmp_path, kind):
    others = rows.select([0, 2]).cast_column("box", List(Value(kind), length=4)).with_format("torch")
    drawn = add_teacher_boxes(others, ColourTeacher(), cache_dir=tmp_path, disable_tqdm=True)
    expected = add_teacher_boxes(rows.select([0, 2]), ColourTeacher(), cache_dir=tmp_path, disable_tqdm=True)
    assert drawn["box"][:] == expected["box"][:] and drawn["box"][1] == [1.0, 2.0, 3.0, 4.0]
