"""
The RefCOCO family from parquet files of the Hub: one row per referred object, with several expressions.

* `lmms-lab/RefCOCO`, `lmms-lab/RefCOCOplus` and `lmms-lab/RefCOCOg` hold the image of each object. `bbox` is xywh in
  float pixels of that image, `answer` lists the expressions, and `question_id` is the id of COCO's annotation. Their
  "val" of RefCOCO and RefCOCOg holds the validation splits of two ways to split, one after the other.
* `jxu124/refcoco`, `jxu124/refcocoplus` and `jxu124/refcocog` have the fields of the refer API and no images.
  `raw_anns` is COCO's annotation as JSON, with a box of xywh float pixels. Nothing documents whether `bbox` is xywh or
  xyxy, so it is only compared with that box. Their "test" is testA where the benchmark has a testA.
"""

import hashlib
import itertools
import re
import reprlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..annotations import AnnotatedImage
from ..benchmarks import Counts, SplitRequest, short_split_name
from ..field_values import list_expressions, parse_json_object, to_xyxy
from ..files.image_files import ImageFolders, file_statuses
from ..files.parquet_files import check_columns, has_all_images, read_column_names, read_parquet, write_image_files
from .source import GroundingSource

# How lmms-lab and jxu124 call their repositories, and so the folders that one downloads.
REPOSITORIES = {
    "refcoco": ("RefCOCO", "refcoco"),
    "refcoco+": ("RefCOCOplus", "refcocoplus"),
    "refcocog": ("RefCOCOg", "refcocog"),
}
FILE_NAMES = {"validation": ("val", "validation"), "testA": ("testA", "test")}  # other splits have one name
FILE_NAME = re.compile(r"(COCO_(?:train|val)2014_([0-9]{12}))(?:_[0-9]+)?\.jpg")

# Kinds of columns, see [`check_columns`].
TEXT, ID, NUMBERS = pa.string(), pa.int64(), pa.list_(pa.float64())
SENTENCES = pa.list_(pa.struct({"sent": TEXT, "sent_id": ID}))
LMMS_COLUMNS = pa.schema({"question_id": ID, "answer": pa.list_(TEXT), "bbox": NUMBERS, "file_name": TEXT})
LMMS_IMAGES = pa.schema({"file_name": TEXT, "image": pa.struct({"bytes": pa.binary()})})
JXU_COLUMNS = pa.schema(
    dict.fromkeys(("ref_id", "ann_id", "image_id"), ID)
    | dict.fromkeys(("file_name", "split", "raw_anns", "raw_image_info"), TEXT)
    | {"sentences": SENTENCES, "bbox": NUMBERS}
)

# Rows of lmms-lab's "val" where it holds two ways to split: unc's 3,811 or umd's 2,573 objects and google's 5,000.
MIXED_ROWS = {"refcoco": 8_811, "refcocog": 7_573}

IMAGE_STARTS = (b"\xff\xd8", b"\x89PNG")  # of JPEG, which COCO's images are, and of PNG
MAX_IMAGES_GROWTH = 10  # how many times larger than the parquet files the images may be; photos hardly compress
BOX_TOLERANCE = 0.02  # pixels, for rounding


class HubParquet(GroundingSource):
    """
    One split from local parquet files. Expressions are `answer` as it is, or `sent`, the refer API's cleaned text.
    lmms-lab's files do not say which benchmark of the family they are of, so the request has to be right about it.

    Images inside the files are written once each to `<cache_dir>/epmvg_hf-parquet-images/<digest>/` when the files are
    first opened. The rows of one image then share one file: a cache of rows with their images inside, as
    `datasets.load_dataset("parquet")` makes it, would hold an image again for each of its objects.

    Args:
        request ([`SplitRequest`]): the split, where images are that are not in the files, and the folder of the cache.
        files (`list[Path]`): the parquet files of the split, in order.

    Raises:
        `ValueError`: A file is no parquet file or has other columns; when rows are made, also if its two ways to split
            cannot be told apart.
    """

    columns = dict.fromkeys(("ref_id", "ann_id", "sent_id"), datasets.Value("string"))

    def __init__(self, request: SplitRequest, files: list[Path]):
        self.request, self.name, self.split = request, request.benchmark.name, request.split
        self.files = [path.resolve() for path in files]
        self.has_images = _has_images(files[0])
        for path in self.files:
            check_columns(path, pa.unify_schemas([LMMS_COLUMNS, LMMS_IMAGES]) if self.has_images else JXU_COLUMNS)

    @classmethod
    def find(cls, request: SplitRequest) -> "HubParquet | None":
        repositories = REPOSITORIES.get(request.benchmark.name, ())
        folders = [f"{name}/{part}" for name in (".", *repositories) for part in (".", "data")] if repositories else []
        for folder, name in itertools.product(folders, _file_names(request.split)):
            files = _find_parts(request.data_dir / folder, name)
            if files and _holds_split(request, name, _has_images(files[0])):
                return cls(request, files)
        return None

    @classmethod
    def looks_for(cls, request: SplitRequest) -> str:
        names = " or ".join(f"{name}-*.parquet" for name in _file_names(request.split))
        lmms, jxu = REPOSITORIES[request.benchmark.name]
        return f"{names} of lmms-lab/{lmms} or jxu124/{jxu} (there or in data, {lmms}/data or {jxu}/data)"

    @cached_property
    def images(self) -> ImageFolders:  # type: ignore[override]
        """The image files. Writes those that are inside the parquet files, unless all are in the cache."""
        if not self.has_images:
            return self.request.images
        digest = hashlib.sha256(file_statuses(map(str, self.files)).encode()).hexdigest()[:32]
        root = Path(self.request.cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser().resolve()
        folder = root / "epmvg_hf-parquet-images" / digest
        if not has_all_images(folder):
            max_bytes = MAX_IMAGES_GROWTH * sum(path.stat().st_size for path in self.files)
            write_image_files(folder, _read_images(self.files), max_bytes)
        return ImageFolders([folder])

    def fingerprint(self) -> str:
        statuses = file_statuses([*map(str, self.files), *self.images.paths.values()])
        return hashlib.sha256(f"{self.request.split_by}\n{statuses}".encode()).hexdigest()[:32]

    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        objects = list(self._read_objects())
        if self.has_images and self.split == "validation" and len(objects) == MIXED_ROWS.get(self.name):
            objects = _separate_ways(objects, self.request, self.files[0].parent)
        images: dict[str, AnnotatedImage] = {}
        for item in objects:
            if not isinstance(item, str):
                image = images.setdefault(item.name, AnnotatedImage(item.name, item.image_id, item.size, []))
                image.rows.extend(item.rows)
        return list(images.values()), [item for item in objects if isinstance(item, str)]

    def path_of(self, item: AnnotatedImage) -> str | None:
        path = super().path_of(item)
        if path is None and self.has_images:
            problem = "there is no image in that row, expected the bytes of a JPEG or PNG"
            raise ValueError(f"{item.rows[0]['where']}: {problem}.")
        return path

    def _read_objects(self) -> Iterator[AnnotatedImage | str]:
        """Each row as an image with one object, or a sentence if it cannot be used."""
        columns, parse_row = (LMMS_COLUMNS, _parse_lmms) if self.has_images else (JXU_COLUMNS, self._parse_jxu)
        for path in self.files:
            for row in read_parquet(path, columns):
                try:
                    yield parse_row(row.values(), row.where)
                except ValueError as error:
                    yield f"{row.where}: {error}."

    def _parse_jxu(self, row: dict[str, Any], where: str) -> AnnotatedImage:
        name, image_id = _parse_file_name(row["file_name"])
        if (_as_text(row["image_id"]), row["split"]) != (image_id, short_split_name(self.split)):
            found = f"image_id {row['image_id']} and split {reprlib.repr(row['split'])}"
            raise ValueError(f"{found} do not belong to {row['file_name']} of the {self.split} split")
        raw, image = _parse_json(row, "raw_anns"), _parse_json(row, "raw_image_info")
        size: tuple[Any, Any] = (image.get("width"), image.get("height"))  # which [`place_rows`] checks
        box, candidates = _parse_box(raw.get("bbox")), [_parse_box(row["bbox"], each) for each in ("xywh", "xyxy")]
        if not any(np.allclose(box, each, rtol=0, atol=BOX_TOLERANCE) for each in candidates):
            raise ValueError(f"bbox is {row['bbox']}, expected {raw['bbox']} (xywh, as in raw_anns) or {box} (xyxy)")
        same = {"where": where, "box": box, "ref_id": _as_text(row["ref_id"]), "ann_id": _as_text(row["ann_id"])}
        sentences = [sentence or {} for sentence in list_expressions(row["sentences"])]
        rows = [
            {"expression": each.get("sent"), "sent_id": _as_text(each.get("sent_id")), **same} for each in sentences
        ]
        return AnnotatedImage(name, image_id, size, rows)


# Which files


def _file_names(split: str) -> tuple[str, ...]:
    return FILE_NAMES.get(split, (split,))


def _find_parts(folder: Path, name: str) -> list[Path]:
    """`<name>.parquet`, or the parts `<name>-00000-of-00004.parquet`, whose names end in a hash in older uploads."""
    parts = sorted(folder.glob(f"{name}-*-of-*.parquet"))
    expected = [f"{name}-{number:05}-of-{len(parts):05}" for number in range(len(parts))]
    if [part.name[: len(start)] for part, start in zip(parts, expected, strict=True)] != expected:
        names = ", ".join(part.name for part in parts[:8])
        raise ValueError(f"{folder} has {names} of {name}, expected each part exactly once.")
    return parts or [path for path in [folder / f"{name}.parquet"] if path.is_file()]


def _has_images(path: Path) -> bool:
    """Whether a file is one of lmms-lab, with images, or else one of jxu124."""
    return "image" in read_column_names(path)


def _holds_split(request: SplitRequest, name: str, has_images: bool) -> bool:
    """Whether files of that name are of the split: lmms-lab's "test" is that of google, jxu124's is testA."""
    if has_images:
        return name != "test" or request.split == "test"
    return request.split_by == next(iter(request.benchmark.splits))  # jxu124 has no other way to split


# What is in them


def _read_images(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each image once, although every row has an image: the first bytes that there are for it."""
    seen = set()
    for row in itertools.chain.from_iterable(read_parquet(path, LMMS_IMAGES) for path in files):
        try:
            values = row.values()
        except ValueError:  # the name is not UTF-8, which is reported when the annotations are read
            continue
        match, content = FILE_NAME.fullmatch(values["file_name"] or ""), (values["image"] or {}).get("bytes")
        if match and content and match[1] not in seen:
            seen.add(match[1])
            if content.startswith(IMAGE_STARTS):
                yield f"{match[1]}.jpg", content


def _parse_lmms(row: dict[str, Any], where: str) -> AnnotatedImage:
    name, image_id = _parse_file_name(row["file_name"])
    same = {"where": where, "box": _parse_box(row["bbox"]), "ann_id": _as_text(row["question_id"])}
    rows = [{"expression": expression, **same} for expression in list_expressions(row["answer"])]
    return AnnotatedImage(name, image_id, None, rows)


def _parse_file_name(file_name: str | None) -> tuple[str, str]:
    """
    Name and id of an image: `COCO_train2014_000000581857_16.jpg` is object 16 of `COCO_train2014_000000581857.jpg`,
    whose id is `"581857"`. As no other names are understood, none leads out of a folder.
    """
    match = FILE_NAME.fullmatch(file_name or "")
    if match is None:
        raise ValueError(f"file_name is {reprlib.repr(file_name)}, expected one as COCO_train2014_000000581857_16.jpg")
    return f"{match[1]}.jpg", str(int(match[2]))


def _parse_box(box: Any, box_format: str = "xywh") -> list[float]:
    """A box as xyxy. Every object of these benchmarks has one."""
    if (xyxy := to_xyxy(box, box_format)) is None:
        raise ValueError(f"the box is {box}, expected 4 finite numbers")
    return xyxy


def _as_text(identifier: int | str | None) -> str | None:
    return None if identifier is None else str(identifier)


def _parse_json(row: dict[str, Any], column: str) -> dict[str, Any]:
    try:
        return parse_json_object(row[column] or "")
    except ValueError as error:
        raise ValueError(f"{column} is {error}") from error


def _separate_ways(
    objects: list[AnnotatedImage | str], request: SplitRequest, folder: Path
) -> list[AnnotatedImage | str]:
    """
    The rows of one of the two ways to split that lmms-lab's "val" holds. No column tells them apart, so the first or
    last rows are taken for a way only if they have its official numbers of objects, expressions and images. A row that
    cannot be used counts as an object.
    """
    known, other = request.benchmark.splits  # the first is the one whose numbers are published
    official = request.benchmark.counts[known, request.split]
    size = official.references
    assert size is not None
    for run, rest in ((objects[:size], objects[size:]), (objects[-size:], objects[:-size])):
        usable = [item for item in run if not isinstance(item, str)]
        if official == Counts(sum(len(item.rows) for item in usable), size, len({item.name for item in usable})):
            return run if request.split_by == known else rest
    raise ValueError(
        f"{folder} has {len(objects):,} rows of the {request.split} splits of {known} and {other} together, expected "
        "the official numbers of objects, expressions and images in its first or last rows, to tell them apart."
    )
