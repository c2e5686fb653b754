"""Reads JSON files of unknown origin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_json(
    path: Path,
    max_bytes: int,
    edit: Callable[[bytes], bytes] | None = None,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """
    Reads a JSON file.

    Args:
        path (`Path`): The file, in UTF-8 with or without a byte order mark.
        max_bytes (`int`): How large the file may be.
        edit (`Callable`, *optional*): Changes the file's bytes before they are parsed, for instance to drop large
            parts that are not needed.
        object_pairs_hook (`Callable`, *optional*): As in `json.loads`.

    Returns:
        The value in the file.

    Raises:
        `ValueError`: The file is larger than `max_bytes`, or is not JSON in UTF-8.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {max_bytes:,}.")
    content = path.read_bytes()
    if edit is not None:
        content = edit(content)
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as error:  # also for huge numbers and deep nesting
        raise ValueError(f"{path} cannot be read as UTF-8 JSON: {error}.") from error
