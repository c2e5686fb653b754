"""
ReferItGame from JSON files, in the split that papers on phrase grounding use: one row per expression for a region of
a photo.

The JSON files (ronghanghu/text_objseg on GitHub) call a region `<image>_<number>`. `referit_query_<split>.json` has
the expressions of each region as the players typed them, `referit_bbox.json` its box (xyxy integers, 0-based and
inclusive), and `referit_imsize.json` the width and height of each image.
"""

import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets

from ..annotations import AnnotatedImage
from ..benchmarks import SplitRequest, short_split_name
from ..files.image_files import ImageFolders, file_statuses
from ..files.json_files import read_json
from .source import GroundingSource, digest_files

FOLDERS = (".", "referit", "data", "data/metadata", "referit/data/metadata")
QUERIES = "referit_query_{}.json"
BOXES, SIZES = "referit_bbox.json", "referit_imsize.json"

# Bounds on files of unknown origin.
MAX_JSON_BYTES = 2**28  # the largest real file has 3 MB
MAX_PIXELS = 100_000  # along a side of an image

_REGION = re.compile("([0-9]{1,12})_[0-9]{1,12}")


class ReferItJson(GroundingSource):
    """
    One split from text_objseg's files. Regions without expressions have no row.

    Args:
        folder (`Path`):
            Folder with `referit_query_<split>.json`, `referit_bbox.json` and, if the images may be stored at another
            size than the original one, `referit_imsize.json`.
        split (`str`):
            `"train"`, `"validation"`, `"test"` or `"trainval"`. Without a file of its own, the last is read from the
            files of the first two.
        images ([`ImageFolders`]): The images `<image>.jpg`.

    Raises:
        `FileNotFoundError`: There are no expressions of the split.
    """

    name = "referitgame"
    images: ImageFolders

    def __init__(self, folder: Path, split: str, images: ImageFolders):
        self.folder, self.split, self.images = folder.resolve(), split, images
        self.query_files = _find_queries(self.folder, split)
        if not self.query_files:
            expected = _query_names(split)
            raise FileNotFoundError(f"No expressions of the {split} split in {folder}, expected {expected}.")
        self.columns = {"ann_id": datasets.Value("string"), "sent_id": datasets.Value("string")}

    @classmethod
    def find(cls, request: SplitRequest) -> "ReferItJson | None":
        if request.benchmark.name != cls.name or request.split_by != "standard":
            return None
        for folder in (request.data_dir / name for name in FOLDERS):
            if (folder / BOXES).is_file() and _find_queries(folder, request.split):
                return cls(folder, request.split, request.images)
        return None

    @classmethod
    def looks_for(cls, request: SplitRequest) -> str:
        return f"{_query_names(request.split)} with {BOXES} (there or in {', '.join(FOLDERS[1:])})"

    def fingerprint(self) -> str:
        """A digest of the annotation files, and of the sizes and times of change of all images."""
        others = [path for path in (self.folder / BOXES, self.folder / SIZES) if path.is_file()]
        return digest_files([*self.query_files, *others], file_statuses(self.images.paths.values()))

    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        boxes = _read_object(self.folder / BOXES)
        sizes = _read_object(self.folder / SIZES) if (self.folder / SIZES).is_file() else None
        images: dict[str, AnnotatedImage] = {}
        problems: list[str] = []
        seen: set[str] = set()
        for path in self.query_files:
            queries = _read_object(path)
            for region, expressions in queries.items():
                try:
                    if region in seen or region in queries.repeated:
                        raise ValueError(f"{path}: region {region} is there twice, expected each once.")
                    image_id = _image_id(region, path)
                    size = None if sizes is None else _image_size(sizes, image_id, self.folder / SIZES)
                    box = _region_box(boxes, region, self.folder / BOXES)
                    if not isinstance(expressions, list) or not expressions:
                        raise ValueError(
                            f"{path}, region {region}: it has {reprlib.repr(expressions)}, expected a list of "
                            "expressions."
                        )
                except ValueError as error:
                    problems.append(str(error))
                    continue
                seen.add(region)
                image = images.setdefault(image_id, AnnotatedImage(f"{image_id}.jpg", image_id, size, []))
                # Two players who typed the same expression make two rows, as in the published counts.
                for number, expression in enumerate(expressions):
                    row = {"where": f"{path}, region {region}", "expression": expression, "box": box}
                    image.rows.append({**row, "ann_id": region, "sent_id": f"{region}-{number}"})
        return list(images.values()), problems


def _query_names(split: str) -> str:
    """The files with the expressions of a split, for error messages."""
    names = QUERIES.format(short_split_name(split))
    return names if split != "trainval" else f"{names} (or {QUERIES.format('train')} and {QUERIES.format('val')})"


def _find_queries(folder: Path, split: str) -> list[Path]:
    """The files with the expressions of a split, or an empty list if any of them is missing."""
    alone = folder / QUERIES.format(short_split_name(split))
    if alone.is_file() or split != "trainval":
        return [alone] if alone.is_file() else []
    both = [folder / QUERIES.format(part) for part in ("train", "val")]
    return both if all(path.is_file() for path in both) else []


class _JsonObject(dict):
    """A JSON object that records repeated names, of which `json` itself silently keeps the last."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = {name for name, count in counts.items() if count > 1}

    def get_once(self, name: str, path: Path) -> Any:
        """The value of a name; a `ValueError` if the file at `path` does not have the name exactly once."""
        if name not in self or name in self.repeated:
            raise ValueError(f"{path}: {name} is {'there twice' if name in self else 'missing'}, expected it once.")
        return self[name]


def _read_object(path: Path) -> _JsonObject:
    content = read_json(path, MAX_JSON_BYTES, object_pairs_hook=_JsonObject)
    if not isinstance(content, _JsonObject):
        raise ValueError(f"{path} has a {type(content).__name__} at its top, expected a JSON object.")
    return content


def _image_id(region: str, path: Path) -> str:
    """The image of a region. As it consists of digits, the image file's name cannot lead out of its folder."""
    match = _REGION.fullmatch(region)
    if match is None:
        raise ValueError(f"{path}: {reprlib.repr(region)} is not the name of a region, expected <digits>_<digits>.")
    return match[1]


def _image_size(sizes: _JsonObject, image_id: str, path: Path) -> tuple[int, int]:
    """Width and height of an image in pixels."""
    size = sizes.get_once(f"{image_id}.jpg", path)
    if not _are_pixels(size, 2) or 0 in size:
        raise ValueError(
            f"{path}: {image_id}.jpg has the size {reprlib.repr(size)}, expected [width, height] in pixels."
        )
    return size[0], size[1]


def _region_box(boxes: _JsonObject, region: str, path: Path) -> list[float]:
    """The box of a region as xyxy float pixels, 0-based and half-open."""
    box = boxes.get_once(region, path)
    if not _are_pixels(box, 4) or box[0] > box[2] or box[1] > box[3]:
        raise ValueError(
            f"{path}: region {region} has the box {reprlib.repr(box)}, expected [xmin, ymin, xmax, ymax], "
            f"integers from 0 to {MAX_PIXELS:,} with xmin <= xmax and ymin <= ymax."
        )
    return [float(box[0]), float(box[1]), box[2] + 1.0, box[3] + 1.0]


def _are_pixels(values: Any, length: int) -> bool:
    """Whether a value is a list of `length` integer coordinates. `True` is none, though Python takes it for 1."""
    if not isinstance(values, list) or len(values) != length:
        return False
    return all(type(value) is int and 0 <= value <= MAX_PIXELS for value in values)
