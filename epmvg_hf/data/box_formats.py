"""Boxes and column names as users write them, and as rows hold them."""

import reprlib
from collections.abc import Collection, Iterable
from typing import Any

from .annotations import is_box

BOX_COLUMNS = {"xyxy": ("xmin", "ymin", "xmax", "ymax"), "xywh": ("x", "y", "width", "height")}


def check_columns(columns: Iterable[str], known: Collection[str]) -> None:
    """Raises a `ValueError` for a name that is none of our columns."""
    if unknown := [name for name in columns if name not in known]:
        raise ValueError(f"columns may rename {', '.join(known)}, not {', '.join(map(repr, unknown))}.")


def list_expressions(expressions: Any) -> list[Any]:
    """One expression or several. Whether they have words is for [`place_rows`] to say."""
    if expressions == []:
        raise ValueError("the expression is [], expected words or a list of such texts")
    return expressions if isinstance(expressions, list) else [expressions]


def to_xyxy(box: Any, box_format: str) -> list[float] | None:
    """Four finite numbers as xyxy. Whether such a box is empty is for [`place_rows`] to say."""
    if box is None:
        return None
    if not is_box(box):
        raise ValueError(f"the box is {reprlib.repr(box)}, expected 4 finite numbers")
    box = [float(value) for value in box]
    if box_format == "xyxy":
        return box
    x, y, width, height = box
    if not (width > 0 and height > 0):
        raise ValueError(f"the box {box} is empty, expected x, y, width and height with width > 0 and height > 0")
    return [x, y, x + width, y + height]


def look_normalised(boxes: Iterable[list[float] | None]) -> bool:
    """Whether there are boxes, and all of them end within the first pixel."""
    ends = [max(box) for box in boxes if box is not None]
    return bool(ends) and max(ends) <= 1.001  # a sum such as x + width is rounded
