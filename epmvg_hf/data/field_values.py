"""
Values as users write them: boxes, expressions, ids, JSON objects and names of columns. Errors come without the place,
which the caller knows, and without a full stop.
"""

import json
import math
import reprlib
from collections.abc import Collection, Iterable
from typing import Any

from .annotations import is_box, show_box

BOX_COLUMNS = {"xyxy": ("xmin", "ymin", "xmax", "ymax"), "xywh": ("x", "y", "width", "height")}


def check_columns(columns: Iterable[str], known: Collection[str]) -> None:
    """Raises a `ValueError` if `columns`, the argument that says what the user calls our columns, has another name."""
    if unknown := [name for name in columns if name not in known]:
        raise ValueError(f"columns may rename {', '.join(known)}, not {', '.join(map(repr, unknown))}.")


def parse_json_object(text: str) -> dict[str, Any]:
    """A JSON object; a `ValueError` if the text is anything else."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise ValueError(f"not usable JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"not a JSON object but {reprlib.repr(parsed)}")
    return parsed


def check_id(value: Any, field: str) -> int | str:
    """An id; a `ValueError` if it is neither a number nor text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"the {field} is {reprlib.repr(value)}, expected a number or text")
    return value


def check_absent(value: Any) -> bool | None:
    """Whether an expression names nothing in its image, `None` if that is not said; a `ValueError` for all else."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"absent is {reprlib.repr(value)}, expected true or false")
    return value


def list_expressions(expressions: Any) -> list[Any]:
    """A list of one expression or several. [`place_rows`] checks that each of them has words."""
    if expressions == []:
        raise ValueError("the expression is [], expected words or a list of such texts")
    return expressions if isinstance(expressions, list) else [expressions]


def to_xyxy(box: Any, box_format: str) -> list[float] | None:
    """
    A box in either format as xyxy, or `None` for an expression without a box, for which users write `None` or four
    times NaN. [`place_rows`] checks that a box is not empty and within its image. An empty xywh box is refused here
    already, where the error can repeat the numbers that the user wrote.

    Raises:
        `ValueError`: The box is not four finite numbers (nor four times NaN), or its width or height in xywh is not
            positive.
    """
    if box is None or (isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_nan, box))):
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


def as_written(box: list[float] | None, box_format: str) -> str | None:
    """What errors show for a box from [`to_xyxy`], so that users find the numbers that they wrote."""
    if box is None or box_format == "xyxy":
        return None
    x0, y0, x1, y1 = box
    return f"{show_box([x0, y0, x1 - x0, y1 - y0])} (x, y, width, height)"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def look_normalised(boxes: Iterable[list[float] | None]) -> bool:
    """
    Whether boxes seem to be fractions of their image rather than pixels: all of them end within the first pixel, and
    not all coordinates are whole numbers. `[0, 0, 1, 1]` alone may well be meant in pixels.
    """
    values = [value for box in boxes if box is not None for value in box]
    return max(values, default=2.0) <= 1.001 and any(value % 1 for value in values)  # x + width may be rounded up
