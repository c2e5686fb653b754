"""Rows of expressions grouped by the image that they are about, so that each image needs one visual pass."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.image_utils import get_image_size

from ..model.rgb_images import as_rgb
from .files.image_files import decode_jpeg, measure_stored
from .pictures import number_pictures
from .row_checks import check_features, check_row, find_doubtful_rows, place_of, read_boxes

# The headers of so many images are read before a training starts. From a cold disk that takes a while, and all rows
# are checked again as they are read.
MAX_MEASURED = 10_000


@dataclass
class ImageGroup:
    """
    An image and n expressions about it.

    Args:
        image (`PIL.Image.Image` or `None`):
            The decoded image, or what a transform of the dataset made of it: any image that [`EpmVGProcessor`] takes.
            `None` if the dataset keeps rows without image files.
        image_id (`str` or `None`): the id of the image in the dataset, if it has one.
        expressions (`list[str]`): the expressions.
        boxes (`np.ndarray` of shape `(n, 4)` or `None`):
            float32 boxes, xyxy in pixels of the image, 0-based and half-open. A row of NaN means that the expression
            has no box, a row of zeros that it names nothing in the image. `None` if the dataset has no column of
            boxes.
        row_indices (`list[int]`): the dataset's row of each expression; empty if the rows are not numbered.
        index (`int` or `None`):
            The number of this image among the images of the dataset, if those are known. An image that a transform
            makes has none, because it may be another one each time.
    """

    image: Image.Image | None
    image_id: Any
    expressions: list[str]
    boxes: np.ndarray | None
    row_indices: list[int]
    index: int | None = None

    def __len__(self) -> int:
        return len(self.expressions)

    def select(self, positions: Sequence[int]) -> "ImageGroup":
        """The same image with the expressions at these positions only."""
        return replace(
            self,
            expressions=[self.expressions[position] for position in positions],
            boxes=None if self.boxes is None else self.boxes[list(positions)],
            row_indices=[self.row_indices[position] for position in positions] if self.row_indices else [],
        )


class ImageGroups(Dataset):
    """
    A dataset of expressions seen image by image: its length counts images, and each item is an [`ImageGroup`], whose
    image is decoded once however many expressions it has.

    Rows share an image if they have the same `image_id` and the same stored file: ids alone are not trusted, because
    those of concatenated or changed datasets may coincide. The rows of a dataset with a transform (`with_transform`)
    are read whole, as the dataset gives them, and each has an image of its own: nobody knows what a transform, which
    may draw at random, makes of the same file the next time.

    Args:
        dataset (`datasets.Dataset`):
            One row per expression with `image`, `expression` and, unless boxes are only to be predicted, `box`. Rows
            of one image share its `image_id`, if there is such a column. The box `None` says that an expression has
            none; such rows only take part in distillation. If there is a column `absent`, those rows in which it is
            true are known to name nothing in their image; the scores of a model learn from them.
        decoded_side (`int`, *optional*):
            Lets JPEGs be decoded at 1/2, 1/4 or 1/8 of their size, as long as their longer side keeps at least this
            many pixels; boxes are scaled along. With 1.5 times the canvas, the canvas differs from that of the whole
            image by a few of 255 levels on average, most where photos are full of fine detail
            (`examples/benchmarks/input.py --images FOLDER` measures it). Augmentation changes more, but the numbers of
            an evaluation could change, so [`EpmVGTrainer`] does this only for training images that are augmented.

    Attributes:
        groups (`list[list[int]]`): for each image the indices of its rows.
        has_boxes (`bool`): whether the rows have a box.

    Raises:
        ValueError: the dataset lacks a column, or its images are none; a row that is read cannot be used, which the
            error names by its number, its image_id and its values.

    Example:

    ```python
    >>> from epmvg_hf import ImageGroups

    >>> groups = ImageGroups(dataset)
    >>> len(dataset), len(groups)
    (32, 4)
    >>> groups[3].expressions[:2], groups[3].boxes.shape
    (['red star', 'the lowest red circle'], (8, 4))
    ```
    """

    def __init__(self, dataset: datasets.Dataset, decoded_side: int | None = None):
        self.transformed = dataset if is_transformed(dataset) else None
        self.decoded_side = decoded_side
        present = list(dataset[0]) if self.transformed is not None and len(dataset) else dataset.column_names
        if missing := [name for name in ("image", "expression") if name not in present]:
            raise ValueError(f"the dataset lacks the column(s) {', '.join(missing)}; it has {', '.join(present)}")
        self.has_boxes = "box" in present
        if self.transformed is not None:
            self.groups = [[row] for row in range(len(dataset))]
            return
        # Formats such as "torch" say how to give values, not which, and those of a model come from its processor.
        feature = dataset.features["image"]
        self._mode = feature.mode if isinstance(feature, datasets.Image) else None
        dataset = _decode_images(dataset.with_format(None))
        self.images = dataset.select_columns(["image"])
        if decoded_side is not None:
            self._encoded = self.images.cast_column("image", datasets.Image(decode=False))
        check_features(dataset.features)
        wanted = ("image_id", "expression", "box", "absent") if self.has_boxes else ("image_id", "expression")
        self.rows = dataset.select_columns([name for name in wanted if name in dataset.column_names])
        pictures = number_pictures(dataset)
        by_picture = np.split(np.argsort(pictures, kind="stable"), np.cumsum(np.bincount(pictures))[:-1])
        self.groups = [rows.tolist() for rows in by_picture] if len(dataset) else []

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageGroup:
        return self.group(index)

    def group(self, index: int, with_image: bool = True) -> ImageGroup:
        """
        The image at `index`.

        Args:
            index (`int`): its number.
            with_image (`bool`, *optional*, defaults to `True`): whether to decode the image; else it is `None`.

        Example:

        ```python
        >>> from epmvg_hf import ImageGroups

        >>> group = ImageGroups(dataset).group(3, with_image=False)
        >>> group.image, len(group.expressions)
        (None, 8)
        ```
        """
        row_indices = self.groups[index]
        if self.transformed is not None:
            (row,) = row_indices
            return make_group({**self.transformed[row], "row_index": row})
        columns = self.rows[row_indices]
        image_id = columns["image_id"][0] if "image_id" in columns else None
        image, size, scale = self._decode(row_indices[0], image_id) if with_image else (None, None, 1.0)
        boxes = None
        if self.has_boxes:
            absent = columns.get("absent", [False] * len(row_indices))
            rows = zip(row_indices, columns["expression"], columns["box"], absent, strict=True)
            boxes = np.float32(scale) * boxes_to_array(
                [check_row(place_of(row, image_id), text, box, gone, size) for row, text, box, gone in rows]
            )
        return ImageGroup(image, image_id, columns["expression"], boxes, row_indices, index)

    def _decode(self, row: int, image_id: Any) -> tuple[Image.Image | None, tuple[int, int] | None, float]:
        """
        The image of a row, the width and height of the stored image, and how many pixels of the first stand for one of
        the second in each direction.
        """
        try:
            if self.decoded_side is not None:
                encoded = self._encoded[row]["image"]
                decoded = None if encoded is None else decode_jpeg(encoded, self.decoded_side)
                if decoded is not None:
                    image, size, scale = decoded
                    return self._convert(image), size, scale
            image = self.images[row]["image"]
        except Exception as error:  # Pillow raises many kinds for damaged files, which say neither row nor file
            raise ValueError(f"{place_of(row, image_id)}: the image cannot be read ({error}).") from error
        return (None, None, 1.0) if image is None else (self._convert(image), image.size, 1.0)

    def _convert(self, image: Image.Image) -> Image.Image:
        """The image in the mode that its column asks for."""
        if self._mode is None or image.mode == self._mode:
            return image
        # Pillow's own conversion of 16-bit gray makes it white, and that of transparent ground black.
        return as_rgb(image).convert(self._mode)

    def check_rows(self, name: str, needs_boxes: bool = False) -> None:
        """
        Checks all rows at once, as far as that takes seconds. Reading an image checks its rows anyway. What a
        transform makes of rows is not checked here.

        Args:
            name (`str`): what errors call the dataset.
            needs_boxes (`bool`, *optional*, defaults to `False`): whether at least one row must have a box.

        Raises:
            ValueError: an expression has no words, a box is empty or not four numbers, no row has a box that needs
                one or, in a dataset with boxes and no more than `MAX_MEASURED` images, an image cannot be read or a
                box is not within its image.

        Example:

        ```python
        >>> from epmvg_hf import ImageGroups

        >>> outside = dataset.map(lambda row, index: {"box": [0, 0, 9, 999]} if index == 2 else row, with_indices=True)
        >>> try:
        ...     ImageGroups(outside).check_rows("train_dataset")
        ... except ValueError as error:
        ...     print(error)
        train_dataset, row 2 (image_id '...'): the box [0, 0, 9, 999] is not within the ... pixels of its image.
        ```
        """
        if self.transformed is not None:
            return
        rows = self.rows.with_format("arrow")[:]
        boxes = read_boxes(rows.column("box")) if self.has_boxes else None
        if needs_boxes and (boxes is None or np.isnan(boxes).all()):
            raise ValueError(f"no row of {name} has a box, and without a teacher nothing else can be learned")
        sizes = np.full((len(self.rows), 2), np.inf)
        if boxes is not None and len(self) <= MAX_MEASURED:
            for row_indices, measured in zip(self.groups, self.measure(name), strict=True):
                sizes[row_indices] = measured
        absent = rows.column("absent").to_numpy() if "absent" in rows.column_names else np.zeros(len(self.rows))
        for row in find_doubtful_rows(rows.column("expression"), boxes, sizes, absent.astype(bool)):
            values, (width, height) = self.rows[row], sizes[row].tolist()
            size = (int(width), int(height)) if math.isfinite(width) else None
            where = f"{name}, {place_of(row, values.get('image_id'))}"
            check_row(where, values["expression"], values.get("box"), values.get("absent"), size)

    def measure(self, name: str) -> Iterator[tuple[float, float]]:
        """
        Reads how large the stored images are, without decoding them. What a transform makes of them is not measured.

        Args:
            name (`str`): what errors call the dataset.

        Returns:
            `Iterator[tuple[float, float]]`: for each image its width and height in pixels, infinite if there is none
            or if it is stored on another machine.

        Raises:
            ValueError: an image cannot be read.

        Example:

        ```python
        >>> from epmvg_hf import ImageGroups

        >>> list(ImageGroups(dataset).measure("dataset"))[3]
        (100, 128)
        ```
        """
        encoded = self.images.cast_column("image", datasets.Image(decode=False))
        for row, *_ in self.groups:
            image = encoded[row]["image"]
            try:
                yield (None if image is None else measure_stored(image)) or (np.inf, np.inf)
            except ValueError as error:
                values = self.rows[row]
                raise ValueError(f"{name}, {place_of(row, values.get('image_id'))}: {error}") from None


def is_transformed(dataset: datasets.Dataset | datasets.IterableDataset) -> bool:
    """Whether a function of the user makes the rows of a dataset while they are read (`with_transform`)."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def _decode_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same dataset, whose column `image` decodes what is stored, in the mode in which it is stored."""
    try:
        return dataset.cast_column("image", datasets.Image())
    except (TypeError, ValueError, pa.ArrowException):
        feature = dataset.features["image"]
        raise ValueError(f"the column 'image' is {feature}, expected images, their bytes or their paths.") from None


def make_group(row: Mapping[str, Any]) -> ImageGroup:
    """
    Makes an image with one expression of a row as a stream or a transform gives it.

    Args:
        row (`Mapping`): has `image` (an image, or one as `datasets` stores it) and `expression`, and optionally
            `image_id`, `box` (xyxy pixels, as a list, an array or a tensor), `absent` and `row_index`.

    Raises:
        ValueError: the row cannot be used.
    """
    image_id, number = row.get("image_id"), row.get("row_index")
    where = place_of(number, image_id)
    if missing := [name for name in ("image", "expression") if name not in row]:
        raise ValueError(f"{where} has no {' and no '.join(missing)}, only {', '.join(map(str, row))}.")
    image = row["image"]
    try:
        if isinstance(image, dict | str | bytes):
            stored = image if isinstance(image, dict) else datasets.Image().encode_example(image)
            image = datasets.Image().decode_example(stored)
        size = None if image is None else _size_of(image)
    except Exception as error:  # Pillow raises many kinds for damaged files, which say neither row nor file
        raise ValueError(f"{where}: the image cannot be read ({error}).") from error
    box, absent = (
        value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value
        for value in (row.get("box"), row.get("absent"))
    )
    checked = check_row(where, row["expression"], box, absent, size)
    return ImageGroup(
        image=image,
        image_id=image_id,
        expressions=[row["expression"]],
        boxes=boxes_to_array([checked]) if "box" in row else None,
        row_indices=[] if number is None else [number],
    )


def _size_of(image: Any) -> tuple[int, int]:
    """Width and height of a PIL image, an array or a tensor."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = get_image_size(np.asarray(image))
    return width, height


def merge_groups(groups: Iterable[ImageGroup]) -> list[ImageGroup]:
    """
    Makes one group of all that are of the same image: a sampler may draw an image several times, and the rows of an
    image may follow each other in a stream. Numbered images are told apart by their `index`, others by `image_id` and
    pixels. Expressions that come several times stay, so each of them counts as often as it was drawn.

    Args:
        groups (`Iterable[ImageGroup]`): groups of one dataset, all or none of them with `boxes` and `row_indices`.

    Returns:
        `list[ImageGroup]`: one for each image, in the order of their first appearance.
    """
    by_image: list[list[ImageGroup]] = []
    for group in groups:
        same = next((known for known in by_image if _show_same_image(known[0], group)), None)
        if same is None:
            by_image.append([group])
        else:
            same.append(group)
    return [_join(same) if len(same) > 1 else same[0] for same in by_image]


def _show_same_image(one: ImageGroup, other: ImageGroup) -> bool:
    if one.index is not None or other.index is not None:
        return one.index == other.index
    if one.image_id != other.image_id or type(one.image) is not type(other.image):
        return False
    if one.image is None or isinstance(one.image, Image.Image):
        return one.image == other.image
    return np.array_equal(np.asarray(one.image), np.asarray(other.image))


def _join(groups: list[ImageGroup]) -> ImageGroup:
    boxes = [group.boxes for group in groups if group.boxes is not None]
    return replace(
        groups[0],
        expressions=[expression for group in groups for expression in group.expressions],
        boxes=np.concatenate(boxes) if boxes else None,
        row_indices=[index for group in groups for index in group.row_indices],
    )


def boxes_to_array(boxes: Sequence[Sequence[float] | None]) -> np.ndarray:
    """Boxes as a float32 array `(n, 4)`. Here the `None` of a missing box becomes a row of NaN, which it stays."""
    return np.array([[np.nan] * 4 if box is None else box for box in boxes], np.float32).reshape(-1, 4)
