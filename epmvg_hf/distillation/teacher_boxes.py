"""Boxes for expressions that have none: those that a teacher draws, and those of a student that it confirms."""

import math
import os
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import nn

from ..data.image_groups import ImageGroups
from ..data.row_checks import check_features, read_boxes
from ..model.image_processing_epmvg import EpmVGImageProcessor
from ..model.letterbox import Letterbox
from ..model.losses import paired_iou
from .clip_teacher import ClipTeacher
from .teacher_cache import TeacherCache

# How many times finer than the teacher's patches the edges of a box are.
_CELLS_PER_PATCH = 4


def add_teacher_boxes(
    dataset: datasets.Dataset,
    teacher: ClipTeacher,
    fraction: float = 0.65,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 16,
    disable_tqdm: bool = False,
) -> datasets.Dataset:
    """
    Gives each expression without a box the one that a teacher would draw: around all places of the image that resemble
    the expression almost as much as the place that resembles it most, see [`boxes_of_maps`]. A student that is trained
    on such boxes needs few true ones, or none, to draw boxes by itself. This is our reading of what a teacher of
    image-text consistency can say about boxes; the paper's abstract does not name it.

    Args:
        dataset (`datasets.Dataset`):
            Rows with image, image_id and expression, and optionally `box` and `absent`. Rows with a box, and those
            that are absent, stay as they are.
        teacher ([`ClipTeacher`]): has patches. It sees the images at its `image_size`, where its parameters are.
        fraction (`float`, *optional*, defaults to 0.65): see [`boxes_of_maps`].
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder for the teacher's embeddings, see [`~teacher_cache.TeacherCache.build`], which goes on where it was
            interrupted. Defaults to a folder in the cache of `datasets`.
        batch_size (`int`, *optional*, defaults to 16): how many images the teacher sees at a time.
        disable_tqdm (`bool`, *optional*, defaults to `False`): whether to hide the progress bars.

    Returns:
        `datasets.Dataset`: the same rows in the same order, without a format. Each that is not absent has a box: xyxy
        float pixels of the original image.

    Raises:
        ValueError: the teacher has no patches or gives NaN or infinity, `fraction` is not between 0 and 1, or a row
            has no image.

    Example:

    ```python
    >>> from epmvg_hf import add_teacher_boxes

    >>> captions = dataset.select(range(4)).remove_columns("box")
    >>> with_boxes = add_teacher_boxes(captions, teacher, disable_tqdm=True)
    >>> with_boxes.num_rows, len(with_boxes[0]["box"])
    (4, 4)
    ```
    """
    if not teacher.has_patches:
        raise ValueError("the teacher has no patches, so it cannot say where in an image something is")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected a number between 0 and 1")
    dataset = dataset.with_format(None)
    names = dataset.column_names
    check_features(dataset.features)
    absent = np.array(dataset["absent"][:] if "absent" in names else [False] * len(dataset), dtype=bool)
    column = pa.chunked_array([pa.nulls(len(dataset))])
    if "box" in names:
        column = dataset.select_columns(["box"]).with_format("arrow")[:].column("box")
    boxes = column.to_pylist()
    without = np.flatnonzero(np.isnan(read_boxes(column)).all(axis=1) & ~absent)
    if len(without):
        rows = dataset.select(without).remove_columns(set(names) & {"box", "absent"})
        drawn = _draw(rows, teacher, fraction, cache_dir, batch_size, disable_tqdm)
        for row, box in zip(without, drawn, strict=True):
            boxes[row] = box
    others = dataset.remove_columns("box") if "box" in names else dataset
    # A column of nothing, or of whole numbers, could not hold what was drawn.
    feature = datasets.List(datasets.Value("float32"), length=4)
    return others.add_column("box", boxes, feature=feature)


def confirm_boxes(
    dataset: datasets.Dataset,
    boxes: np.ndarray,
    teacher: ClipTeacher,
    min_iou: float = 0.5,
    fraction: float = 0.65,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 16,
    disable_tqdm: bool = False,
) -> datasets.Dataset:
    """
    Keeps the expressions for which a student, trained on few labels, and a teacher draw nearly the same box, and gives
    them the mean of the two. Both are often wrong, but seldom in the same place: of such boxes many more are right
    than of all, and of their means still more. The student is then trained again, on its labels and on these.

    This is our reading; the paper's abstract does not name it. To learn from one's own predictions is pseudo-labelling
    (Lee, 2013), and to take those that two different views agree on is the idea of co-training (Blum and Mitchell,
    1998).

    Args:
        dataset (`datasets.Dataset`): rows with image, image_id and expression. A column `box` is not read.
        boxes (`np.ndarray` of shape `(N, 4)`):
            What the student predicts for them, xyxy pixels, such as `trainer.predict(dataset).predictions`.
        teacher ([`ClipTeacher`]): as in [`add_teacher_boxes`].
        min_iou (`float`, *optional*, defaults to 0.5): how much of the two boxes' union they must share.
        fraction, cache_dir, batch_size, disable_tqdm: as in [`add_teacher_boxes`].

    Returns:
        `datasets.Dataset`: the rows that are kept, in their order, whose `box` is the mean of both, xyxy pixels.

    Raises:
        ValueError: the number of boxes is not that of the rows, or [`add_teacher_boxes`] finds something wrong.

    Example:

    ```python
    >>> from epmvg_hf import confirm_boxes

    >>> boxes = trainer.predict(dataset).predictions
    >>> confirmed = confirm_boxes(dataset, boxes, teacher, disable_tqdm=True)
    >>> confirmed.num_rows < len(dataset)
    True
    ```
    """
    if len(boxes) != len(dataset):
        raise ValueError(f"there are {len(boxes)} boxes for {len(dataset)} rows")
    rows = dataset.with_format(None)
    rows = rows.remove_columns([name for name in ("box", "absent") if name in rows.column_names])
    with_drawn = add_teacher_boxes(rows, teacher, fraction, cache_dir, batch_size, disable_tqdm)
    predicted, drawn = torch.as_tensor(boxes, dtype=torch.float32), torch.tensor(with_drawn["box"][:]).view(-1, 4)
    kept = paired_iou(predicted, drawn) >= min_iou
    feature = datasets.List(datasets.Value("float32"), length=4)
    means = ((predicted + drawn) / 2).tolist()
    return rows.add_column("box", means, feature=feature).select(kept.nonzero()[:, 0].tolist())


def boxes_of_maps(maps: torch.Tensor, letterbox: Letterbox, fraction: float = 0.65) -> torch.Tensor:
    """
    Draws the box around all that is at least `lowest + fraction * (highest - lowest)` in a map, where lowest and
    highest are over the picture, without its padding. The maps are first made finer by bilinear interpolation.

    Args:
        maps (`torch.FloatTensor` of shape `(N, h, w)`): similarities of N expressions with the patches of a canvas.
        letterbox ([`~letterbox.Letterbox`]): where the N pictures lie on their canvases.
        fraction (`float`, *optional*, defaults to 0.65):
            The greater, the smaller the box.

    Returns:
        `torch.FloatTensor` of shape `(N, 4)`: boxes (x0, y0, x1, y1) in pixels of the original images.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.teacher_boxes import boxes_of_maps
    >>> from epmvg_hf.model.letterbox import Letterbox

    >>> maps = torch.zeros(1, 4, 4)
    >>> maps[0, 1:3, 2] = 1.0
    >>> boxes_of_maps(maps, Letterbox.place([(640, 640)], canvas=512))
    tensor([[320., 200., 480., 440.]])
    ```
    """
    fine = nn.functional.interpolate(maps[:, None].float(), scale_factor=_CELLS_PER_PATCH, mode="bilinear")[:, 0]
    on_rows = _on_picture(letterbox.top, letterbox.height, letterbox.canvas, fine.shape[1])
    on_columns = _on_picture(letterbox.left, letterbox.width, letterbox.canvas, fine.shape[2])
    on_picture = on_rows[:, :, None] & on_columns[:, None, :]
    lowest = fine.masked_fill(~on_picture, torch.inf).amin((1, 2), keepdim=True)
    highest = fine.masked_fill(~on_picture, -torch.inf).amax((1, 2), keepdim=True)
    inside = on_picture & (fine >= lowest + fraction * (highest - lowest))
    top, bottom = _span(inside.any(2))
    left, right = _span(inside.any(1))
    labels = torch.stack([left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)], dim=1) / 2
    return letterbox.to_pixels(labels)


def _draw(
    dataset: datasets.Dataset,
    teacher: ClipTeacher,
    fraction: float,
    cache_dir: str | os.PathLike | None,
    batch_size: int,
    disable_tqdm: bool,
) -> list[list[float]]:
    """The box of each row."""
    image_processor = EpmVGImageProcessor(size={"height": teacher.image_size, "width": teacher.image_size})
    with torch.no_grad():
        cache = TeacherCache.build(
            teacher, dataset, image_processor, cache_dir, batch_size=batch_size, disable_tqdm=disable_tqdm
        )
    groups = ImageGroups(dataset)
    expressions: Sequence[str] = groups.rows.select_columns(["expression"])[:]["expression"]
    drawn: list[list[float]] = [[]] * len(dataset)
    for number, (rows, (width, height)) in enumerate(zip(groups.groups, groups.measure("the dataset"), strict=True)):
        teacher_outputs = cache.lookup([number], [expressions[row] for row in rows])
        (patches,), texts = teacher_outputs["teacher_patch_embeds"], teacher_outputs["teacher_text_embeds"]
        maps = torch.einsum("hwe,ne->nhw", patches, texts)
        if math.isinf(width):  # it is stored elsewhere
            width, height = groups.images[rows[0]]["image"].size
        letterbox = image_processor.letterbox(torch.tensor([[height, width]] * len(rows)))
        for row, box in zip(rows, boxes_of_maps(maps, letterbox, fraction).tolist(), strict=True):
            drawn[row] = box
    return drawn


def _on_picture(start: torch.Tensor, length: torch.Tensor, canvas: int, cells: int) -> torch.Tensor:
    """Whether each of the cells along one side of the canvas overlaps the picture, `(N, cells)`."""
    edges = torch.arange(cells + 1) * canvas / cells
    return (start[:, None] < edges[1:]) & (edges[:-1] < (start + length)[:, None])


def _span(used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the used cells `(N, cells)` begin and end, as shares of all."""
    cells = used.shape[1]
    numbers = torch.arange(cells)
    first = torch.where(used, numbers, cells).amin(1)
    last = torch.where(used, numbers, -1).amax(1)
    return first / cells, (last + 1) / cells
