"""ReferItGame: one row per expression for a region of a photo, in the split of the phrase grounding papers.

The JSON files (https://github.com/ronghanghu/text_objseg) call a region `<image>_<number>`.
`referit_query_<split>.json` has the expressions of each region, as the players typed them. `referit_bbox.json` has its
box, xyxy integers, 0-based and inclusive. `referit_imsize.json` has width and height of each image.
"""

import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets

from ..annotations import AnnotatedImage
from ..benchmarks import Wanted, short_split_name
from ..files.image_files import ImageFolders, file_statuses
from ..files.json_files import read_json
from .source import GroundingSource, digest_files

FOLDERS = (".", "referit", "data", "data/metadata", "referit/data/metadata")
QUERIES = "referit_query_{}.json"
BOXES, SIZES = "referit_bbox.json", "referit_imsize.json"

MAX_JSON_BYTES = 2**28  # bounds on files of unknown origin; the largest real one has 3 MB
MAX_PIXELS = 100_000  # of a side

REGION = re.compile("([0-9]{1,12})_[0-9]{1,12}")


class ReferItJson(GroundingSource):
    """
    One split from text_objseg's files. Regions without expressions have no row.

    Args:
        folder (`Path`): Folder with `referit_query_<split>.json`, `referit_bbox.json` and, if images may have been
            stored at another size, `referit_imsize.json`.
        split (`str`): `"train"`, `"validation"`, `"trainval"` (both together if it has no file) or `"test"`.
        images ([`ImageFolders`]): the images `<image>.jpg`.

    Raises:
        `FileNotFoundError`: There are no expressions of the split.
    """

    name = "referitgame"
    images: ImageFolders

    def __init__(self, folder: Path, split: str, images: ImageFolders):
        self.folder, self.split, self.images = folder.resolve(), split, images
        self.query_files = find_queries(self.folder, split)
        if not self.query_files:
            raise FileNotFoundError(f"No expressions of the {split} split in {folder}, expected {query_names(split)}.")
        self.columns = {"ann_id": datasets.Value("string"), "sent_id": datasets.Value("string")}

    @classmethod
    def find(cls, wanted: Wanted) -> "ReferItJson | None":
        if wanted.benchmark.name != cls.name or wanted.split_by != "standard":
            return None
        for folder in (wanted.data_dir / name for name in FOLDERS):
            if (folder / BOXES).is_file() and find_queries(folder, wanted.split):
                return cls(folder, wanted.split, wanted.images)
        return None

    @classmethod
    def looks_for(cls, wanted: Wanted) -> str:
        return f"{query_names(wanted.split)} with {BOXES} (there or in {', '.join(FOLDERS[1:])})"

    def fingerprint(self) -> str:
        """Digest of all files, and of what is known of all images without opening one."""
        others = [path for path in (self.folder / BOXES, self.folder / SIZES) if path.is_file()]
        return digest_files([*self.query_files, *others], file_statuses(self.images.paths.values()))

    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        boxes = read_object(self.folder / BOXES)
        sizes = read_object(self.folder / SIZES) if (self.folder / SIZES).is_file() else None
        images: dict[str, AnnotatedImage] = {}
        problems, seen = [], set()
        for path in self.query_files:
            queries = read_object(path)
            for region, expressions in queries.items():
                try:
                    if region in seen or region in queries.repeated:
                        raise ValueError(f"{path}: region {region} is there twice, expected each once.")
                    image_id = read_image_id(region, path)
                    size = None if sizes is None else read_size(sizes, image_id, self.folder / SIZES)
                    rows = read_rows(region, expressions, read_box(boxes, region, self.folder / BOXES), path)
                except ValueError as error:
                    problems.append(str(error))
                    continue
                seen.add(region)
                image = images.setdefault(image_id, AnnotatedImage(f"{image_id}.jpg", image_id, size, []))
                image.rows.extend(rows)
        return list(images.values()), problems


def query_names(split: str) -> str:
    """The files with the expressions of a split, for error messages."""
    names = QUERIES.format(short_split_name(split))
    return names if split != "trainval" else f"{names} (or {QUERIES.format('train')} and {QUERIES.format('val')})"


def find_queries(folder: Path, split: str) -> list[Path]:
    """The files with the expressions of a split; none if any is missing."""
    alone = folder / QUERIES.format(short_split_name(split))
    if alone.is_file() or split != "trainval":
        return [alone] if alone.is_file() else []
    both = [folder / QUERIES.format(part) for part in ("train", "val")]
    return both if all(path.is_file() for path in both) else []


class JsonObject(dict):
    """A JSON object, of which it is known which names it has more than once (`json` itself keeps the last)."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = {name for name, count in counts.items() if count > 1}


def read_object(path: Path) -> JsonObject:
    """The object in a JSON file; a `ValueError` if it holds anything else."""
    found = read_json(path, MAX_JSON_BYTES, object_pairs_hook=JsonObject)
    if not isinstance(found, JsonObject):
        raise ValueError(f"{path} has a {type(found).__name__} at its top, expected a JSON object.")
    return found


def read_image_id(region: str, path: Path) -> str:
    """The image of a region, whose name begins with it; a `ValueError` if it is no such name."""
    match = REGION.fullmatch(region)  # also keeps the name of the image file plain
    if match is None:
        raise ValueError(f"{path}: {reprlib.repr(region)} is not a region, expected digits_digits.")
    return match[1]


def read_size(sizes: JsonObject, image_id: str, path: Path) -> tuple[int, int]:
    """Width and height of an image in pixels; a `ValueError` if they are missing, twice there or no size."""
    size = _value_of(sizes, f"{image_id}.jpg", path)
    if not _are_integers(size, 2) or 0 in size:
        raise ValueError(
            f"{path}: {image_id}.jpg has the size {reprlib.repr(size)}, expected [width, height] in pixels."
        )
    return size[0], size[1]


def read_box(boxes: JsonObject, region: str, path: Path) -> list[float]:
    """The box of a region, half-open."""
    box = _value_of(boxes, region, path)
    if not _are_integers(box, 4) or box[0] > box[2] or box[1] > box[3]:
        raise ValueError(
            f"{path}: region {region} has the box {reprlib.repr(box)}, expected [xmin, ymin, xmax, ymax], "
            f"integers from 0 to {MAX_PIXELS:,} with xmin <= xmax and ymin <= ymax."
        )
    return [float(box[0]), float(box[1]), box[2] + 1.0, box[3] + 1.0]


def read_rows(region: str, expressions: Any, box: list[float], path: Path) -> list[dict[str, Any]]:
    """A row per expression, also for one that two players typed."""
    where = f"{path}, region {region}"
    if not isinstance(expressions, list) or not expressions:
        raise ValueError(f"{where}: it has {reprlib.repr(expressions)}, expected a list of expressions.")
    return [
        {"where": where, "expression": expression, "box": box, "ann_id": region, "sent_id": f"{region}-{number}"}
        for number, expression in enumerate(expressions)
    ]


def _value_of(found: JsonObject, name: str, path: Path) -> Any:
    if name not in found or name in found.repeated:
        raise ValueError(f"{path}: {name} is {'there twice' if name in found else 'missing'}, expected it once.")
    return found[name]


def _are_integers(values: Any, length: int) -> bool:
    """Whether it is a list of so many numbers of pixels. `bool` is an `int` too, and no number of pixels."""
    if not isinstance(values, list) or len(values) != length:
        return False
    return all(type(value) is int and 0 <= value <= MAX_PIXELS for value in values)
