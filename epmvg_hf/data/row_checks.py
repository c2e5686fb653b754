"""Checks of the rows of a user's dataset, whose errors name a row and show its values as they are stored."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..model.letterbox import MAX_OVERHANG
from .annotations import find_problem
from .field_values import check_absent, to_xyxy


def place_of(row: int | None, image_id: Any) -> str:
    """Names a row for error messages, by its number and by the id of its image, as far as it has them."""
    number = "a row" if row is None else f"row {row}"
    return number if image_id is None else f"{number} (image_id {image_id!r})"


# The box of an expression that names nothing in its image, as `ImageGroup` and the labels of a model have it.
NOWHERE = [0.0, 0.0, 0.0, 0.0]


def check_row(
    where: str, expression: Any, box: Any, absent: Any, size: tuple[float, float] | None
) -> list[float] | None:
    """
    Checks a row as it is read.

    Args:
        where (`str`): what errors call the row.
        expression (`Any`): must be text with words.
        box (`Any`): must be xyxy pixels within the image, `None`, or four times NaN.
        absent (`Any`):
            Must be `True` for an expression that is known to name nothing in its image, else `False` or `None`.
        size (`tuple` or `None`): width and height of the image in pixels, if they are known.

    Returns:
        `list[float]` or `None`: the box; `None` for an expression without one, `NOWHERE` if it is absent.

    Raises:
        ValueError: the row cannot be used.
    """
    try:
        box, absent = to_xyxy(box, "xyxy"), check_absent(absent)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None
    if (problem := find_problem(expression, box, size, absent)) is not None:
        raise ValueError(f"{where}: {problem}.")
    return NOWHERE if absent else box


def check_features(features: datasets.Features) -> None:
    """Raises a `ValueError` if a column that is read by its name cannot hold what its name says."""
    absent = features.get("absent")
    if absent is not None and absent != datasets.Value("bool"):
        raise ValueError(f"the column 'absent' is {absent}, expected true or false.")
    expected = {"expression": "text", "image_id": "text or numbers", "box": "lists of four numbers"}
    for name, meaning in expected.items():
        feature = features.get(name)
        is_list = isinstance(feature, datasets.List | datasets.LargeList)
        is_value = isinstance(feature, datasets.Value) and (name != "expression" or "string" in feature.dtype)
        is_null = isinstance(feature, datasets.Value) and feature.dtype == "null"
        if feature is not None and not is_null and not (is_list if name == "box" else is_value):
            raise ValueError(
                f"the column {name!r} is {feature}, expected {meaning}; as_grounding_dataset brings other forms, such "
                "as lists of expressions, into this one."
            )


def read_boxes(column: pa.ChunkedArray) -> np.ndarray:
    """
    All boxes of a column at once, as float64 `(n, 4)`: NaN throughout where there is none, infinite where the value is
    not four numbers.
    """
    if pa.types.is_null(column.type):
        return np.full((len(column), 4), np.nan)
    has_four = pc.fill_null(pc.equal(pc.list_value_length(column), 4), False)
    boxes = np.full((len(column), 4), np.inf)
    boxes[pc.is_null(column).to_numpy()] = np.nan
    numbers = pc.list_flatten(column.filter(has_four)).cast(pa.float64(), safe=False)
    boxes[has_four.to_numpy()] = numbers.to_numpy().reshape(-1, 4)
    return boxes


def find_doubtful_rows(
    expressions: pa.ChunkedArray, boxes: np.ndarray | None, sizes: np.ndarray, absent: np.ndarray
) -> list[int]:
    """
    The rows that [`check_row`] may refuse, found without looking at each of them in Python.

    Args:
        expressions (`pa.ChunkedArray`): the column of expressions.
        boxes (`np.ndarray` of shape `(n, 4)` or `None`): what [`read_boxes`] returned.
        sizes (`np.ndarray` of shape `(n, 2)`): width and height of each row's image, infinite if unknown.
        absent (`np.ndarray` of shape `(n,)`): which expressions are known to name nothing in their image.
    """
    words = pc.utf8_trim_whitespace(expressions.cast(pa.large_string()))
    doubtful = pc.equal(pc.fill_null(words, ""), "").to_numpy()
    if boxes is not None:
        starts, ends = boxes[:, :2], boxes[:, 2:]
        fits = (starts < ends) & (starts >= -MAX_OVERHANG) & (ends > 0) & (starts < sizes)
        fits &= np.isfinite(ends) & (ends <= sizes + MAX_OVERHANG)
        has_none = np.isnan(boxes).all(axis=1)
        doubtful |= ~(fits.all(axis=1) | has_none) | (absent & ~has_none)
    return np.flatnonzero(doubtful).tolist()
