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
        losses (`dict[str, float]`): means over the rows with a box, empty if there are none.
    """

    predictions: np.ndarray
    references: np.ndarray | None
    has_box: np.ndarray
    losses: dict[str, float]

    @classmethod
    def merge(cls, batches: list[dict[str, Any]]) -> "EvaluatedRows":
        """
        Merges the batches of all processes.

        Args:
            batches (`list[dict[str, Any]]`):
                The batches of all processes, of n rows each: `row_index` (`list[int]`), `predictions` `(n, 4)` and,
                if the dataset has boxes, `references` `(n, 4)`, `has_box` `(n,)` and `losses` (`dict[str, float]`),
                which are means over the batch.
        """
        # Accelerate fills up the last batches with images from the start of the dataset. Those rows count once only.
        rows: dict[int, tuple[dict[str, Any], int]] = {}
        losses: defaultdict[str, float] = defaultdict(float)
        for batch in batches:
            new = [position for position, row in enumerate(batch["row_index"]) if row not in rows]
            rows.update({batch["row_index"][position]: (batch, position) for position in new})
            for name, value in batch.get("losses", {}).items():
                losses[name] += value * int(batch["has_box"][new].sum())

        def column(name: str) -> np.ndarray:
            return np.array([batch[name][position] for batch, position in ordered])

        ordered = [rows[row] for row in sorted(rows)]
        predictions = column("predictions").reshape(-1, 4)
        if not ordered or "references" not in ordered[0][0]:
            return cls(predictions, references=None, has_box=np.zeros(len(predictions), bool), losses={})
        has_box = column("has_box")
        num_boxes = int(has_box.sum())
        means = {name: total / num_boxes for name, total in losses.items()} if num_boxes else {}
        return cls(predictions, column("references"), has_box, means)
