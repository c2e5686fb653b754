"""COCO's JSON of images and annotations, read as entries."""

import logging
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..field_values import check_absent, check_id, list_expressions, parse_json_object, to_xyxy
from .custom_files import Entry, get_field, normalise_path

logger = logging.getLogger(__name__)

EXPRESSION_FIELDS = ("caption", "captions", "expression", "expressions")

NameAndSize = tuple[str, tuple[Any, Any] | None]


def read_coco(file: Path) -> Iterator[Entry | str]:
    """An entry for each annotation, or a sentence if it, or an image, cannot be used."""
    try:
        content = parse_json_object(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}. Rows, one object per line, go in a file .jsonl.") from error
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list of {key}, expected COCO's images and annotations.")
    images, problems = _read_images(file, content["images"])
    yield from problems
    annotations = content["annotations"]
    captions_only = not any(isinstance(entry, dict) and "bbox" in entry for entry in annotations)
    if captions_only and annotations:
        logger.warning(f"{file}: no annotation has a bbox, so its expressions are without box.")
    seen = set()
    for number, entry in enumerate(annotations):
        where = f"{file}, annotations[{number}]"
        try:
            annotation_id = _get_id(entry, "id")
            where = f"{file}, annotation {annotation_id}"
            if annotation_id in seen:
                raise ValueError("an annotation before it has the same id")
            seen.add(annotation_id)
            image_id = _get_id(entry, "image_id")
            if image_id not in images:
                raise ValueError(f"its image_id {image_id!r} is not among the images")
            image = images[image_id]
            if image is not None:  # otherwise the image itself is reported
                bbox = None if captions_only else get_field(entry, "bbox")
                box = to_xyxy(bbox, "xywh")
                absent = check_absent(entry.get("absent"))
                yield Entry(str(annotation_id), image[0], _get_expressions(entry), box, absent, image[1])
        except ValueError as error:
            yield f"{where}: {error}."


def _read_images(file: Path, entries: list[Any]) -> tuple[dict[int | str, NameAndSize | None], list[str]]:
    """Name and size by id, `None` for an image that cannot be used, and a sentence for each of those."""
    images: dict[int | str, NameAndSize | None] = {}
    names, problems = set(), []
    for number, entry in enumerate(entries):
        where = f"{file}, images[{number}]"
        try:
            image_id = _get_id(entry, "id")
            where = f"{file}, image {image_id}"
            if image_id in images:
                raise ValueError("an image before it has the same id")
            images[image_id] = None
            name = normalise_path(get_field(entry, "file_name"))
            if name in names:
                raise ValueError(f"an image before it has the same file_name {reprlib.repr(name)}")
            names.add(name)
            size = (entry.get("width"), entry.get("height"))  # which [`place_rows`] checks
            images[image_id] = (name, None if size == (None, None) else size)
        except ValueError as error:
            problems.append(f"{where}: {error}.")
    return images, problems


def _get_id(entry: Any, field: str) -> int | str:
    if not isinstance(entry, dict):
        raise ValueError(f"{reprlib.repr(entry)} is not an object")
    return check_id(get_field(entry, field), field)


def _get_expressions(entry: dict[str, Any]) -> list[Any]:
    """The expressions of an annotation, which exactly one of its fields must have."""
    fields = [field for field in EXPRESSION_FIELDS if field in entry]
    if len(fields) != 1:
        has = " and ".join(fields) or "no expression"
        raise ValueError(f"it has {has}, expected one of {', '.join(EXPRESSION_FIELDS)}")
    return list_expressions(entry[fields[0]])
