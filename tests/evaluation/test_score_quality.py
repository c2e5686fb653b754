import itertools

import numpy as np
import pytest
from PIL import Image

from epmvg_hf.evaluation.accuracy import evaluate_boxes
from epmvg_hf.evaluation.score_quality import (
    accuracy_over_coverage,
    draw_scores,
    evaluate_scores,
    measure_calibration,
    presence_auroc,
)


def _made_up(count: int = 500, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Rounded scores, of which many are equal, and whether their boxes are right."""
    rng = np.random.default_rng(0)
    scores = rng.beta(2, 1, count).round(decimals)
    return scores, rng.random(count) < scores**2


# Calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [10, 15])
def test_calibration_equals_a_loop(num_bins):
    scores, is_right = _made_up(decimals=3)
    error, bins = 0.0, []
    for index in range(num_bins):
        lower, upper = index / num_bins, (index + 1) / num_bins
        rows = [row for row, score in enumerate(scores) if lower < score <= upper or (index == 0 and score == 0)]
        if rows:
            mean_score = sum(scores[row] for row in rows) / len(rows)
            accuracy = sum(is_right[row] for row in rows) / len(rows)
            error += len(rows) / len(scores) * abs(mean_score - accuracy)
            bins.append((lower, upper, len(rows), mean_score, accuracy))
    found = measure_calibration(scores, is_right, num_bins)
    assert found.error == pytest.approx(error)
    for full, expected in zip(found.bins, bins, strict=True):
        assert (full.lower, full.upper, full.count, full.mean_score, full.accuracy) == pytest.approx(expected)


def test_calibration_of_known_cases():
    assert measure_calibration([1.0, 1.0, 0.0], [True, True, False]).error == 0
    assert measure_calibration([1.0, 0.0], [False, True]).error == 1
    # Errors within one interval cancel: three quarters are right, as the scores say on average.
    assert measure_calibration([0.74, 0.76] * 2, [True, True, True, False], num_bins=2).error == pytest.approx(0)
    # Fifteen intervals unless told otherwise, closed above, and those without expressions are left out.
    bins = measure_calibration([0.0, 0.2, 0.2, 1.0], [False] * 4).bins
    assert [(full.lower, full.upper, full.count) for full in bins] == [
        (0, 1 / 15, 1),
        (2 / 15, 3 / 15, 2),
        (14 / 15, 1, 1),
    ]


# Coverage ----------------------------------------------------------------------------------------------------------


def test_coverage_is_the_mean_over_all_orders_of_equal_scores():
    scores, is_right = [0.9, 0.5, 0.5, 0.5, 0.1, 0.1], [True, True, False, False, True, False]
    curves = []
    for order in itertools.permutations(range(6)):
        if all(scores[one] >= scores[other] for one, other in itertools.pairwise(order)):
            curves.append([sum(is_right[row] for row in order[:kept]) / kept for kept in range(1, 7)])
    assert len(curves) == 12
    assert accuracy_over_coverage(scores, is_right) == pytest.approx(np.mean(curves, axis=0))


def test_coverage_does_not_depend_on_the_order_of_rows():
    scores, is_right = _made_up()
    curve = accuracy_over_coverage(scores, is_right)
    order = np.argsort(is_right)  # a plain sort by score would favour what comes first
    np.testing.assert_array_equal(accuracy_over_coverage(scores[order], is_right[order]), curve)
    np.testing.assert_array_equal(accuracy_over_coverage(scores[order[::-1]], is_right[order[::-1]]), curve)
    assert curve[-1] == pytest.approx(is_right.mean())
    assert curve[:100].min() > curve[-1]  # these scores know something


def test_equal_scores_leave_the_accuracy_of_all():
    assert accuracy_over_coverage([0.3] * 4, [True, False, False, False]).tolist() == [0.25] * 4


# Presence ----------------------------------------------------------------------------------------------------------


def test_auroc_equals_a_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    present, absent = rng.beta(2, 1, 90).round(1), rng.beta(1, 2, 70).round(1)
    pairs = [1.0 if one > other else 0.5 if one == other else 0.0 for one in present for other in absent]
    assert pairs.count(0.5) > 100
    assert presence_auroc(present, absent) == pytest.approx(sum(pairs) / len(pairs))
    assert presence_auroc(absent, present) == pytest.approx(1 - sum(pairs) / len(pairs))


def test_auroc_equals_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, is_present = _made_up()
    expected = metrics.roc_auc_score(is_present, scores)
    assert presence_auroc(scores[is_present], scores[~is_present]) == pytest.approx(expected)


def test_auroc_of_known_cases():
    assert presence_auroc([0.9, 0.8], [0.1]) == 1
    assert presence_auroc([0.1], [0.9, 0.8]) == 0
    assert presence_auroc([0.5] * 3, [0.5] * 2) == 0.5


# All of it ---------------------------------------------------------------------------------------------------------


def _boxes() -> tuple[np.ndarray, np.ndarray, list[list[float] | None], list[bool]]:
    """Scores, predicted boxes, true boxes, and which objects are absent. Five of the first eight boxes are right."""
    right, wrong = [0, 0, 10, 5], [0, 0, 10, 4.9]  # an IoU of 0.5 is enough
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.35, 0.1, 1.0])
    predictions = np.array([right, right, right, wrong, right, wrong, right, wrong, right, right, right])
    # Rows 8 and 9 name what is absent. Nobody knows whether what row 10 names is there.
    return scores, predictions, [[0, 0, 10, 10]] * 8 + [None] * 3, [False] * 8 + [True] * 2 + [False]


def test_all_measures_of_predicted_boxes():
    scores, predictions, references, is_absent = _boxes()
    result = evaluate_scores(scores, predictions, references, is_absent)
    is_right = [True, True, True, False, True, False, True, False]
    assert result == pytest.approx(
        {
            "calibration_error": measure_calibration(scores[:8], is_right).error,
            "acc@0.5_at_coverage_0.25": 1.0,
            "acc@0.5_at_coverage_0.5": 3 / 4,
            "acc@0.5_at_coverage_0.75": 4 / 6,
            "acc@0.5": 5 / 8,
            "area_over_coverage": np.mean([1, 1, 1, 3 / 4, 4 / 5, 4 / 6, 5 / 7, 5 / 8]),
            "presence_auroc": (8 + 6) / 16,
        }
    )
    assert result["acc@0.5"] == evaluate_boxes(predictions, references, ["a"] * 11)["acc@0.5"]
    assert all(type(value) is float for value in result.values())  # a report can be written as JSON
    assert "presence_auroc" not in evaluate_scores(scores, predictions, references)


def test_a_fraction_of_a_box_is_rounded_up():
    boxes = [[0, 0, 10, 10], [5, 5, 9, 9], [5, 5, 9, 9]]
    result = evaluate_scores([0.9, 0.5, 0.1], boxes, [[0, 0, 10, 10]] * 3)
    assert result["acc@0.5_at_coverage_0.25"] == 1  # one box
    assert result["acc@0.5_at_coverage_0.5"] == 1 / 2  # two boxes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, r"^scores are None: the model has no score head, so it gives no scores\.$"),
        ({"scores": [None] * 11}, "the model has no score head"),
        ({"scores": [0.5] * 10}, "there are 10 scores, 11 predictions and 11 references, expected equally many"),
        ({"references": [None] * 11}, "none of the 11 rows of the references has a box"),
        ({"is_absent": [True]}, r"is_absent has the shape \(1,\), but there are 11 scores, expected \(11,\)"),
        ({"is_absent": [False] * 11}, "there are no absent_scores, expected at least one"),
        ({"is_absent": [False] * 7 + [True] * 4}, r"is_absent\[7\] is true although references\[7\] is a box"),
        ({"is_absent": [0.0] * 11}, "is_absent has values of the type float64, expected truth values"),
    ],
)
def test_bad_inputs_are_named(change, message):
    names = ("scores", "predictions", "references", "is_absent")
    with pytest.raises(ValueError, match=message):
        evaluate_scores(**dict(zip(names, _boxes(), strict=True)) | change)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.5, 1.5], r"scores\[1\] is 1\.5, expected a probability in \[0, 1\]"),
        ([-0.1, 0.5], r"scores\[0\] is -0\.1, expected a probability"),
        ([0.5, float("nan")], r"scores\[1\] is nan, expected a probability"),
        ([0.5, None], "scores are None: the model has no score head"),
        ([], "there are no scores, expected at least one"),
        ([[0.5], [0.5]], r"scores have the shape \(2, 1\), expected \(N,\)"),
        ([0.5], r"is_right has the shape \(2,\), but there are 1 scores"),
    ],
)
@pytest.mark.parametrize("measure", [measure_calibration, accuracy_over_coverage])
def test_bad_scores_are_named(measure, scores, message):
    with pytest.raises(ValueError, match=message):
        measure(scores, [True, False])


def test_an_iou_is_no_truth_value():
    """As truth values, all of them would be right."""
    with pytest.raises(ValueError, match="is_right has values of the type float64, expected truth values"):
        measure_calibration([0.5, 0.5], [0.1, 0.9])


def test_other_bad_inputs_are_named():
    with pytest.raises(ValueError, match="there are no present_scores, expected at least one"):
        presence_auroc([], [0.5])
    with pytest.raises(ValueError, match=r"absent_scores\[0\] is 2\.0"):
        presence_auroc([0.5], [2.0])
    with pytest.raises(ValueError, match="num_bins is 0, expected at least 1"):
        measure_calibration([0.5], [True], num_bins=0)


# The picture -------------------------------------------------------------------------------------------------------


def test_picture_shows_bars_and_curve(tmp_path):
    draw_scores(tmp_path / "scores.png", *_made_up())
    pixels = np.asarray(Image.open(tmp_path / "scores.png").convert("RGB"))
    middle = pixels.shape[1] // 2
    bars, curve = (pixels == [176, 196, 222]).all(-1), (pixels == [31, 119, 180]).all(-1)
    assert bars[:, :middle].sum() > 10_000 and not bars[:, middle:].any()
    assert curve[:, middle:].sum() > 400 and not curve[:, :middle].any()
    # Bars rise with the score, and the curve falls with the coverage.
    rows, columns = np.nonzero(curve[:400, middle:])
    assert rows[columns < columns.max() / 4].mean() < rows[columns > columns.max() * 3 / 4].mean()
    heights = bars[:400, :middle].sum(0)
    assert heights[: middle // 3].max() < heights[2 * middle // 3 :].max()
