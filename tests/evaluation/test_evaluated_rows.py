"""Tests of merging the results of several processes."""

import numpy as np
import pytest

from epmvg_hf.evaluation.evaluated_rows import EvaluatedRows


def _batch(
    rows: list[int], loss: float | None = None, without_box: tuple[int, ...] = (), absent: tuple[int, ...] = ()
) -> dict:
    """Row i is predicted as [i, 0, i + 1, 1] with the score i / 10; its true box is one larger."""
    predictions = np.array([[row, 0, row + 1, 1] for row in rows], np.float32)
    batch = {"row_index": rows, "predictions": predictions}
    if loss is not None:
        batch["has_box"] = np.array([row not in without_box + absent for row in rows])
        batch["is_absent"] = np.array([row in absent for row in rows])
        batch["references"] = predictions + 1
        batch["references"][~batch["has_box"]] = np.nan
        batch["losses"] = {"loss": loss, "loss_map": 2 * loss, "loss_score": 3 * loss}
    return batch


def test_every_row_counts_once_in_the_order_of_the_dataset():
    """The last batch was filled up with rows that another process has too, so its loss counts for its new row only."""
    rows = EvaluatedRows.merge([_batch([2, 0], 1.0), _batch([4, 3], 2.0), _batch([1, 2, 0], 8.0)])
    assert rows.predictions[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(rows.references, rows.predictions + 1)
    mean = (2 * 1 + 2 * 2 + 1 * 8) / 5
    assert rows.losses == pytest.approx({"loss": mean, "loss_map": 2 * mean, "loss_score": 3 * mean})
    assert rows.scores is None


def test_rows_without_a_box_weigh_nothing():
    rows = EvaluatedRows.merge([_batch([0, 1], 1.0, without_box=(1,)), _batch([2, 3], 4.0)])
    assert np.isnan(rows.references).any(-1).tolist() == [False, True, False, False]
    assert rows.has_box.tolist() == [True, False, True, True]
    assert rows.predictions.shape == (4, 4) and rows.losses["loss"] == (1 * 1 + 2 * 4) / 3
    assert EvaluatedRows.merge([_batch([0], 0.0, without_box=(0,))]).losses == {}


def test_absent_rows_weigh_in_the_loss_of_the_scores_alone():
    batches = [_batch([3, 1], 1.0, without_box=(1,)), _batch([2, 0], 4.0, absent=(0,))]
    rows = EvaluatedRows.merge([{**batch, "scores": np.array(batch["row_index"]) / 10} for batch in batches])
    assert rows.is_absent.tolist() == [True, False, False, False]
    assert rows.has_box.tolist() == [False, False, True, True]
    assert rows.scores.tolist() == [0, 0.1, 0.2, 0.3]
    assert rows.losses == {"loss": (1 + 4) / 2, "loss_map": 2 * (1 + 4) / 2, "loss_score": 3 * (1 * 1 + 2 * 4) / 3}


def test_data_without_boxes_and_without_rows():
    rows = EvaluatedRows.merge([_batch([1]), _batch([0])])
    assert rows.predictions[:, 0].tolist() == [0, 1] and rows.references is None and rows.losses == {}
    assert EvaluatedRows.merge([]).predictions.shape == (0, 4)
