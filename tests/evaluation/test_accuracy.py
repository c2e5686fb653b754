"""Accuracy, the protocols of several boxes and the confidence interval, against plain loops and known results."""

import evaluate
import numpy as np
import pytest

from epmvg_hf import GroundingAccuracy
from epmvg_hf.evaluation import accuracy
from epmvg_hf.evaluation.accuracy import bootstrap_interval, evaluate_boxes, paired_iou


def _iou(a, b) -> float:
    intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def _random_boxes(rng, count) -> np.ndarray:
    corners = rng.uniform(0, 20, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(5, 20, (count, 2))], axis=-1)


def test_paired_iou_equals_a_loop():
    rng = np.random.default_rng(0)
    boxes, references = _random_boxes(rng, 50), _random_boxes(rng, 50)
    boxes[0] = references[0]
    boxes[1] = references[1] = [5, 5, 5, 5]  # two empty boxes
    boxes[2] += 100  # no overlap
    expected = [_iou(a, b) for a, b in zip(boxes, references, strict=True)]
    np.testing.assert_allclose(paired_iou(boxes, references), expected, rtol=0, atol=1e-12)


def test_metric_counts_every_expression_once_and_thresholds_are_inclusive():
    predictions = [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]
    references = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 7], [0, 0, 10, 10]]  # IoU 1, 0.5, 0.7, 0
    scores = GroundingAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert scores == {"acc@0.5": 0.75, "acc@0.7": 0.5, "mean_iou": (1 + 0.5 + 0.7 + 0) / 4}


def test_evaluate_loads_the_file_offline(tmp_path):
    metric = evaluate.load(accuracy.__file__, cache_dir=tmp_path)
    scores = metric.compute(predictions=np.array([[0.0, 0, 4, 4]]), references=np.array([[0.0, 0, 4, 4]]))
    assert scores["acc@0.5"] == 1


def test_both_protocols_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    predictions = _random_boxes(rng, 60)
    every = [_random_boxes(rng, count) for count in rng.integers(1, 5, 60)]
    merged = np.array([[*boxes[:, :2].min(0), *boxes[:, 2:].max(0)] for boxes in every])
    result = evaluate_boxes(predictions, merged, ["a"] * 60, [boxes.tolist() for boxes in every])

    merged_iou = [_iou(p, box) for p, box in zip(predictions, merged, strict=True)]
    best_iou = [max(_iou(p, box) for box in boxes) for p, boxes in zip(predictions, every, strict=True)]
    assert result["acc@0.5"] == pytest.approx(sum(value >= 0.5 for value in merged_iou) / 60)
    assert result["any_box_acc@0.5"] == pytest.approx(sum(value >= 0.5 for value in best_iou) / 60)
    assert result["acc@0.5"] != result["any_box_acc@0.5"]
    assert result["mean_iou"] == pytest.approx(sum(merged_iou) / 60)
    assert (result["expressions"], result["images"]) == (60, 1)
    assert "any_box_acc@0.5" not in evaluate_boxes(predictions, merged, ["a"] * 60)


NONE = pytest.mark.parametrize("none", [None, [float("nan")] * 4], ids=["None", "NaN"])


@NONE
def test_rows_without_a_box_do_not_count(none):
    rng = np.random.default_rng(0)
    predictions, references = _random_boxes(rng, 6), _random_boxes(rng, 6).tolist()
    images, every = list("aabbcc"), [[box] for box in references]
    expected = evaluate_boxes(predictions, references, images, every)
    rows = [0, 1, 2, 2, 3, 4, 5]  # row 3 repeats the prediction of row 2, but has no box and another image
    images.insert(3, "none")
    references.insert(3, none)
    every.insert(3, [])
    assert evaluate_boxes(predictions[rows], references, images, every) == expected
    metric = GroundingAccuracy(keep_in_memory=True)
    assert metric.compute(predictions=predictions[rows], references=references)["mean_iou"] == expected["mean_iou"]


@NONE
def test_no_row_with_a_box_is_an_error(none):
    with pytest.raises(ValueError, match="none of the 2 rows of the references has a box, expected at least one"):
        evaluate_boxes(np.zeros((2, 4)), [none, none], ["a", "b"])
    with pytest.raises(ValueError, match="none of the 2 rows of the references has a box, expected at least one"):
        GroundingAccuracy(keep_in_memory=True).compute(predictions=np.zeros((2, 4)), references=[none, none])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([[0, 0, 1, 1]], [[0, 0, 1, float("nan")]], ["a"]),
            r"row 0 of the references is \[0.0, 0.0, 1.0, nan\], expected",
        ),
        (([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1]], ["a"]), "2 predictions, 1 references and 1 image_ids, expected equally"),
        (([[0, 0, 1, 1]], [[0, 0, 1, 1]], ["a"], [[]]), r"all_references\[0\] is empty although references\[0\] is a"),
    ],
)
def test_boxes_that_cannot_be_compared(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_boxes(*arguments)


def test_interval_is_that_of_a_proportion_and_wider_for_clusters():
    rng = np.random.default_rng(3)
    values = (rng.random(400) < 0.3).astype(float)
    # With one expression per image, it is the normal approximation for a proportion.
    half = 1.96 * (values.mean() * (1 - values.mean()) / 400) ** 0.5
    interval = bootstrap_interval(values, [str(row) for row in range(400)])
    assert interval == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01)
    # With ten expressions per image, all right or all wrong, it is as wide as for a tenth of the expressions.
    clustered = np.repeat((rng.random(40) < 0.3).astype(float), 10)
    low, high = bootstrap_interval(clustered, [str(row // 10) for row in range(400)])
    half = 1.96 * (clustered.mean() * (1 - clustered.mean()) / 40) ** 0.5
    assert high - low == pytest.approx(2 * half, abs=0.04)
    assert bootstrap_interval(values, ["one image"] * 400) == [values.mean()] * 2
