"""Accuracy by kind of expression, by size of box, or by whatever else tells expressions apart."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupAccuracy:
    """
    The accuracy on one group of expressions.

    Args:
        name (`str`): what its expressions have in common.
        count (`int`): how many there are.
        accuracy (`float`): which share of them has the right box.
    """

    name: str
    count: int
    accuracy: float


def accuracy_by_group(
    is_right: np.ndarray | Sequence[bool], names: Sequence[str | Sequence[str] | None]
) -> list[GroupAccuracy]:
    """
    Splits the accuracy up.

    Args:
        is_right (`np.ndarray` of shape `(N,)`): whether the box of each expression is right.
        names (`Sequence` of N `str`, lists of `str` or `None`): the group of each expression, or all groups that it
            counts in. One with `None` or an empty list counts in none.

    Returns:
        `list[GroupAccuracy]`: the groups, the one with the lowest accuracy first.

    Raises:
        `ValueError`: There are not as many names as answers.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.accuracy_by_group import accuracy_by_group

    >>> for group in accuracy_by_group([True, False, True], ["attribute", "relation", "relation"]):
    ...     print(group.name, group.count, group.accuracy)
    relation 2 0.5
    attribute 1 1.0
    ```
    """
    if len(is_right) != len(names):
        raise ValueError(f"there are {len(is_right)} answers and {len(names)} names, expected equally many.")
    answers: defaultdict[str, list[bool]] = defaultdict(list)
    for right, own in zip(is_right, names, strict=True):
        for name in [own] if isinstance(own, str) else own or ():
            answers[name].append(bool(right))
    groups = [GroupAccuracy(name, len(rows), sum(rows) / len(rows)) for name, rows in answers.items()]
    return sorted(groups, key=lambda group: (group.accuracy, group.name))


def size_of_box(box: Sequence[float], width: int, height: int) -> str:
    """
    Names the size of a box by the share of the image that it covers, so that it does not depend on the resolution.

    Args:
        box (`Sequence[float]`): xyxy pixels.
        width, height (`int`): size of the image in pixels.

    Returns:
        `str`: `"small"` below 4 % of the image, `"medium"` below 25 %, else `"large"`.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.accuracy_by_group import size_of_box

    >>> size_of_box([0, 0, 50, 50], width=100, height=100)
    'large'
    ```
    """
    xmin, ymin, xmax, ymax = box
    share = (xmax - xmin) * (ymax - ymin) / (width * height)
    return "small" if share < 0.04 else "medium" if share < 0.25 else "large"
