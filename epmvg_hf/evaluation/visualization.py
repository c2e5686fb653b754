"""Plots of boxes on their images."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..model.rgb_images import as_rgb
from ..utils import needs_extra

with needs_extra("draw_grid", "train"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle


def draw_grid(
    path: str | os.PathLike,
    images: Sequence[Image.Image],
    expressions: Sequence[str],
    boxes: np.ndarray,
    true_boxes: np.ndarray | None = None,
    columns: int = 4,
) -> None:
    """
    Writes a picture with one cell per expression: the image, the predicted box in red, and the true box in dashed
    green.

    Args:
        path (`str` or `os.PathLike`): the picture file to write, in the format that its suffix names.
        images (`Sequence[PIL.Image.Image]`): one image per expression.
        expressions (`Sequence[str]`): the titles of the cells.
        boxes (`np.ndarray` of shape `(N, 4)`): predicted boxes, xyxy pixels of the images.
        true_boxes (`np.ndarray` of shape `(N, 4)`, *optional*): true boxes, xyxy pixels of the images.
        columns (`int`, *optional*, defaults to 4): number of cells in a row.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from epmvg_hf.evaluation.visualization import draw_grid

    >>> draw_grid("boxes.png", [image], ["the green triangle"], np.array([[24, 59, 57, 88]]))
    >>> Image.open("boxes.png").size
    (300, 320)
    ```
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    # pyplot would keep the figure in a list that all threads share.
    figure = Figure(figsize=(3 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, (axis, image, expression) in enumerate(zip(axes.flat, images, expressions, strict=False)):
        axis.imshow(as_rgb(image))
        axis.set_title(expression, fontsize=9, wrap=True)
        if true_boxes is not None:
            _outline(axis, true_boxes[number], color="lime", linestyle="--")
        _outline(axis, boxes[number], color="red", linestyle="-")
    figure.savefig(path, dpi=100)


def _outline(axis: Axes, box: np.ndarray, color: str, linestyle: str) -> None:
    x1, y1, x2, y2 = box
    # imshow draws the centre of the first pixel at 0, so the pixel's left edge, which is 0 in a box, is at -0.5.
    axis.add_patch(
        Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, linewidth=2, color=color, linestyle=linestyle)
    )
