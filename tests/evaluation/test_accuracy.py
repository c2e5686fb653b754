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
