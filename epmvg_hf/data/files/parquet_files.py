"""Parquet files of unknown origin: their rows as plain Python values, and images written out as files."""

import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from .image_files import list_files

# In memory. A row may hold a whole photo, and a crafted file may repeat one large value from its dictionary in each.
ROWS_AT_ONCE = 8
MAX_BATCH_BYTES = 2**30
LISTING = "images.txt"  # beside the images, for [`has_all_images`]


class ParquetRow(NamedTuple):
    """
    One row of a file.

    Args:
        where (`str`): the file and the number of the row, from 0, for error messages.
        batch (`pyarrow.RecordBatch`): a few rows of the file.
        position (`int`): which of them it is.
    """

    where: str
    batch: pa.RecordBatch
    position: int

    def values(self) -> dict[str, Any]:
        """The row as plain Python values; a `ValueError` without place and full stop if a text is not UTF-8."""
        values = {}
        for name, column in zip(self.batch.schema.names, self.batch.columns, strict=True):
            try:
                values[name] = column[self.position].as_py()
            except UnicodeDecodeError as error:  # parquet files are read without looking into their texts
                problem = f"{error.reason} at byte {error.start}"
                raise ValueError(f"the column {name} is not UTF-8 ({problem})") from error
        return values


def read_column_names(path: Path) -> list[str]:
    """The names of a file's columns; a `ValueError` if it is no parquet file."""
    with _reading(path):
        return pq.read_schema(path).names


def check_columns(path: Path, columns: pa.Schema) -> None:
    """
    Checks that a file has columns of the right kind. No value is converted to it: a number is no expression, and text
    is no coordinate.

    Args:
        path (`Path`): the file.
        columns (`pyarrow.Schema`):
            The columns that it should have; it may have others, too. `float64` stands for all numbers, `int64` for
            ids, which are whole numbers or text, and `string`, `binary` and lists for those of all sizes.

    Raises:
        `ValueError`: The file is no parquet file, lacks a column or has one of another kind.
    """
    with _reading(path):
        found = pq.read_schema(path)
    if any(found.names.count(name) != 1 for name in columns.names):
        raise ValueError(
            f"{path} has the columns {', '.join(found.names)[:300]}, expected each of {', '.join(columns.names)} once."
        )
    for field in columns:
        kind = found.field(field.name).type
        if not _is_kind(kind, field.type):
            raise ValueError(f"{path}: the column {field.name} is {kind}, expected {field.type}.")


def read_parquet(path: Path, columns: pa.Schema) -> Iterator[ParquetRow]:
    """
    The rows of a file, of which only a few are in memory at a time.

    Args:
        path (`Path`): the file, which [`check_columns`] has seen.
        columns (`pyarrow.Schema`):
            The columns to read. Of a column of objects, only the fields that are named here are read.

    Raises:
        `ValueError`: The file is damaged.
    """
    names = []
    for field in columns:
        is_object = types.is_struct(field.type)
        names += [f"{field.name}.{part.name}" for part in field.type] if is_object else [field.name]
    number = 0
    with _reading(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
            if batch.nbytes > MAX_BATCH_BYTES:
                raise ValueError(
                    f"{path}: the {len(batch)} rows from row {number} have {batch.nbytes:,} bytes, expected at most "
                    f"{MAX_BATCH_BYTES:,}."
                )
            for position in range(len(batch)):
                yield ParquetRow(f"{path}, row {number}", batch, position)
                number += 1


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow says of a file that it cannot read into a sentence."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} is not a readable parquet file: {problem}.") from error


def _is_kind(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of a type are of the kind that [`check_columns`] describes."""
    if types.is_dictionary(found):
        found = found.value_type
    if types.is_struct(expected):
        return types.is_struct(found) and all(
            part.name in found.names and _is_kind(found.field(part.name).type, part.type) for part in expected
        )
    if types.is_null(found):  # the type of a column that has no value in any row
        return True
    if types.is_list(expected):
        is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        return is_list and _is_kind(found.value_type, expected.value_type)
    is_text = types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    if types.is_string(expected):
        return is_text
    if types.is_binary(expected):
        return types.is_binary(found) or types.is_large_binary(found) or types.is_binary_view(found)
    return types.is_integer(found) or (types.is_floating(found) if types.is_floating(expected) else is_text)


def has_all_images(folder: Path) -> bool:
    """Whether a folder has all images that [`write_image_files`] once wrote there."""
    files = list_files(folder)
    return LISTING in files and files.keys() >= set((folder / LISTING).read_text().splitlines())


def write_image_files(folder: Path, images: Iterable[tuple[str, bytes]], max_bytes: int) -> None:
    """
    Writes a folder of images, given as name and content. The folder appears only once it is complete: a run that is
    interrupted leaves none behind, and several processes may write the same one at a time. If it is there already, it
    gets those images that it lacks.

    Raises:
        `ValueError`: The images have more than `max_bytes` together: a small parquet file can repeat a large image.
    """
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    total = 0
    try:
        for name, content in images:
            total += len(content)
            if total > max_bytes:
                raise ValueError(f"the images up to {name} have {total:,} bytes, expected at most {max_bytes:,}.")
            (unfinished / name).write_bytes(content)
        (unfinished / LISTING).write_text("\n".join(sorted(list_files(unfinished))))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            for name in list_files(unfinished).keys() - list_files(folder).keys():  # none if a process was faster
                (unfinished / name).replace(folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
