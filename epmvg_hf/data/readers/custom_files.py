"""Files of your own with one row per line, JSONL and CSV, read as entries."""

import codecs
import csv
import reprlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..field_values import BOX_COLUMNS, check_absent, check_columns, list_expressions, parse_json_object, to_xyxy

MAX_LINE_BYTES = 2**20  # a bound on files of unknown origin


class Entry(NamedTuple):
    """What one line of a file, or one annotation of COCO, says."""

    source_row: str
    name: str
    expressions: list[Any]
    box: list[float] | None
    absent: bool | None  # `None` if the file does not say it
    size: tuple[Any, Any] | None = None  # of the image that the box is for, if the file has it


def name_columns(box_format: str, columns: dict[str, str] | None) -> dict[str, str]:
    """What the file calls each of our columns."""
    names = {name: name for name in ("image", "expression", "box", "absent", *BOX_COLUMNS[box_format])}
    columns = columns or {}
    check_columns(columns, names)
    return names | columns


def read_jsonl(file: Path, names: dict[str, str], box_format: str) -> Iterator[Entry | str]:
    """An entry for each line that is not blank, or a sentence if it cannot be used."""
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            try:
                _check_text(line)
                yield _parse_record(str(number), parse_json_object(line.strip()), names, box_format)
            except ValueError as error:
                yield f"{file}, line {number}: {error}."


def read_csv(file: Path, names: dict[str, str], box_format: str) -> Iterator[Entry | str]:
    """
    An entry for each row, or a sentence if it cannot be used. A row of several lines is counted by its first.

    Where a quote is never closed, its row has all lines up to the next quote, so the sentence says how many they are.
    """
    table = csv.reader(read_lines(file), strict=True, skipinitialspace=True)
    header: list[str] = []
    while True:
        number = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            break
        except csv.Error as error:
            lines = f"line {number}" if table.line_num <= number else f"lines {number} to {table.line_num}"
            problem = f"{file}, {lines}: not valid CSV ({error}); look at the quotes in line {number}."
            if not header:
                raise ValueError(problem) from error
            yield problem
            continue
        if cells in ([], [""]):  # a blank line
            continue
        if not header:
            header = cells
            _check_header(file, header, names, box_format)
            continue
        try:
            _check_text("".join(cells))
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, expected {len(header)} as in the header")
            record = _parse_cells(dict(zip(header, cells, strict=True)), names, box_format)
            yield _parse_record(str(number), record, names, box_format)
        except ValueError as error:
            yield f"{file}, line {number}: {error}."
    if not header:
        raise ValueError(f"{file} is empty, expected a header and rows.")


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a file, whose ends `\\n`, `\\r\\n` or `\\r` stay, because a CSV may have them within its cells."""
    with file.open("rb") as opened:
        if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{file}, line 1: not UTF-8 but UTF-16, as its first two bytes say.")
    # What is not UTF-8 passes through this decoding, and is found below in the line that it is in.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        number = 0
        while line := opened.readline(MAX_LINE_BYTES + 1):
            number += 1
            content = line.encode("utf-8", "surrogateescape")
            if len(content) > MAX_LINE_BYTES:
                raise ValueError(f"{file}, line {number}: the line is longer than {MAX_LINE_BYTES:,} bytes.")
            try:
                content.decode()
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start})"
                raise ValueError(f"{file}, line {number}: {problem}.") from error
            yield line


def get_field(record: dict[str, Any], name: str) -> Any:
    """A field; a `ValueError` that lists those there are if it is not among them."""
    if name not in record:
        raise ValueError(f"no {name!r}, only {', '.join(record)[:120]}")
    return record[name]


def normalise_path(name: Any) -> str:
    """
    The path of an image in one spelling, as it is also the image's id; a `ValueError` if it is no text. Whether the
    path stays in the folder of images is for [`ImageRoot`] to say.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the image is {reprlib.repr(name)}, expected a path")
    try:
        name.encode()
    except UnicodeEncodeError:  # JSON can escape half a character, which Arrow cannot store
        raise ValueError(
            f"the image is {reprlib.repr(name)}, which has half of a character, a lone surrogate"
        ) from None
    return str(PurePosixPath(name.replace("\\", "/")))


def _check_text(text: str) -> None:
    """Raises a `ValueError` for a NUL, such as every second byte of UTF-16 without a mark at its start often is."""
    if "\0" in text:
        raise ValueError("it has a NUL byte, expected text in UTF-8")


def _check_header(file: Path, header: list[str], names: dict[str, str], box_format: str) -> None:
    if len(header) == 1 and any(separator in header[0] for separator in ";\t|"):
        raise ValueError(f"{file} has the header {reprlib.repr(header[0])}, expected names between commas.")
    if broken := [name for name in header if set(name) & set("\n\r\0")]:
        has = f"{file} has the column {reprlib.repr(broken[0])}"
        raise ValueError(f"{has}, expected a name in UTF-8 without line breaks; look at the quotes in the header.")
    four = [names[column] for column in BOX_COLUMNS[box_format]]
    has = f"{file} has the columns {', '.join(header)[:400]}"
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{has}, of which {twice[0]!r} comes twice.")
    missing = [names[name] for name in ("image", "expression") if names[name] not in header]
    if missing or (names["box"] not in header and not set(four) <= set(header)):
        raise ValueError(
            f"{has}, expected {names['image']}, {names['expression']} and either {names['box']} or {', '.join(four)}."
        )


def _parse_cells(cells: dict[str, str], names: dict[str, str], box_format: str) -> dict[str, Any]:
    """The row of a CSV as a line of JSONL would have it."""
    record: dict[str, Any] = dict(cells)
    if names["absent"] in cells:
        text = cells[names["absent"]].strip()
        record[names["absent"]] = {"": None, "true": True, "false": False}.get(text.lower(), text)
    if names["box"] in cells:
        text = cells[names["box"]].strip()
        numbers = text.strip("[]()").replace(",", " ").split()
        return record | {names["box"]: [_parse_number(number) for number in numbers] if text else None}
    return record | {names[name]: _parse_number(cells[names[name]]) for name in BOX_COLUMNS[box_format]}


def _parse_number(text: str) -> float | None:
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"{reprlib.repr(text)} in the box is no number") from None


def _parse_record(source_row: str, record: dict[str, Any], names: dict[str, str], box_format: str) -> Entry:
    name = normalise_path(get_field(record, names["image"]))
    expressions = list_expressions(get_field(record, names["expression"]))
    four = [names[column] for column in BOX_COLUMNS[box_format]]
    if names["box"] not in record and any(column in record for column in four):
        numbers = [get_field(record, column) for column in four]
        box = None if numbers == [None] * 4 else numbers
    else:
        box = get_field(record, names["box"])
    absent = check_absent(record.get(names["absent"]))
    return Entry(source_row, name, expressions, to_xyxy(box, box_format), absent)
