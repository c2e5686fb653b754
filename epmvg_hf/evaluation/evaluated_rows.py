"""What an evaluation found, in the order of the dataset's rows, on any number of processes."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class EvaluatedRows:
    """
    N rows of a dataset, each once.

    Args:
        predictions (`np.ndarray` of shape `(N, 4)`): predicted boxes, xyxy in pixels.
        references (`np.ndarray` of shape `(N, 4)` or `None`):
            True boxes, xyxy in pixels, not finite where a row has none; `None` if the dataset has no boxes.
        losses (`dict[str, float]`): means over the rows with a box, empty if there are none.
    """

    predictions: np.ndarray
    references: np.ndarray | None
    losses: dict[str, float]

    @classmethod
    def merge(cls, batches: list[dict[str, Any]]) -> "EvaluatedRows":
        """
        Args:
            batches (`list[dict[str, Any]]`):
                Those of all processes, of n rows each: `row_index` (`list[int]`), `predictions` `(n, 4)` and, if the
                dataset has boxes, `references` `(n, 4)` and `losses` (`dict[str, float]`), means over the batch.
        """
        predictions, references, num_boxes = {}, {}, 0
        losses: defaultdict[str, float] = defaultdict(float)
        for batch in batches:
            # Accelerate fills up the last batches with images from the start; those rows count only once.
            new = [position for position, row in enumerate(batch["row_index"]) if row not in predictions]
            for position in new:
                predictions[batch["row_index"][position]] = batch["predictions"][position]
                if "references" in batch:
                    references[batch["row_index"][position]] = batch["references"][position]
            if "references" in batch:
                # Rows without a box are predicted, and measure nothing.
                boxes = int(np.isfinite(batch["references"][new]).all(-1).sum())
                num_boxes += boxes
                for name, value in batch["losses"].items():
                    losses[name] += value * boxes

        order = sorted(predictions)
        return cls(
            predictions=np.array([predictions[row] for row in order]).reshape(-1, 4),
            references=np.array([references[row] for row in order]) if references else None,
            losses={name: total / num_boxes for name, total in losses.items()} if num_boxes else {},
        )
