"""Files of expressions and boxes of one's own, as entries: JSON lines, CSV and COCO's JSON."""

import csv
import json
import logging
import reprlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..box_formats import BOX_COLUMNS, check_columns, list_expressions, to_xyxy

logger = logging.getLogger(__name__)

EXPRESSION_FIELDS = ("caption", "captions", "expression", "expressions")

MAX_LINE_BYTES = 2**20  # a bound on files of unknown origin


class Entry(NamedTuple):
    """What one line or annotation says."""

    source_row: str
    name: str
    expressions: list[str]
    box: list[float] | None
    size: tuple[int, int] | None = None


def check_box_format(file: Path, box_format: str | None) -> str:
    """The format of a file's boxes; a `ValueError` if they cannot have the one that is given, or might have others."""
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


def name_columns(box_format: str, columns: dict[str, str] | None) -> dict[str, str]:
    """What the file calls each of our columns."""
    names = {name: name for name in ("image", "expression", "box", *BOX_COLUMNS[box_format])}
    columns = columns or {}
    check_columns(columns, names)
    return names | columns


# JSONL and CSV


def read_jsonl(file: Path, digest: Any, names: dict[str, str], box_format: str) -> Iterator[Entry | str]:
    """An entry for each line that is not blank, or a sentence if it cannot be used."""
    for number, line in enumerate(read_lines(file, digest), start=1):
        if not line.strip():
            continue
        try:
            yield read_record(str(number), parse_object(line.strip()), names, box_format)
        except ValueError as error:
            yield f"{file}, line {number}: {error}."


def read_csv(file: Path, digest: Any, names: dict[str, str], box_format: str) -> Iterator[Entry | str]:
    """An entry for each row, or a sentence if it cannot be used. The line of a row is its first."""
    table = csv.reader(read_lines(file, digest), strict=True, skipinitialspace=True)
    header: list[str] = []
    while True:
        number = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            break
        except csv.Error as error:
            yield f"{file}, line {number}: not valid CSV ({error})."
            continue
        if not header:
            header = cells
            check_header(file, header, names, box_format)
            continue
        if not cells:  # a blank line
            continue
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, expected {len(header)} as in the header")
            record = parse_cells(dict(zip(header, cells, strict=True)), names, box_format)
            yield read_record(str(number), record, names, box_format)
        except ValueError as error:
            yield f"{file}, line {number}: {error}."
    if not header:
        raise ValueError(f"{file} is empty, expected a header and rows.")


def read_lines(file: Path, digest: Any) -> Iterator[str]:
    """Lines with their ends. What is read goes into the digest."""
    with file.open("rb") as opened:
        number = 0
        while line := opened.readline(MAX_LINE_BYTES + 1):
            number += 1
            digest.update(line)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{file}, line {number}: the line is longer than {MAX_LINE_BYTES:,} bytes.")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start})"
                raise ValueError(f"{file}, line {number}: {problem}.") from error


def check_header(file: Path, header: list[str], names: dict[str, str], box_format: str) -> None:
    """Raises a `ValueError` if a CSV lacks columns, or has one twice."""
    four = [names[column] for column in BOX_COLUMNS[box_format]]
    has = f"{file} has the columns {', '.join(header)}"
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{has}, of which {twice[0]} comes twice.")
    missing = [names[name] for name in ("image", "expression") if names[name] not in header]
    if missing or (names["box"] not in header and not set(four) <= set(header)):
        raise ValueError(
            f"{has}, expected {names['image']}, {names['expression']} and either {names['box']} or {', '.join(four)}."
        )


def parse_cells(record: dict[str, str], names: dict[str, str], box_format: str) -> dict[str, Any]:
    """The row of a CSV as JSONL would have it."""
    if names["box"] in record:
        text = record[names["box"]].strip()
        numbers = text.strip("[]()").replace(",", " ").split()
        return record | {names["box"]: [parse_number(number) for number in numbers] if text else None}
    return record | {names[name]: parse_number(record[names[name]]) for name in BOX_COLUMNS[box_format]}


def parse_number(text: str) -> float | None:
    """The number in a cell, `None` if that is empty; a `ValueError` if there is something else."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"{reprlib.repr(text)} in the box is no number") from None


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object; a `ValueError` without place and full stop if the text is none."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"not usable JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{reprlib.repr(parsed)} is not an object")
    return parsed


def read_record(source_row: str, record: dict[str, Any], names: dict[str, str], box_format: str) -> Entry:
    """A line of JSONL or CSV. Raises a `ValueError` without place and full stop."""
    name = check_name(pick(record, names["image"]))
    expressions = list_expressions(pick(record, names["expression"]))
    four = [names[column] for column in BOX_COLUMNS[box_format]]
    if names["box"] not in record and any(column in record for column in four):
        numbers = [pick(record, column) for column in four]
        box = None if numbers == [None] * 4 else numbers
    else:
        box = pick(record, names["box"])
    return Entry(source_row, name, expressions, to_xyxy(box, box_format))


def pick(record: dict[str, Any], name: str) -> Any:
    """A field; a `ValueError` that names those there are if it is not among them."""
    if name not in record:
        raise ValueError(f"no {name!r}, only {', '.join(record)[:120]}")
    return record[name]


# COCO


def read_coco(file: Path, digest: Any) -> Iterator[Entry | str]:
    """An entry for each annotation, or a sentence if it, or an image, cannot be used."""
    read = file.read_bytes()
    digest.update(read)
    try:
        content = parse_object(read.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}. Rows, one object per line, go in a file .jsonl.") from error
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list of {key}, expected COCO's images and annotations.")
    images, problems = read_coco_images(file, content["images"])
    yield from problems
    annotations = content["annotations"]
    captions_only = not any(isinstance(entry, dict) and "bbox" in entry for entry in annotations)
    if captions_only and annotations:
        logger.warning(f"{file}: no annotation has a bbox, so its expressions are without box.")
    seen = set()
    for number, entry in enumerate(annotations):
        where = f"{file}, annotations[{number}]"
        try:
            annotation_id = read_id(entry, "id")
            where = f"{file}, annotation {annotation_id}"
            if annotation_id in seen:
                raise ValueError("an annotation before it has the same id")
            seen.add(annotation_id)
            image_id = read_id(entry, "image_id")
            if image_id not in images:
                raise ValueError(f"its image_id {image_id!r} is not among the images")
            image = images[image_id]
            if image is None:  # reported with the image
                continue
            name, size = image
            box = None if captions_only else to_xyxy(pick(entry, "bbox"), "xywh")
            yield Entry(str(annotation_id), name, read_coco_expressions(entry), box, size)
        except ValueError as error:
            yield f"{where}: {error}."


def read_coco_images(
    file: Path, entries: list[Any]
) -> tuple[dict[int | str, tuple[str, tuple[int, int] | None] | None], list[str]]:
    """Name and size by id (`None` for an image that cannot be used), and a sentence for each of those."""
    images: dict[int | str, tuple[str, tuple[int, int] | None] | None] = {}
    names, problems = set(), []
    for number, entry in enumerate(entries):
        where, image_id = f"{file}, images[{number}]", None
        try:
            image_id = read_id(entry, "id")
            where = f"{file}, image {image_id}"
            if image_id in images:
                raise ValueError("an image before it has the same id")
            images[image_id] = None
            name = check_name(pick(entry, "file_name"))
            if name in names:
                raise ValueError(f"an image before it has the same file_name {reprlib.repr(name)}")
            names.add(name)
            images[image_id] = (name, read_size(entry))
        except ValueError as error:
            problems.append(f"{where}: {error}.")
    return images, problems


def read_id(entry: Any, field: str) -> int | str:
    """The id in a field of an entry of COCO; a `ValueError` if it is neither a number nor text."""
    if not isinstance(entry, dict):
        raise ValueError(f"{reprlib.repr(entry)} is not an object")
    value = pick(entry, field)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"the {field} is {reprlib.repr(value)}, expected a number or text")
    return value


def read_size(entry: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height in pixels, `None` if neither is given; a `ValueError` if they are no positive integers."""
    width, height = entry.get("width"), entry.get("height")
    if width is None and height is None:
        return None
    if not (type(width) is int and type(height) is int and width > 0 and height > 0):
        raise ValueError(f"width and height are {reprlib.repr([width, height])}, expected positive integers")
    return width, height


def read_coco_expressions(entry: dict[str, Any]) -> list[str]:
    """The expressions of an annotation; a `ValueError` unless exactly one of its fields has them."""
    fields = [field for field in EXPRESSION_FIELDS if field in entry]
    if len(fields) != 1:
        has = " and ".join(fields) or "no expression"
        raise ValueError(f"it has {has}, expected one of {', '.join(EXPRESSION_FIELDS)}")
    return list_expressions(entry[fields[0]])


# Values


def check_name(name: Any) -> str:
    """The path of an image, in one way of writing it. Whether it stays in its folder is for [`ImageRoot`] to say."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the image is {reprlib.repr(name)}, expected a path")
    try:
        name.encode()
    except UnicodeEncodeError:  # JSON can say that, Arrow cannot keep it
        raise ValueError(
            f"the image is {reprlib.repr(name)}, which has half of a character, a lone surrogate"
        ) from None
    return str(PurePosixPath(name.replace("\\", "/")))
