"""Tells whether the files of a checkpoint are those that were written."""

import json
import logging
import os
from pathlib import Path

import xxhash
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

# The file of a checkpoint that lists the others, with their sizes and digests. It is written last.
CHECKSUMS = "checksums.json"

_BLOCK = 1 << 22  # bytes that are read at a time


def write_checksums(folder: str | os.PathLike) -> None:
    """
    Writes sizes and digests of all files of a folder into a file of their own in it.

    Args:
        folder (`str` or `os.PathLike`): a checkpoint.
    """
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    entries = {
        path.relative_to(root).as_posix(): {"size": path.stat().st_size, "xxh3_128": _digest(path)} for path in files
    }
    (root / CHECKSUMS).write_text(json.dumps(entries, indent=1) + "\n")


def describe_damage(folder: str | os.PathLike) -> str | None:
    """
    Says what is wrong with the files of a checkpoint, `None` if nothing is. Of a checkpoint without checksums, which
    another trainer wrote, it is only known whether it was finished: its last file is `trainer_state.json`.

    Args:
        folder (`str` or `os.PathLike`): a checkpoint.
    """
    root = Path(folder)
    if not root.is_dir():
        return "there is no such folder"
    if not (root / CHECKSUMS).is_file():
        return _describe_unfinished(root)
    try:
        entries = json.loads((root / CHECKSUMS).read_text())
        expected = {str(name): (int(entry["size"]), str(entry["xxh3_128"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    for name, (size, digest) in expected.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if _digest(path) != digest:
            return f"the content of {name} has changed since it was written"
    return None


def find_checkpoint(output_dir: str | os.PathLike) -> Path:
    """
    The newest whole checkpoint of a training. A warning names those after it that are damaged.

    Args:
        output_dir (`str` or `os.PathLike`): folder of the training.

    Raises:
        ValueError: there is no checkpoint, or none that is whole.

    Example:

    ```python
    >>> from epmvg_hf.training.checkpoint_files import find_checkpoint

    >>> find_checkpoint("outputs/nothing")
    Traceback (most recent call last):
    ValueError: there is no checkpoint in outputs/nothing to resume from
    ```
    """
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            steps[int(step)] = path
    damaged: list[str] = []
    for number in sorted(steps, reverse=True):
        problem = describe_damage(steps[number])
        if problem is None:
            if damaged:
                logger.warning(
                    "resuming from %s, because what came after it is damaged: %s", steps[number], ", ".join(damaged)
                )
            return steps[number]
        damaged.append(f"{steps[number].name} ({problem})")
    if damaged:
        raise ValueError(f"no checkpoint in {output_dir} can be resumed from: {', '.join(damaged)}")
    raise ValueError(f"there is no checkpoint in {output_dir} to resume from")


def _describe_unfinished(root: Path) -> str | None:
    try:
        json.loads((root / "trainer_state.json").read_text())
    except FileNotFoundError:
        return "trainer_state.json is missing, so it was not written to its end"
    except ValueError:
        return "trainer_state.json cannot be read"
    return None


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
