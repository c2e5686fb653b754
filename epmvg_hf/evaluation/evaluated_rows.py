"""The results of an evaluation on any number of processes, in the order of the dataset's rows."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class EvaluatedRows:
    """
    The results for N rows of a dataset, each row once.

    Args:
        predictions (`np.ndarray` of shape `(N, 4)`): predicted boxes, xyxy in pixels.
        references (`np.ndarray` of shape `(N, 4)` or `None`):
            True boxes, xyxy in pixels, NaN in rows without a box; `None` if the dataset has no boxes.
        has_box (`np.ndarray` of shape `(N,)`): which rows have a true box.
        is_absent (`np.ndarray` of shape `(N,)`): which expressions are known to name nothing in their image.
        scores (`np.ndarray` of shape `(N,)` or `None`): scores of the predicted boxes, if the model gives them.
        losses (`dict[str, float]`): means over the rows with a box, that of the scores also over the absent rows;
            empty if there are none.
    """

    predictions: np.ndarray
    references: np.ndarray | None
    has_box: np.ndarray
    is_absent: np.ndarray
    scores: np.ndarray | None
    losses: dict[str, float]

    @classmethod
    def merge(cls, batches: list[dict[str, Any]]) -> "EvaluatedRows":
        """
        Merges the batches of all processes.

        Args:
            batches (`list[dict[str, Any]]`):
                The batches of all processes, of n rows each: `row_index` (`list[int]`), `predictions` `(n, 4)`, if the
                model gives them `scores` `(n,)` and, if the dataset has boxes, `references` `(n, 4)`, `has_box`
                `(n,)`, `is_absent` `(n,)` and `losses` (`dict[str, float]`), which are means over the batch.
        """
        # Accelerate fills up the last batches with images from the start of the dataset. Those rows count once only.
        rows: dict[int, tuple[dict[str, Any], int]] = {}
        totals: defaultdict[str, float] = defaultdict(float)
        counts: defaultdict[str, int] = defaultdict(int)
        for batch in batches:
            new = [position for position, row in enumerate(batch["row_index"]) if row not in rows]
            rows.update({batch["row_index"][position]: (batch, position) for position in new})
            for name, value in batch.get("losses", {}).items():
                counted = batch["has_box"] | batch["is_absent"] if name == "loss_score" else batch["has_box"]
                counts[name] += int(counted[new].sum())
                totals[name] += value * int(counted[new].sum())

        def column(name: str) -> np.ndarray:
            return np.array([batch[name][position] for batch, position in ordered])

        ordered = [rows[row] for row in sorted(rows)]
        predictions = column("predictions").reshape(-1, 4)
        scores = column("scores") if ordered and "scores" in ordered[0][0] else None
        if not ordered or "references" not in ordered[0][0]:
            none = np.zeros(len(predictions), bool)
            return cls(predictions, references=None, has_box=none, is_absent=none, scores=scores, losses={})
        means = {name: total / counts[name] for name, total in totals.items() if counts[name]}
        return cls(predictions, column("references"), column("has_box"), column("is_absent"), scores, means)
