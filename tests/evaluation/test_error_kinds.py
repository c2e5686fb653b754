import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmvg_hf.evaluation.accuracy import paired_iou
from epmvg_hf.evaluation.error_kinds import ERROR_KINDS, RIGHT, name_kinds, worst_first

TRUE = [100, 100, 200, 200]


def kind_of(box, true_box=TRUE) -> str:
    (kind,) = name_kinds(np.array([box], float), np.array([true_box], float))
    return kind


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([100, 100, 200, 150], "right"),  # the IoU is 0.5
        ([100, 100, 200, 149], "too small"),
        ([91, 100, 191, 149], "too small"),  # 91 % of it lie within the true box
        ([89, 100, 189, 149], "nearly right"),  # 89 %
        ([120, 120, 124, 124], "too small"),  # however low the IoU is
        ([0, 0, 640, 480], "too large"),
        ([109, 0, 640, 480], "too large"),
        ([111, 0, 640, 480], "wrong object"),
        ([300, 300, 400, 400], "wrong object"),
        ([183, 100, 283, 200], "wrong object"),  # the IoU is 0.093
        ([181, 100, 281, 200], "beside"),  # 0.105
        ([154, 100, 254, 200], "beside"),  # 0.299
        ([153, 100, 253, 200], "nearly right"),  # 0.307
        ([150, 150, 150, 150], "wrong object"),  # an empty box
    ],
)
def test_kinds_have_these_borders(box, kind):
    assert kind_of(box) == kind


def test_an_empty_true_box_does_not_lie_within_any_other():
    assert kind_of(TRUE, [150, 150, 150, 160]) == "wrong object"


sides = st.integers(0, 30)
boxes = st.tuples(sides, sides, sides, sides).map(
    lambda box: [*map(min, box[:2], box[2:]), *map(max, box[:2], box[2:])]
)


@given(boxes, boxes)
def test_each_box_is_right_or_has_one_kind_of_error_in_any_unit(box, true_box):
    box, true_box = np.array([box], float), np.array([true_box], float)
    (kind,) = name_kinds(box, true_box)
    assert kind in ERROR_KINDS or kind == RIGHT
    assert (kind == RIGHT) == (paired_iou(box, true_box)[0] >= 0.5)
    assert name_kinds(box * 4 + 8, true_box * 4 + 8).tolist() == [kind]
    swapped = {"too large": "too small", "too small": "too large"}
    assert name_kinds(true_box, box).tolist() == [swapped.get(kind, kind)]


def test_the_worst_come_first_and_rows_without_a_true_box_last():
    iou, scores = [0.7, np.nan, 0.0, 0.2, 0.0, np.nan], [0.1, 0.2, 0.3, 0.4, 0.9, 0.6]
    assert worst_first(iou, scores).tolist() == [4, 2, 3, 0, 5, 1]
    assert worst_first(iou).tolist() == [2, 4, 3, 0, 1, 5]
