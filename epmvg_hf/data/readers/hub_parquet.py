"""The RefCOCO family from parquet files of the Hub: one row per referred object, with several expressions.

* `lmms-lab/RefCOCO`, `lmms-lab/RefCOCOplus` and `lmms-lab/RefCOCOg` have the image of each object inside, `bbox` as
  xywh float pixels of it, the expressions as `answer` and the id of COCO's annotation as `question_id`. Their "val" of
  RefCOCO and RefCOCOg holds the validation splits of two ways to split, one after the other.
* `jxu124/refcoco`, `jxu124/refcocoplus` and `jxu124/refcocog` have the refer API's fields and no images. `raw_anns` is
  COCO's annotation as JSON, with xywh float pixels; the convention of `bbox` is not documented, so it is checked.
  Their "test" is testA where there is one.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..annotations import AnnotatedImage, is_box
from ..benchmarks import Counts, Wanted, short_split_name
from ..files.image_files import ImageRoot, file_statuses, list_files
from ..files.parquet_files import image_folder, read_rows, write_images
from .source import GroundingSource

# What the folder of a downloaded repository is called: lmms-lab's, jxu124's.
REPOSITORIES = {
    "refcoco": ("RefCOCO", "refcoco"),
    "refcoco+": ("RefCOCOplus", "refcocoplus"),
    "refcocog": ("RefCOCOg", "refcocog"),
}
FILE_NAMES = {
    "train": ("train",),
    "validation": ("val", "validation"),
    "test": ("test",),
    "testA": ("testA", "test"),
    "testB": ("testB",),
}
# Rows of lmms-lab's "val" where it holds two ways to split: unc's 3,811 or umd's 2,573 objects and google's 5,000.
MIXED_ROWS = {"refcoco": 8_811, "refcocog": 7_573}

LMMS_COLUMNS = ["question_id", "answer", "bbox", "file_name"]  # and the image, which is read apart
JXU_COLUMNS = ["ref_id", "ann_id", "image_id", "file_name", "split", "sentences", "bbox", "raw_anns", "raw_image_info"]

# Bounds on files of unknown origin.
MAX_IMAGES_GROWTH = 10  # how much larger than the parquet files all images may be; photos are compressed already
MAX_EXPRESSIONS = 1_000  # of one object
MAX_JSON_CHARACTERS = 2**22

BOX_TOLERANCE = 0.02  # pixels
FILE_NAME = re.compile(r"(COCO_(?:train|val)2014_[0-9]{12})(?:_[0-9]+)?\.jpg")


class HubParquet(GroundingSource):
    """
    One split from local parquet files. Images that are inside them are written once each, at the first opening, to
    `<cache_dir>/epmvg_hf-images/<digest>/`, and rows point to those files.

    Expressions are `answer` as it is, or `sent`, the cleaned text of the refer API. Which benchmark of the family
    lmms-lab's files are of is not written in them: the caller says it.

    Args:
        wanted ([`Wanted`]): the split, and where images are that are not in the files.
        files (`list[Path]`): the parquet files of the split, in order.
        cache_dir (`str`, *optional*): where images are written. Defaults to the cache of `datasets`.

    Raises:
        `ValueError`: A file is no parquet file or has other columns; when rows are made, also if its boxes are of no
            known convention or its two ways to split cannot be told apart.
    """

    def __init__(self, wanted: Wanted, files: list[Path], cache_dir: str | None = None):
        self.wanted, self.name, self.split = wanted, wanted.benchmark.name, wanted.split
        self.files = [path.resolve() for path in files]
        self.has_images = has_images(self.files[0])
        self.folder = image_folder(self.files, cache_dir)
        self.images = ImageRoot(self.folder) if self.has_images else wanted.images
        string = datasets.Value("string")
        self.columns = {"ref_id": string, "ann_id": string, "sent_id": string}

    @classmethod
    def find(cls, wanted: Wanted) -> "HubParquet | None":
        if wanted.benchmark.name not in REPOSITORIES:
            return None
        for folder in folders_of(wanted):
            for name in FILE_NAMES[wanted.split]:
                files = find_files(folder, name)
                if files and is_split(wanted, name, has_images(files[0])):
                    return cls(wanted, files, wanted.cache_dir)
        return None

    @classmethod
    def looks_for(cls, wanted: Wanted) -> str:
        names = " or ".join(f"{name}-*.parquet" for name in FILE_NAMES.get(wanted.split, (wanted.split,)))
        lmms, jxu = REPOSITORIES.get(wanted.benchmark.name, ("RefCOCO", "refcoco"))
        return f"{names} of lmms-lab/{lmms} or jxu124/{jxu} (there or in data, {lmms}/data or {jxu}/data)"

    def fingerprint(self) -> str:
        """
        Changes when a file does, by size or time of change. As this is asked for at every opening, it also writes the
        images that are not in the cache (any more): prepared rows point to them.
        """
        images = ""
        if self.has_images:
            self._write_images(self._read_objects())
        else:
            rows = (row for path in self.files for _, row in read_rows(path, ["file_name"]))
            matches = (FILE_NAME.fullmatch(str(row["file_name"])) for row in rows)
            names = {f"{match[1]}.jpg" for match in matches if match}
            images = file_statuses(path for name in names if (path := self.images.find(name)))
        parts = f"{self.wanted.split_by}\n{self.images.describe()}\n{file_statuses(map(str, self.files))}\n{images}"
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        objects = self._read_objects()
        unusable = self._write_images(objects) if self.has_images else {}
        problems = [found for found in objects if isinstance(found, str)] + list(unusable.values())
        images: dict[str, AnnotatedImage] = {}
        for found in objects:
            if not isinstance(found, str) and found.name not in unusable:
                image = AnnotatedImage(found.name, image_id_in(found.name), found.size, [])
                images.setdefault(found.name, image).rows.extend(found.rows)
        return list(images.values()), problems

    def _read_objects(self) -> list["ReferredObject | str"]:
        """The rows of the files that are of the split, or what is wrong with them."""
        if not self.has_images:
            return [found for path in self.files for found in read_jxu(path, self.split)]
        objects = [found for path in self.files for found in read_lmms(path)]
        if self.split == "validation" and len(objects) == MIXED_ROWS.get(self.name):
            return separate(objects, self.wanted, self.files[0].parent)
        return objects

    def _write_images(self, objects: list["ReferredObject | str"]) -> dict[str, str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        there = list_files(self.folder)
        rows: dict[str, tuple[Path, int]] = {}
        for found in objects:
            if not isinstance(found, str) and found.name not in there:
                rows.setdefault(found.name, (found.path, found.number))
        return write_images(rows, self.folder, MAX_IMAGES_GROWTH * sum(path.stat().st_size for path in self.files))


@dataclass
class ReferredObject:
    """
    One row of a file.

    Args:
        path (`Path`): the file.
        number (`int`): of the row in it, from 0.
        name (`str`): of the image file.
        size (`tuple[int, int]` or `None`): see [`AnnotatedImage`].
        rows (`list[dict[str, Any]]`): see [`AnnotatedImage`].
    """

    path: Path
    number: int
    name: str
    size: tuple[int, int] | None
    rows: list[dict[str, Any]]


# Which files


def folders_of(wanted: Wanted) -> list[Path]:
    """The folders that the files of a benchmark may be in."""
    names = REPOSITORIES[wanted.benchmark.name]
    return [wanted.data_dir / part for name in (".", *names) for part in (name, f"{name}/data")]


def find_files(folder: Path, name: str) -> list[Path]:
    """`<name>.parquet` or the parts `<name>-00000-of-00004.parquet`, which older uploads give a hash as well."""
    found = {}
    for file_name in list_files(folder):
        match = re.fullmatch(rf"{name}(?:-([0-9]{{5}})-of-([0-9]{{5}})(?:-[0-9a-f]{{16}})?)?\.parquet", file_name)
        if match:
            found[file_name] = match[1] and (int(match[1]), int(match[2]))
    parts = sorted((part, file_name) for file_name, part in found.items() if part)
    if not parts:
        return [folder / file_name for file_name in found]
    count = parts[0][0][1]
    if [part for part, _ in parts] != [(number, count) for number in range(count)]:
        names = ", ".join(file_name for _, file_name in parts[:8])
        raise ValueError(f"{folder} has {names} of {name}, expected each of {count} parts once.")
    return [folder / file_name for _, file_name in parts]


def has_images(path: Path) -> bool:
    """Whether a file has lmms-lab's columns, or else jxu124's."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {str(error).strip()}.") from error
    if {"image", *LMMS_COLUMNS} <= set(schema.names):
        return True
    if set(JXU_COLUMNS) <= set(schema.names):
        return False
    raise ValueError(
        f"{path} has the columns {', '.join(schema.names)[:300]}, expected those of lmms-lab "
        f"({', '.join(LMMS_COLUMNS)}, image) or of jxu124 ({', '.join(JXU_COLUMNS)})."
    )


def is_split(wanted: Wanted, name: str, of_lmms: bool) -> bool:
    """Whether files of that name are of the wanted split: "test" means testA for jxu124 and google's for lmms-lab."""
    if of_lmms:
        return name != "test" or wanted.split == "test"
    return wanted.split_by == next(iter(wanted.benchmark.splits))


# What is in them


def read_lmms(path: Path) -> Iterator[ReferredObject | str]:
    """The objects in a file of lmms-lab, or a sentence for a row that cannot be used."""
    for number, row in read_rows(path, LMMS_COLUMNS):
        where = f"{path}, row {number}"
        try:
            x, y, width, height = read_numbers(row["bbox"], "bbox")
            box, ids = [x, y, x + width, y + height], {"ref_id": None, "ann_id": as_id(row["question_id"])}
            rows = [
                {"where": where, "expression": expression, "box": box, **ids, "sent_id": None}
                for expression in read_list(row["answer"], "answer")
            ]
            yield ReferredObject(path, number, read_name(row["file_name"]), None, rows)
        except ValueError as error:
            yield f"{where}: {error}"


def read_jxu(path: Path, split: str) -> Iterator[ReferredObject | str]:
    """The objects of a split in a file of jxu124, or a sentence for a row that cannot be used."""
    conventions = {"xywh", "xyxy"}  # which `bbox` may still have
    for number, row in read_rows(path, JXU_COLUMNS):
        where = f"{path}, row {number}"
        try:
            bbox, raw = (
                read_numbers(row["bbox"], "bbox"),
                read_numbers(read_json(row, "raw_anns").get("bbox"), "raw_anns"),
            )
            x, y, width, height = raw
            box = [x, y, x + width, y + height]
            name = read_name(row["file_name"])
            if image_id_in(name) != as_id(row["image_id"]):
                raise ValueError(f"file_name {row['file_name']!r} is not of image_id {row['image_id']!r}.")
            if row["split"] != short_split_name(split):
                raise ValueError(f"split is {reprlib.repr(row['split'])}, expected that of the {split} split.")
            size = read_size(read_json(row, "raw_image_info"))
            rows = [
                {
                    "where": where,
                    "expression": sentence.get("sent"),
                    "box": box,
                    "ref_id": as_id(row["ref_id"]),
                    "ann_id": as_id(row["ann_id"]),
                    "sent_id": as_id(sentence.get("sent_id")),
                }
                for sentence in read_list(row["sentences"], "sentences", dict)
            ]
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        conventions &= {kind for kind, box_as in (("xywh", raw), ("xyxy", box)) if are_close(bbox, box_as)}
        if not conventions:
            raise ValueError(
                f"{where}: bbox is {bbox}, expected in all rows {raw} (xywh, as in raw_anns) or in all {box} (xyxy)."
            )
        yield ReferredObject(path, number, name, size, rows)


def separate(objects: list[ReferredObject | str], wanted: Wanted, folder: Path) -> list[ReferredObject | str]:
    """
    The rows of one of the two ways to split that lmms-lab's "val" holds. No column tells which, so a run of rows at
    its beginning or end is taken for a way only if it has the official numbers of objects, expressions and images.
    """
    for way in wanted.benchmark.splits:
        counts = wanted.benchmark.counts.get((way, wanted.split))
        if counts is None or counts.references is None:
            continue
        size = counts.references
        for run, rest in ((objects[:size], objects[size:]), (objects[-size:], objects[:-size])):
            if count(run) == counts:
                return run if way == wanted.split_by else rest
    ways = " and ".join(wanted.benchmark.splits)
    raise ValueError(
        f"{folder} has {len(objects):,} rows of the {wanted.split} splits of {ways} together, expected the official "
        "numbers of objects, expressions and images in its first or last rows, to tell them apart."
    )


def count(objects: list[ReferredObject | str]) -> Counts:
    """How many expressions, objects and images there are; a row that cannot be used counts as an object."""
    usable = [found for found in objects if not isinstance(found, str)]
    return Counts(sum(len(found.rows) for found in usable), len(objects), len({found.name for found in usable}))


def read_name(file_name: Any) -> str:
    """
    The image of a `file_name`, which is the refer API's: `COCO_train2014_000000581857_16.jpg` is object 16 of
    `COCO_train2014_000000581857.jpg`. No other names are understood, so it never leads out of a folder.
    """
    match = FILE_NAME.fullmatch(file_name) if isinstance(file_name, str) else None
    if match is None:
        raise ValueError(
            f"file_name is {reprlib.repr(file_name)}, expected one as COCO_train2014_000000581857_16.jpg."
        )
    return f"{match[1]}.jpg"


def image_id_in(name: str) -> str:
    """COCO's number of an image, which is the refer API's too: `"581857"` for `COCO_train2014_000000581857.jpg`."""
    return str(int(name.removesuffix(".jpg").rpartition("_")[2]))


def read_numbers(values: Any, column: str) -> list[float]:
    """Four numbers of pixels; a `ValueError` if it is anything else."""
    if not is_box(values):
        raise ValueError(f"{column} has the box {reprlib.repr(values)}, expected 4 finite numbers.")
    return [float(value) for value in values]


def read_list(values: Any, column: str, kind: type = object) -> list[Any]:
    """A list that is not empty, with items of one kind; a `ValueError` if it is anything else, or too long."""
    if not isinstance(values, list) or not values or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{column} is {reprlib.repr(values)}, expected a list of expressions.")
    if len(values) > MAX_EXPRESSIONS:
        raise ValueError(f"{column} has {len(values):,} expressions, expected at most {MAX_EXPRESSIONS:,}.")
    return values


def read_json(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The JSON object in a column; a `ValueError` if it holds anything else, or too much."""
    text = row[column]
    try:
        found = json.loads(text) if isinstance(text, str) and len(text) <= MAX_JSON_CHARACTERS else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{column} is {reprlib.repr(str(text))}, expected a JSON object.")
    return found


def read_size(info: dict[str, Any]) -> tuple[int, int]:
    """Width and height in pixels; a `ValueError` if they are no sizes of an image."""
    width, height = info.get("width"), info.get("height")
    if not (type(width) is int and type(height) is int and 0 < width < 100_000 and 0 < height < 100_000):
        raise ValueError(f"raw_image_info has the width and height {reprlib.repr((width, height))}, expected pixels.")
    return width, height


def as_id(value: Any) -> str | None:
    """An id as text."""
    return None if value is None else str(value)


def are_close(box: list[float], other: list[float]) -> bool:
    """Whether two boxes are the same but for rounding."""
    return all(abs(one - two) <= BOX_TOLERANCE for one, two in zip(box, other, strict=True))
