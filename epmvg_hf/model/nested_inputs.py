# Copyright 2026 The EpmVG HF authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Checks expressions and boxes in the nesting that users give them, groups them by image, and flattens them to one row
per expression.

Errors name the place in the user's own nesting, such as `boxes[1][0]`.
"""

import reprlib
from collections.abc import Sequence
from decimal import Decimal
from itertools import chain
from numbers import Real
from typing import Any, cast

import numpy as np
import torch

from .letterbox import MAX_OVERHANG
from .losses import has_box


def has_words(expression: Any) -> bool:
    """Whether a value can be an expression: a string with more than white space."""
    return isinstance(expression, str) and bool(expression.strip())


def group_expressions(text: str | list[str] | list[list[str]], single_image: bool) -> list[list[str]]:
    """
    Groups expressions by image.

    Args:
        text (`str`, `list[str]` or `list[list[str]]`): expressions, nested as [`EpmVGProcessor`] documents it.
        single_image (`bool`): whether all expressions of a flat list belong to one image, not one to each image.

    Raises:
        ValueError: `text` is nested in another way, holds no expression, or an expression has no words.
    """
    if isinstance(text, str):
        groups = [[text]]
    elif isinstance(text, list | tuple) and all(isinstance(item, str) for item in text):
        expressions = cast(list[str], list(text))
        groups = [expressions] if single_image else [[expression] for expression in expressions]
    elif isinstance(text, list | tuple) and all(isinstance(item, list | tuple) for item in text):
        groups = [list(item) for item in text]
    else:
        raise ValueError("`text` must be a string, a list of strings, or a list of lists of strings.")

    flat = flatten(groups)
    if not flat:
        raise ValueError("`text` holds no expression, expected at least one.")
    for index, expression in enumerate(flat):
        if not has_words(expression):
            raise ValueError(f"`text{position(text, index)}` is {expression!r}, expected an expression with words.")
        try:
            expression.encode()
        except UnicodeEncodeError:
            problem = "has half of a surrogate pair, which is no character: decode the text as UTF-16 or UTF-8"
            raise ValueError(f"`text{position(text, index)}` = {reprlib.repr(expression)} {problem}.") from None
    return groups


def flatten(groups: Sequence[Sequence[Any]]) -> list[Any]:
    """The items of all groups in one list."""
    return list(chain.from_iterable(groups))


def flatten_boxes(
    boxes: Sequence | np.ndarray | torch.Tensor, text: str | list[str] | list[list[str]]
) -> torch.Tensor:
    """
    Brings nested boxes into one row per expression.

    Args:
        boxes (list, `np.ndarray` or `torch.Tensor`): boxes nested like `text`; `None` or a row that is NaN throughout
            stands for an expression without a box.
        text (`str`, `list[str]` or `list[list[str]]`): the expressions.

    Returns:
        `torch.DoubleTensor` of shape `(N, 4)`: the boxes; NaN throughout for expressions without one.

    Raises:
        ValueError: `boxes` are not nested like `text`, or an item is neither four finite numbers nor four times NaN.
    """
    if isinstance(text, str):
        items: Sequence = [boxes]
    else:
        _check_count(boxes, text, "")
        items = list(boxes)
        if not isinstance(text[0], str):
            for index, (group_boxes, group) in enumerate(zip(boxes, text, strict=True)):
                _check_count(group_boxes, group, f"[{index}]")
            items = flatten(items)

    rows = []
    for index, box in enumerate(items):
        row = np.full(4, np.nan) if box is None else _four_numbers(box)
        if row is None:
            raise ValueError(
                f"`boxes{position(text, index)}` must be four numbers (x0, y0, x1, y1), but it is {reprlib.repr(box)}."
            )
        rows.append(row)
    flat = torch.from_numpy(np.stack(rows))
    faulty = has_box(flat) & ~flat.isfinite().all(dim=1)
    if faulty.any():
        index = int(faulty.nonzero()[0])
        raise ValueError(
            f"`boxes{position(text, index)}` = {flat[index].tolist()} is not finite, expected four finite numbers "
            "(or, for an expression without a box, None or four times NaN)."
        )
    return flat


def _four_numbers(box: Any) -> np.ndarray | None:
    """A box as an array of four numbers, all NaN if it is four times `None`; `None` if it is something else."""
    try:
        values = (box.detach().cpu() if isinstance(box, torch.Tensor) else np.asarray(box)).tolist()
        if values == [None] * 4:
            return np.full(4, np.nan)
        # Text and truth values would become numbers, too.
        if len(values) == 4 and all(isinstance(v, Real | Decimal) and not isinstance(v, bool) for v in values):
            return np.array([float(value) for value in values])
    except (TypeError, ValueError, OverflowError):
        pass
    return None


def check_boxes(boxes: torch.Tensor, image_sizes: torch.Tensor, text: str | list[str] | list[list[str]]) -> None:
    """
    Checks that every box lies in its image. Rows of NaN pass, because NaN compares as false.

    Args:
        boxes (`torch.DoubleTensor` of shape `(N, 4)`): what [`flatten_boxes`] returned.
        image_sizes (`torch.LongTensor` of shape `(N, 2)`): (height, width) of the image of each expression.
        text (`str`, `list[str]` or `list[list[str]]`): the expressions, nested as the user gave them.

    Raises:
        ValueError: a box is empty or inverted, lies outside its image, or sticks out of it by more than
            `MAX_OVERHANG` pixels.
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    height, width = image_sizes.unbind(1)
    sticks_out = (boxes < -MAX_OVERHANG).any(dim=1) | (x1 > width + MAX_OVERHANG) | (y1 > height + MAX_OVERHANG)
    faults = {
        "is empty or inverted, expected x0 < x1 and y0 < y1": (x0 >= x1) | (y0 >= y1),
        "lies wholly outside its image": (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height),
        f"reaches beyond its image by more than {MAX_OVERHANG:g} pixel": sticks_out,
    }
    for fault, rows in faults.items():
        if rows.any():
            index = int(rows.nonzero()[0])
            raise ValueError(
                f"`boxes{position(text, index)}` = {boxes[index].tolist()} {fault}; it must be (x0, y0, x1, y1) in "
                f"pixels of an image of {height[index]} x {width[index]} pixels (height x width)."
            )


def position(text: str | list[str] | list[list[str]], index: int) -> str:
    """Where expression number `index` stands in `text`, and its box in `boxes`: "", "[3]" or "[1][0]"."""
    if isinstance(text, str):
        return ""
    if isinstance(text[0], str):
        return f"[{index}]"
    return [f"[{outer}][{inner}]" for outer, group in enumerate(text) for inner in range(len(group))][index]


def _check_count(boxes: Sequence | np.ndarray | torch.Tensor, text: list, where: str) -> None:
    """Raises a `ValueError` if a list of boxes is not as long as the list of expressions at the same place."""
    count = len(boxes) if isinstance(boxes, Sequence | np.ndarray | torch.Tensor) else "no"
    if count != len(text):
        raise ValueError(
            f"`boxes` must be nested like `text`, but `boxes{where}` has {count} items and `text{where}` has "
            f"{len(text)}."
        )
