"""Rows and images of parquet files of unknown origin, of which only a few are in memory at a time."""

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .image_files import file_statuses

MAX_IMAGE_BYTES = 2**26  # of one
ROWS_AT_ONCE, IMAGES_AT_ONCE = 256, 8
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG and PNG, which no other program is run for to decode


def read_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of each row, of which only a few are in memory."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            check_columns(path, file, columns)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read from row {number}: {str(error).strip()}.") from error


def check_columns(path: Path, file: pq.ParquetFile, columns: list[str]) -> None:
    """Raises a `ValueError` if a file lacks one of the columns."""
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}, expected the columns that the other files have.")


def image_folder(files: list[Path], cache_dir: str | None) -> Path:
    """One for each state of the files."""
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser().resolve()
    digest = hashlib.sha256(file_statuses(map(str, files)).encode()).hexdigest()[:32]
    return root / "epmvg_hf-images" / digest


def write_images(rows: dict[str, tuple[Path, int]], folder: Path, max_bytes: int) -> dict[str, str]:
    """
    Writes the images of some rows.

    Args:
        rows (`dict[str, tuple[Path, int]]`): for each name of an image, the file and the number of a row with it.
        folder (`Path`): where to.
        max_bytes (`int`): of all of them together.

    Returns:
        `dict[str, str]`: For each name of an image that cannot be used, what is wrong with it.
    """
    problems, total = {}, 0
    for path in dict.fromkeys(path for path, _ in rows.values()):
        names = {number: name for name, (in_path, number) in rows.items() if in_path == path}
        for number, content in read_images(path, set(names)):
            try:
                image = check_image(content)
            except ValueError as error:
                problems[names[number]] = f"{path}, row {number}: {error}."
                continue
            total += len(image)
            if total > max_bytes:
                raise ValueError(
                    f"{path}, row {number}: the images up to here have {total:,} bytes, "
                    f"expected at most {max_bytes:,} for files of that size."
                )
            write_file(folder / names[number], image)
    return problems


def read_images(path: Path, numbers: set[int]) -> Iterator[tuple[int, bytes | None]]:
    """The content of the image in each of the rows. Groups of rows without any are not read."""
    start = 0
    try:
        with pq.ParquetFile(path) as file:
            check_columns(path, file, ["image"])
            kind = file.schema_arrow.field("image").type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise ValueError(f"{path} has the type {kind} of images, expected bytes and path.")
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if not numbers.isdisjoint(range(start, end)):
                    yield from _read_group(file, group, start, numbers)
                start = end
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the images from row {start} cannot be read: {str(error).strip()}.") from error


def _read_group(file: pq.ParquetFile, group: int, start: int, numbers: set[int]) -> Iterator[tuple[int, bytes | None]]:
    batches = file.iter_batches(IMAGES_AT_ONCE, row_groups=[group], columns=["image.bytes"], use_threads=False)
    for batch in batches:
        contents = pc.struct_field(batch.column(0), "bytes")
        for index in range(len(contents)):
            if start + index in numbers:
                yield start + index, contents[index].as_py()
        start += len(contents)


def check_image(content: Any) -> bytes:
    """The content of an image file. Raises a `ValueError` without place and full stop."""
    if not isinstance(content, bytes) or not content:
        raise ValueError("there is no image, expected its bytes")
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"the image has {len(content):,} bytes, expected at most {MAX_IMAGE_BYTES:,}")
    if not content.startswith(IMAGE_STARTS):
        raise ValueError(f"the image starts with {content[:8]!r}, expected a JPEG or PNG")
    return content


def write_file(path: Path, content: bytes) -> None:
    """At once for any other process: it sees the whole file or none."""
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
