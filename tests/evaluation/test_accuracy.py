import evaluate
import numpy as np

from epmvg_hf import GroundingAccuracy
from epmvg_hf.evaluation import accuracy
from epmvg_hf.evaluation.accuracy import paired_iou


def _loop_iou(a, b) -> float:
    intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def test_paired_iou_equals_a_loop():
    rng = np.random.default_rng(0)
    corners = rng.random((2, 50, 2)) * 100
    boxes = np.concatenate([corners, corners + rng.random((2, 50, 2)) * 60], axis=-1)
    boxes[0, 0] = boxes[1, 0]
    boxes[:, 1] = [5, 5, 5, 5]  # two empty boxes
    expected = [_loop_iou(a, b) for a, b in zip(*boxes, strict=True)]
    np.testing.assert_allclose(paired_iou(*boxes), expected, rtol=0, atol=1e-12)


def test_metric_counts_every_expression_once_and_thresholds_are_inclusive():
    predictions = [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]
    references = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 7], [0, 0, 10, 10]]  # IoU 1, 0.5, 0.7, 0
    scores = GroundingAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert scores == {"acc@0.5": 0.75, "acc@0.7": 0.5, "mean_iou": (1 + 0.5 + 0.7 + 0) / 4}


def test_evaluate_loads_the_file_offline(tmp_path):
    metric = evaluate.load(accuracy.__file__, cache_dir=tmp_path)
    scores = metric.compute(predictions=np.array([[0.0, 0, 4, 4]]), references=np.array([[0.0, 0, 4, 4]]))
    assert scores["acc@0.5"] == 1
