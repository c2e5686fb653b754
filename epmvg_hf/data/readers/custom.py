"""Data of one's own: a file of rows beside a folder of images."""

import hashlib
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets

from ..annotations import AnnotatedImage
from ..benchmarks import full_split_name, short_split_name
from ..box_formats import look_normalised
from ..files.image_files import ImageRoot, file_statuses, list_files, measure_image
from .custom_files import Entry, check_box_format, name_columns, read_coco, read_csv, read_jsonl
from .source import GroundingSource

SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")  # also keeps the file inside the data folder
SUFFIXES = (".jsonl", ".csv", ".json")
MAX_FILE_BYTES = 2**31  # a bound on files of unknown origin
FEW_PIXELS = 8  # in an image not wider and higher, boxes within [0, 1] may be meant in pixels


class ListedImage(NamedTuple):
    """An image and its rows as short as they go: each is (source_row, expression, xyxy box or `None`)."""

    name: str
    size: tuple[int, int] | None
    rows: list[tuple[str, str, list[float] | None]]


class Contents(NamedTuple):
    """What a file says, and a digest of its bytes."""

    images: list[ListedImage]
    problems: list[str]
    digest: str


class CustomData(GroundingSource):
    """
    One split from `<split>.jsonl`, `<split>.csv` or `<split>.json`. Boxes are in pixels, 0-based, of the image as it
    is displayed, that is after its EXIF orientation, which `datasets` applies when it decodes an image.

    - JSONL has one object per line with `image` (path below the folder of images), `expression` (text, or a list of
      texts for the same box) and `box` (four numbers, or `null` for an expression without box, which is for
      distillation only). Other fields are ignored.
    - CSV, with commas, has the columns `image`, `expression`, and either `box` (`"[1, 2, 3, 4]"` or `"1 2 3 4"`) or
      one column per number: `xmin`, `ymin`, `xmax`, `ymax` for xyxy, `x`, `y`, `width`, `height` for xywh. Empty
      cells mean that there is no box.
    - JSON is that of COCO: `images` with `id` and `file_name`, and `annotations` with `id`, `image_id`, `bbox` and one
      of `caption`, `captions`, `expression` and `expressions`. Where an image has `width` and `height`, boxes are
      scaled from them to the file. A file in which no annotation has a `bbox` gives expressions without box.

    The path of an image, as written with forward slashes, is its `image_id`. The rows of one image become consecutive.
    The column `source_row` (`str`) is the line of the file, or the id of the COCO annotation.

    Args:
        data_dir (`Path`): folder with the file.
        split (`str`):
            Name of the file without suffix: letters, digits, `_`, `-` and `.`. For `"val"` and `"validation"` either
            file will do. As a split of `datasets`, `-` becomes `_`.
        image_dir (`Path`, *optional*): folder that the images' paths start from; `data_dir` when not given.
        box_format (`str`, *optional*):
            `"xyxy"` (half-open: the whole image is `[0, 0, width, height]`) or `"xywh"` (corner, width and height).
            Needed but for COCO files, which have xywh.
        columns (`dict[str, str]`, *optional*):
            What the file calls `image`, `expression`, `box` and the columns of the single numbers. Not for COCO files.

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
    columns = {"source_row": datasets.Value("string")}  # noqa: RUF012
    turned = True

    def __init__(
        self,
        data_dir: Path,
        split: str,
        image_dir: Path | None = None,
        box_format: str | None = None,
        columns: dict[str, str] | None = None,
    ):
        self.file = find_file(data_dir, split)
        self.split = full_split_name(split).replace("-", "_")
        self.images = ImageRoot(image_dir or data_dir)
        self.box_format = check_box_format(self.file, box_format)
        self.names = None if self.file.suffix == ".json" else name_columns(self.box_format, columns)
        if self.names is None and columns:
            raise ValueError(f"columns does not apply to {self.file}: COCO's fields have names of their own.")
        if (size := self.file.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(
                f"{self.file} has {size:,} bytes, expected at most {MAX_FILE_BYTES:,}; as_grounding_dataset streams "
                "data of any size."
            )
        self._contents: Contents | None = None

    def __getstate__(self) -> dict:
        # A process that prepares rows is sent its images; it needs no second copy of all of them.
        return self.__dict__ | {"_contents": None}

    def fingerprint(self) -> str:
        contents = self._read()
        options = (str(self.file), self.images.describe(), self.box_format, self.names, contents.digest)
        digest = hashlib.sha256(repr(options).encode())
        digest.update(file_statuses(self._paths(contents.images)).encode())
        return digest.hexdigest()[:32]

    def list_images(self) -> tuple[list[ListedImage], list[str]]:
        contents = self._read()
        return contents.images, contents.problems

    def annotate(self, item: ListedImage) -> AnnotatedImage:
        rows = [
            {"where": self._where(source_row), "expression": expression, "box": box, "source_row": source_row}
            for source_row, expression, box in item.rows
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

    def _read(self) -> Contents:
        """Reads the file once, for the fingerprint and the rows alike."""
        if self._contents is None:
            digest = hashlib.sha256()
            if self.names is None:
                entries = read_coco(self.file, digest)
            else:
                read = read_csv if self.file.suffix == ".csv" else read_jsonl
                entries = read(self.file, digest, self.names, self.box_format)
            images, problems = group_by_image(entries)
            self._check_pixels(images)
            self._contents = Contents(images, problems, digest.hexdigest())
        return self._contents

    def _check_pixels(self, images: list[ListedImage]) -> None:
        """Raises a `ValueError` if no box leaves the first pixel of an image that has many."""
        if not look_normalised(box for image in images for _, _, box in image.rows):
            return
        size = next(filter(None, map(self._size_of, images)), None)
        if size is None or max(size) > FEW_PIXELS:
            raise ValueError(
                f"{self.file}: every box lies within [0, 1], so they look normalised to the image; expected pixels."
            )

    def _size_of(self, item: ListedImage) -> tuple[int, int] | None:
        """Width and height, if the image has them and can be read."""
        try:
            path = self.path_of(item)
            return item.size if path is None else measure_image(path, turned=True)
        except ValueError:
            return item.size

    def _paths(self, images: list[ListedImage]) -> Iterator[str]:
        """The image files that are there."""
        for image in images:
            try:
                path = self.path_of(image)
            except ValueError:
                continue
            if path is not None:
                yield path


def find_file(data_dir: Path, split: str) -> Path:
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


def group_by_image(entries: Iterable[Entry | str]) -> tuple[list[ListedImage], list[str]]:
    """Images in the order in which they first come up, and the problems among the entries."""
    images: dict[str, ListedImage] = {}
    problems = []
    for entry in entries:
        if isinstance(entry, str):
            problems.append(entry)
            continue
        image = images.setdefault(entry.name, ListedImage(entry.name, entry.size, []))
        image.rows.extend((entry.source_row, expression, entry.box) for expression in entry.expressions)
    return list(images.values()), problems
