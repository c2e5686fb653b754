"""Parquet files of unknown origin: their rows as plain Python values, and images written out as files."""

import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_AT_ONCE = 64  # in memory; a row may hold a whole photo


def read_parquet(path: Path, columns: pa.Schema) -> Iterator[dict[str, Any]]:
    """
    The rows of a file, of which only a few are in memory at a time.

    Args:
        path (`Path`): the file.
        columns (`pyarrow.Schema`): the columns to read, and the types to convert them to.

    Raises:
        `ValueError`: The file is no parquet file, is damaged, lacks a column or has one of an unrelated type.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns.names):
                values = [_convert_column(path, batch, field) for field in columns]
                yield from (dict(zip(columns.names, row, strict=True)) for row in zip(*values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {str(error).strip()}.") from error


def _convert_column(path: Path, batch: pa.RecordBatch, field: pa.Field) -> list[Any]:
    try:
        return batch.column(field.name).cast(field.type).to_pylist()
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        problem = f"the column {field.name} cannot be read as {field.type} ({str(error).strip()})"
        raise ValueError(f"{path}: {problem}.") from error


def write_image_files(folder: Path, images: Iterable[tuple[str, bytes]], max_bytes: int) -> None:
    """
    Writes a folder of images, given as name and content. The folder appears only once it is complete: a run that is
    interrupted leaves none behind, and several processes may write the same one at a time.

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
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
