"""A page that shows the worst errors of a model by kind, as one HTML file that needs no other file and no network."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..model.rgb_images import as_rgb
from ..utils import needs_extra
from .accuracy import find_boxes, paired_iou
from .accuracy_by_group import GroupAccuracy
from .drawing import COLOURS
from .error_kinds import ERROR_KINDS, RIGHT, name_kinds, worst_first

# The longer side of a picture in pixels. A page with 60 pictures then has about two megabytes.
PICTURE_SIDE = 480
JPEG_QUALITY = 80
PREDICTED_COLOUR, TRUE_COLOUR = COLOURS[:2]

_TEMPLATE = Path(__file__).with_name("error_report_template.html")


@dataclass(frozen=True)
class ShownError:
    """
    An error with its picture.

    Args:
        row (`int`): the number of its row.
        expression, image_id (`str`): what was looked for, and where.
        iou (`float`): the IoU of the boxes.
        score (`float`, *optional*): the score of the predicted box.
        width, height (`int`): size of the original image in pixels.
        box, true_box (`list[float]`): xyxy pixels of the original image.
        picture (`str`): the image as a `data:` URL, at most `PICTURE_SIDE` pixels wide and high.
    """

    row: int
    expression: str
    image_id: str
    iou: float
    score: float | None
    width: int
    height: int
    box: list[float]
    true_box: list[float]
    picture: str


def make_error_report(
    title: str,
    images: Sequence[Image.Image],
    image_ids: Sequence[str],
    expressions: Sequence[str],
    boxes: np.ndarray,
    true_boxes: np.ndarray | Sequence[Sequence[float] | None],
    scores: np.ndarray | None = None,
    groups: Mapping[str, Sequence[GroupAccuracy]] | None = None,
    worst: int = 12,
) -> str:
    """
    Makes a page with the number and the share of each kind of error, see [`~error_kinds.name_kinds`], the accuracy of
    groups, and the worst errors of each kind: picture, both boxes, expression, IoU, score and image id. Texts are
    escaped, and there are no scripts.

    Args:
        title (`str`): the heading, such as the model and the split.
        images (`Sequence[PIL.Image.Image]`): the image of each of the N expressions. Only those that are shown are
            read, so it may be a column of a dataset.
        image_ids (`Sequence[str]`): the id of each image.
        expressions (`Sequence[str]`): the expressions.
        boxes (`np.ndarray` of shape `(N, 4)`): predicted boxes, xyxy pixels of the images.
        true_boxes (`np.ndarray` of shape `(N, 4)` or `Sequence`):
            True boxes, xyxy pixels of the images; `None` or four times NaN where there is none. Such expressions do
            not count.
        scores (`np.ndarray` of shape `(N,)`, *optional*): the scores of the predicted boxes.
        groups (`Mapping[str, Sequence[GroupAccuracy]]`, *optional*):
            What tells expressions apart, such as their kind, with the groups that it makes.
        worst (`int`, *optional*, defaults to 12):
            How many errors of each kind to show. They are in the order of [`~error_kinds.worst_first`], but that the
            worst error of each image comes before further ones of that image, so that one image does not fill all.

    Returns:
        `str`: the HTML page, in which each shown row N can be linked to as `#row-N`.

    Raises:
        ImportError: jinja2 is not installed.
        ValueError: the arguments differ in length, or no expression has a true box.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.evaluation.error_report import make_error_report

    >>> page = make_error_report(
    ...     "shapes test", [image], ["scene"], ["the star"], np.array([[0, 0, 9, 9]]), [[24, 59, 57, 88]]
    ... )
    >>> 'id="wrong-object"' in page and 'id="row-0"' in page
    True
    ```
    """
    with needs_extra("make_error_report", "train"):
        from jinja2 import Environment, StrictUndefined

    lengths = {"images": len(images), "image_ids": len(image_ids), "expressions": len(expressions)}
    lengths |= {"boxes": len(boxes), "true_boxes": len(true_boxes)}
    lengths |= {} if scores is None else {"scores": len(scores)}
    if len({*lengths.values()}) > 1:
        listed = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"there are {listed}, expected equally many.")
    references, has_box = find_boxes(true_boxes, "true_boxes")
    rows = np.flatnonzero(has_box)
    iou = np.full(len(boxes), np.nan)
    iou[rows] = paired_iou(boxes[rows], references[rows])
    kind_of = np.full(len(boxes), "", dtype=object)
    kind_of[rows] = name_kinds(boxes[rows], references[rows])
    order = worst_first(iou, scores)
    chosen = {kind: _one_of_each_image_first(order[kind_of[order] == kind], image_ids)[:worst] for kind in ERROR_KINDS}

    def show(row: int) -> ShownError:
        image = images[row]
        return ShownError(
            row=row,
            expression=expressions[row],
            image_id=image_ids[row],
            iou=float(iou[row]),
            score=None if scores is None else float(scores[row]),
            width=image.width,
            height=image.height,
            box=boxes[row].tolist(),
            true_box=references[row].tolist(),
            picture=_as_url(image),
        )

    counts = {kind: int((kind_of == kind).sum()) for kind in (*ERROR_KINDS, RIGHT)}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        total=len(rows),
        without_box=len(boxes) - len(rows),
        images=len({image_ids[row] for row in rows.tolist()}),
        mean_iou=float(iou[rows].mean()),
        right=RIGHT,
        counts=counts,
        meanings={**ERROR_KINDS, RIGHT: "IoU of at least 0.5"},
        shown={kind: [show(row) for row in rows_of_kind] for kind, rows_of_kind in chosen.items()},
        groups=groups or {},
        has_scores=scores is not None,
        predicted_colour=PREDICTED_COLOUR,
        true_colour=TRUE_COLOUR,
    )


def _one_of_each_image_first(rows: np.ndarray, image_ids: Sequence[str]) -> list[int]:
    """The rows in their order, but all that are the first of their image before all that are the second."""
    seen: Counter[str] = Counter()
    places = []
    for row in rows:
        places.append(seen[image_ids[row]])
        seen[image_ids[row]] += 1
    return rows[np.argsort(places, kind="stable")].tolist()


def _as_url(image: Image.Image) -> str:
    """A smaller copy of an image as a `data:` URL."""
    picture = as_rgb(image).copy()
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
