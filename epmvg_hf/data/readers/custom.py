"""Your own data: a file of rows beside a folder of images."""

import re
import reprlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ..annotations import AnnotatedImage
from ..benchmarks import full_split_name, short_split_name
from ..field_values import BOX_COLUMNS, as_written, look_normalised
from ..files.image_files import ImageRoot, file_statuses, list_files
from .coco_files import read_coco
from .custom_files import Entry, name_columns, read_csv, read_jsonl
from .source import GroundingSource, digest_files

SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")  # also keeps the file inside the data folder
SUFFIXES = (".jsonl", ".csv", ".json")
MAX_FILE_BYTES = 2**31  # a bound on files of unknown origin


class ListedImage(NamedTuple):
    """
    An image and its rows (source_row, expression, xyxy box or `None`, and whether the expression is absent, `None` if
    that is not said). They are plain tuples because all rows of the file are in memory at once.
    """

    name: str
    size: tuple[Any, Any] | None
    rows: list[tuple[str, Any, list[float] | None, bool | None]]


class CustomData(GroundingSource):
    """
    One split from `<split>.jsonl`, `<split>.csv` or `<split>.json`. Boxes are in pixels, 0-based, of the image as it
    is displayed, that is after its EXIF orientation, which `datasets` applies when it decodes an image.

    - JSONL has one object per line with `image` (path below the folder of images), `expression` (text, or a list of
      texts for the same box) and `box` (four numbers, or `null` for an expression without box, which only takes part
      in distillation). A field `absent` that is true says that the expression is known to name nothing in the image;
      `box` is `null` then. Other fields are ignored.
    - CSV, with commas, has the columns `image`, `expression`, and either `box` (`"[1, 2, 3, 4]"` or `"1 2 3 4"`) or
      one column per number: `xmin`, `ymin`, `xmax`, `ymax` for xyxy, `x`, `y`, `width`, `height` for xywh. Empty
      cells mean that there is no box. A column `absent` has `true`, `false` or nothing.
    - JSON is that of COCO: `images` with `id` and `file_name`, and `annotations` with `id`, `image_id`, `bbox`, one of
      `caption`, `captions`, `expression` and `expressions`, and optionally `absent`. Where an image has `width` and
      `height`, boxes are scaled from that size to the size of the image file. If no annotation in the file has a
      `bbox`, all expressions are without box.

    The path of an image, written with forward slashes, is its `image_id`. The rows of one image become consecutive.
    The column `source_row` (`str`) is the line of the file, or the id of the COCO annotation. There is a column
    `absent` (`bool`) if any row of the file says so or the contrary.

    Args:
        data_dir (`Path`): folder with the file.
        split (`str`):
            Name of the file without suffix: letters, digits, `_`, `-` and `.`. `"val"` and `"validation"` mean the
            same split, whichever of the two the file is called. `datasets` does not allow `-` in the name of a split,
            so it becomes `_` in the result.
        image_dir (`Path`, *optional*): folder that the images' paths start from; `data_dir` when not given.
        box_format (`str`, *optional*):
            `"xyxy"` (half-open: the whole image is `[0, 0, width, height]`) or `"xywh"` (corner, width and height).
            Required for JSONL and CSV; COCO files always have xywh.
        columns (`dict[str, str]`, *optional*):
            What the file calls `image`, `expression`, `box`, `absent` and the columns of the single numbers. Not for
            COCO files.

    Raises:
        `ValueError`: An argument is not valid, there are several files for the split, or the file is too large.
        `FileNotFoundError`: There is no file for the split.

    Example:

    ```python
    >>> from epmvg_hf import load_grounding_dataset

    >>> # my_data/train.jsonl: {"image": "0001.png", "expression": ["the green triangle", "a triangle"], "box": [...]}
    >>> dataset = load_grounding_dataset("custom", data_dir="my_data", box_format="xyxy")
    >>> dataset["expression"][:], dataset[0]["source_row"]
    (['the green triangle', 'a triangle'], '1')
    ```
    """

    name = "custom"
    exif_oriented = True

    def __init__(
        self,
        data_dir: Path,
        split: str,
        image_dir: Path | None = None,
        box_format: str | None = None,
        columns: dict[str, str] | None = None,
    ):
        self.file = _find_file(data_dir, split)
        self.split = full_split_name(split).replace("-", "_")
        self.images = ImageRoot(image_dir or data_dir)
        self.box_format = _check_box_format(self.file, box_format)
        self.names = None if self.file.suffix == ".json" else name_columns(self.box_format, columns)
        if self.names is None and columns:
            raise ValueError(f"columns does not apply to {self.file}: COCO's fields have names of their own.")
        if (size := self.file.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(
                f"{self.file} has {size:,} bytes, expected at most {MAX_FILE_BYTES:,}; as_grounding_dataset streams "
                "data of any size."
            )

    def __getstate__(self) -> dict:
        # A process that prepares rows is sent the images it has to prepare; a copy of all of them would be a waste.
        return {name: value for name, value in self.__dict__.items() if name != "_contents"}

    def fingerprint(self) -> str:
        images, _ = self._contents
        options = (self.images.describe(), self.box_format, self.names, list(self.columns))
        return digest_files([self.file], *options, file_statuses(self._image_paths(images)))

    @cached_property
    def columns(self) -> dict[str, datasets.Value]:  # type: ignore[override]
        """`source_row`, and `absent` if the file says it of any row."""
        images, _ = self._contents
        says_absent = any(absent is not None for image in images for *_, absent in image.rows)
        if not says_absent and self.names and self.names["absent"] != "absent":
            raise ValueError(f"{self.file}: no row says true or false in {self.names['absent']!r}, named for absent.")
        columns = {"source_row": datasets.Value("string")}
        return columns | ({"absent": datasets.Value("bool")} if says_absent else {})

    def list_images(self) -> tuple[list[ListedImage], list[str]]:
        return self._contents

    def annotate(self, item: ListedImage) -> AnnotatedImage:
        rows = [
            {
                "where": self._where(source_row),
                "expression": expression,
                "box": box,
                "written_box": as_written(box, self.box_format),
                "source_row": source_row,
                "absent": bool(absent),
            }
            for source_row, expression, box, absent in item.rows
        ]
        return AnnotatedImage(item.name, item.name, item.size, rows)

    def image_id_of(self, item: ListedImage) -> str:
        return item.name

    def path_of(self, item: ListedImage) -> str | None:
        try:
            return super().path_of(item)
        except ValueError as error:
            raise ValueError(f"{self._where(item.rows[0][0])}: {error}") from error

    def _where(self, source_row: str) -> str:
        return f"{self.file}, {'line' if self.names else 'annotation'} {source_row}"

    @cached_property
    def _contents(self) -> tuple[list[ListedImage], list[str]]:
        """The images in the file and what is wrong with it, read once for both the fingerprint and the rows."""
        if self.names is None:
            entries = read_coco(self.file)
        else:
            read = read_csv if self.file.suffix == ".csv" else read_jsonl
            entries = read(self.file, self.names, self.box_format)
        images, problems = _group_by_image(entries)
        if look_normalised(box for image in images for _, _, box, _ in image.rows):
            raise ValueError(
                f"{self.file}: every box lies within [0, 1], so they look normalised to the image; expected pixels."
            )
        return images, problems

    def _image_paths(self, images: list[ListedImage]) -> Iterator[str]:
        """The image files that are there."""
        for image in images:
            try:
                path = self.path_of(image)
            except ValueError:  # is reported when rows are made
                continue
            if path is not None:
                yield path


def _find_file(data_dir: Path, split: str) -> Path:
    """The one file of a split."""
    if not SPLIT_NAME.fullmatch(split):
        raise ValueError(f"split must be a name of letters, digits, '_', '-' and '.', not {reprlib.repr(split)}.")
    if split.lower() == "all":
        raise ValueError(f'`datasets` takes the split name "{split}" for every split, expected another name.')
    stems = dict.fromkeys((short_split_name(split), full_split_name(split)))
    files = list_files(data_dir)
    found = [stem + suffix for stem in stems for suffix in SUFFIXES if stem + suffix in files]
    if len(found) > 1:
        raise ValueError(f"{data_dir} has {' and '.join(found)}, expected one file for the split {split}.")
    if not found:
        splits = sorted({Path(name).stem for name in files if name.endswith(SUFFIXES)})
        there = f"there are the splits {', '.join(splits)}" if splits else "nor any other such file"
        raise FileNotFoundError(f"no {split}.jsonl, {split}.csv or {split}.json in {data_dir}; {there}.")
    return data_dir / found[0]


def _check_box_format(file: Path, box_format: str | None) -> str:
    """The format of a file's boxes. It is never guessed, as four numbers may be either."""
    if box_format not in (None, *BOX_COLUMNS):
        raise ValueError(f'box_format must be "xyxy" or "xywh", not {box_format!r}.')
    if file.suffix == ".json":
        if box_format == "xyxy":
            raise ValueError(f'box_format must be "xywh" or left out for {file}: COCO\'s boxes are xywh.')
        return "xywh"
    if box_format is None:
        raise ValueError(
            f'box_format is needed for {file}: "xyxy" or "xywh". Four numbers do not tell which they are, and nothing '
            "is guessed."
        )
    return box_format


def _group_by_image(entries: Iterable[Entry | str]) -> tuple[list[ListedImage], list[str]]:
    """Images in the order in which they first come up, and the problems among the entries."""
    images: dict[str, ListedImage] = {}
    problems = []
    for entry in entries:
        if isinstance(entry, str):
            problems.append(entry)
            continue
        image = images.setdefault(entry.name, ListedImage(entry.name, entry.size, []))
        image.rows.extend((entry.source_row, text, entry.box, entry.absent) for text in entry.expressions)
    return list(images.values()), problems
