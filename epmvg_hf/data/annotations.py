"""The form into which all readers bring their annotations, and the checks of rows that they share."""

import math
import reprlib
from dataclasses import dataclass
from typing import Any

from ..model.letterbox import MAX_OVERHANG

MAX_COORDINATE = 1e9  # larger than any image; JSON and pickles can hold integers that no float can


@dataclass
class AnnotatedImage:
    """
    One image and its expressions, as read from an annotation file.

    Args:
        name (`str`): The name of the image file in the benchmark's folder of images.
        image_id (`str`): An id that is the same in every format of the benchmark.
        size (`tuple[int, int]` or `None`):
            Width and height in pixels of the image that the boxes were drawn on. Needed only where the image file may
            have another size; boxes are then scaled to it.
        rows (`list[dict[str, Any]]`):
            One dict per expression with `expression` (`str`), `box` (xyxy float pixels, 0-based and half-open, or
            `None` where there is none), `where` (file and row, for error messages), where errors should show the box
            as its user wrote it `written_box` (`str`), and the other columns of the format, among which `boxes` is a
            list of boxes like `box`, which is then the smallest around them, and `absent` says that the expression is
            known to name nothing in the image.
    """

    name: str
    image_id: str
    size: tuple[int, int] | None
    rows: list[dict[str, Any]]


def place_rows(
    annotated: AnnotatedImage, stored_size: tuple[int, int] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """
    Checks the rows of an image, and scales and cuts their boxes to the image file.

    Args:
        annotated ([`AnnotatedImage`]): The image.
        stored_size (`tuple[int, int]` or `None`): Width and height of the image file in pixels, if there is one.

    Returns:
        `tuple`: The usable rows, without what is for errors and with boxes in pixels of the image file, and a sentence
        for each other row. If one box reaches beyond the image by more than `MAX_OVERHANG` pixels, the file is
        probably not the image that the boxes were drawn on, so none of its rows is usable.
    """
    if not annotated.rows:
        return [], []
    if (problem := _problem_with_size(annotated, stored_size)) is not None:
        return [], [f"{annotated.rows[0]['where']}: {problem}."]
    size = annotated.size or stored_size or (math.inf, math.inf)  # of the image that the boxes were drawn on
    limits = stored_size or size
    scale = (limits[0] / size[0], limits[1] / size[1]) if annotated.size else (1.0, 1.0)
    rows, problems, beyond = [], [], False
    for row in annotated.rows:
        box, absent = row["box"], row.get("absent")
        # The smallest box around several is right if each of them is.
        for each in row.get("boxes") or [box]:
            problem = find_problem(row["expression"], each, size, absent, annotated.name, row.get("written_box"))
            if problem is not None:
                # Other problems are of a row alone, and are found without the size, too.
                if find_problem(row["expression"], each, None, absent) is None:
                    problem += ", so no row of that image is used"
                    beyond = True
                problems.append(f"{row['where']}: {problem}.")
                break
        else:
            placed = {name: value for name, value in row.items() if name not in ("where", "written_box")}
            placed["box"] = None if box is None else _place(box, scale, limits)
            if row.get("boxes") is not None:
                placed["boxes"] = [_place(each, scale, limits) for each in row["boxes"]]
            rows.append(placed)
    return ([] if beyond else rows), problems


def box_around(boxes: list[list[float]]) -> list[float]:
    """The smallest box around xyxy boxes."""
    xmins, ymins, xmaxs, ymaxs = zip(*boxes, strict=True)
    return [min(xmins), min(ymins), max(xmaxs), max(ymaxs)]


def is_box(value: Any) -> bool:
    """Whether a value from a file is a list or tuple of four finite numbers, in whatever convention for boxes."""
    return isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_coordinate, value))


def _problem_with_size(annotated: AnnotatedImage, stored_size: tuple[int, int] | None) -> str | None:
    """The problem with the size of the image that the boxes were drawn on, or `None`."""
    if annotated.size is None:
        return None
    if not all(_is_coordinate(value) and value > 0 for value in annotated.size):
        return f"the size of {annotated.name} is {reprlib.repr(annotated.size)}, expected its width and height"
    if stored_size and _is_quarter_turned(stored_size, annotated.size):
        return (
            f"the image {annotated.name} has {stored_size[0]} x {stored_size[1]} pixels, "
            f"expected {annotated.size[0]} x {annotated.size[1]}, not turned"
        )
    return None


def find_problem(
    expression: Any,
    box: Any,
    size: tuple[float, float] | None,
    absent: bool | None = None,
    image_name: str = "its image",
    written_box: str | None = None,
) -> str | None:
    """
    What is wrong with an expression or its box, without the place and without a full stop, or `None`.

    Args:
        expression (`Any`): must be text with words.
        box (`Any`): must be `None` or xyxy pixels that are not empty and lie within the image, up to `MAX_OVERHANG`.
        size (`tuple` or `None`): width and height of the image in pixels, if they are known.
        absent (`bool`, *optional*): whether the expression names nothing in its image. Then `box` must be `None`.
        image_name (`str`, *optional*): what errors call the image.
        written_box (`str`, *optional*): what errors show as the box.
    """
    if not _has_words(expression):
        return f"the expression is {reprlib.repr(expression)}, expected words"
    if box is None:
        return None
    if not is_box(box):
        return f"the box is {reprlib.repr(box)}, expected 4 finite numbers"
    shown = written_box or show_box(box)
    if absent:
        return f"absent is true, so the box must be None, but it is {shown}"
    if not (box[0] < box[2] and box[1] < box[3]):
        return f"the box {shown} is empty or inverted, expected xmin < xmax and ymin < ymax"
    if min(box[0], box[1]) < -MAX_OVERHANG or min(box[2], box[3]) <= 0:
        return f"the box {shown} starts outside the image"
    if size is not None and _sticks_out(box, size):
        return f"the box {shown} is not within the {size[0]} x {size[1]} pixels of {image_name}"
    return None


def _has_words(expression: Any) -> bool:
    if not isinstance(expression, str) or not expression.strip():
        return False
    try:
        expression.encode()
    except UnicodeEncodeError:  # JSON can hold half a character (a lone surrogate), but Arrow cannot store it
        return False
    return True


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_COORDINATE


def _is_quarter_turned(size: tuple[int, int], expected: tuple[int, int]) -> bool:
    """Whether an image's aspect ratio fits clearly better after a quarter turn, which squares never do."""
    shape, expected_shape = (math.log(width / height) for width, height in (size, expected))
    return abs(shape + expected_shape) + 0.1 < abs(shape - expected_shape)


def _sticks_out(box: list[float], size: tuple[float, float]) -> bool:
    (width, height), (xmin, ymin, xmax, ymax) = size, box
    beyond = xmax > width + MAX_OVERHANG or ymax > height + MAX_OVERHANG
    return beyond or xmin >= width or ymin >= height


def _place(box: list[float], scale: tuple[float, float], limits: tuple[float, float]) -> list[float]:
    """Scales a box to the pixels of the image file and cuts it to that image."""
    return [float(min(max(value * scale[axis % 2], 0.0), limits[axis % 2])) for axis, value in enumerate(box)]


def show_box(box: list[float]) -> str:
    """A box for an error message."""
    return "[" + ", ".join(f"{value:.7g}" for value in box) + "]"
