"""Finds image files of unknown origin by name, and reads their sizes without decoding them."""

import functools
import io
import os
import reprlib
import struct
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from PIL import ExifTags, Image

MAX_IMAGE_PIXELS = 89_478_485  # Pillow warns of decompression bombs beyond this number

# Pillow reads many more formats, but runs another program for some of them (Ghostscript for EPS). Older versions of it
# lack the last of these.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class ImageFolders:
    """
    The image files that lie directly in given folders, looked up by file name.

    The folders are listed once, because asking the file system for each of COCO's 82,783 images takes much longer.

    Args:
        folders (`Iterable[Path]`): The folders; those that do not exist count as empty. If several have a file of the
            same name, the first one's is used.
    """

    def __init__(self, folders: Iterable[Path]):
        self.folders = list(folders)
        self.paths: dict[str, str] = {}
        for folder in reversed(self.folders):
            self.paths.update(list_files(folder))

    def find(self, name: str) -> str | None:
        """The path of a file, or `None`. As only listed names are found, no name can lead out of the folders."""
        return self.paths.get(name)

    def describe(self) -> str:
        """Names the folders, for error messages."""
        places = [str(folder) for folder in self.folders]
        return places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"


class ImageRoot:
    """
    A folder in which images are named by relative paths, as users do in their own data.

    Args:
        root (`Path`): The folder.
    """

    def __init__(self, root: Path):
        self.root = root

    def find(self, name: str) -> str | None:
        """The path of a file, or `None`; a `ValueError` if the name would lead out of the folder."""
        path = PureWindowsPath(name)  # understands both kinds of slashes, and drive letters
        if not path.parts or path.anchor or ".." in path.parts or "\0" in name:
            raise ValueError(
                f"the image {reprlib.repr(name)} is not a path within {self.root}, expected a relative one."
            )
        found = self.root.joinpath(*path.parts)
        try:
            return str(found) if found.is_file() else None
        except OSError as error:  # for instance because the name is too long
            raise ValueError(f"the image {reprlib.repr(name)} cannot be looked for: {error.strerror}.") from error

    def describe(self) -> str:
        """Names the folder, for error messages."""
        return str(self.root)


def list_files(folder: Path) -> dict[str, str]:
    """The paths of a folder's files by name, empty if there is no such folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.path for entry in entries if _is_file(entry)}


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def file_statuses(paths: Iterable[str]) -> str:
    """Path, size and time of change of each file: a text that changes when any of them does, for fingerprints."""
    lines = []
    for path in sorted(paths):
        status = os.stat(path)  # noqa: PTH116 (Path.stat takes three times as long, and COCO has 82,783 images)
        lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n")
    return "".join(lines)


def measure_stored(encoded: dict[str, Any]) -> tuple[int, int] | None:
    """
    The size of an image as `datasets` decodes it, see [`measure_image`].

    Args:
        encoded (`dict`): the file as `datasets` stores it, its `bytes` or its `path`.

    Returns:
        `tuple[int, int]`: Width and height in pixels; `None` if the path leads to another machine or into an archive.
    """
    content, path = encoded["bytes"], encoded["path"]
    if content is None and "://" in path:
        return None
    return measure_image(path if content is None else content, exif_oriented=True)


def measure_image(file: str | bytes, exif_oriented: bool = False) -> tuple[int, int]:
    """
    Reads the size of an image from its header, after checking that the image can be decoded to its end.

    Args:
        file (`str` or `bytes`): The path of the file, or its content.
        exif_oriented (`bool`, *optional*, defaults to `False`):
            Whether boxes are for the image after its EXIF orientation is applied, which `datasets` does when it
            decodes an image. If so, the size is the one after that; if not, an image whose EXIF orientation turns or
            mirrors it is refused, because its boxes would no longer fit.

    Returns:
        `tuple[int, int]`: Width and height in pixels.

    Raises:
        `ValueError`: The file is not an image, ends too early, has more than `MAX_IMAGE_PIXELS` pixels, or has an
            EXIF orientation although `exif_oriented` is `False`.
    """
    path = file if isinstance(file, str) else "the image"
    try:
        image = Image.open(file if isinstance(file, str) else io.BytesIO(file), formats=_readable_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is refused: {error}") from error
    except Exception as error:  # Pillow raises many kinds for broken headers
        problem = f"{path} has no readable image header: {error}, expected that of {', '.join(FORMATS)}."
        raise ValueError(problem) from error
    with image:
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{path} has {width} x {height} pixels, more than the {MAX_IMAGE_PIXELS:,} accepted.")
        try:
            complete = _is_complete(file, image.format)
            # For a PNG, Pillow's own getexif decodes the image to look for EXIF behind the pixels.
            exif = Image.Image.getexif(image) if complete else image.getexif()
            orientation = exif.get(ExifTags.Base.Orientation, 1)
            if not complete:
                image.load()
        except Exception as error:
            raise ValueError(f"{path} cannot be decoded to its end: {error}.") from error
        width, height = image.size
    if orientation in range(2, 9):
        if not exif_oriented:
            raise ValueError(f"{path} has EXIF orientation {orientation}, expected an image stored upright.")
        if orientation >= 5 and image.format != "TIFF":  # a quarter turn; Pillow has already applied that of a TIFF
            width, height = height, width
    return width, height


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_jpeg(encoded: dict[str, Any], side: int) -> tuple[Image.Image, tuple[int, int], float] | None:
    """
    Decodes a JPEG at 1, 1/2, 1/4 or 1/8 of its size: the smallest at which its longer side has at least `side` pixels.
    The decoder then computes, and everything after it copies, fewer pixels.

    Args:
        encoded (`dict`): the file as `datasets` stores it, its `bytes` or its `path`.
        side (`int`): the fewest pixels of the longer side; a smaller image keeps its size.

    Returns:
        `tuple`: the image, width and height of the stored image, and how many pixels of the first stand for one of
        the second in each direction. `None` if it is no JPEG on this machine, or has an EXIF orientation: the caller
        decodes these.
    """
    content, path = encoded["bytes"], encoded["path"]
    if content is None and not Path(path).is_file():
        return None
    image = Image.open(path if content is None else io.BytesIO(content))
    if image.format != "JPEG" or ExifTags.Base.Orientation in image.getexif():
        image.close()
        return None
    width, height = image.size
    longer = max(width, height)
    scale = 1.0
    if longer > side:
        # Of the reductions that leave no fewer pixels than this, Pillow takes the largest. A last row or column that
        # is not full stays, so the scale does not follow from the two sizes.
        drafted = image.draft(image.mode, (max(1, width * side // longer), max(1, height * side // longer)))
        assert drafted is not None  # as it is for other formats, and after decoding
        scale = drafted[1][2] / width
    image.load()  # also closes the file
    return image, (width, height), scale


def _is_complete(file: str | bytes, kind: str | None) -> bool:
    """Whether a JPEG or PNG surely has all its pixels and no EXIF behind them. If unsure, it must be decoded."""
    with Path(file).open("rb") if isinstance(file, str) else io.BytesIO(file) as content:
        if kind == "PNG":
            return _has_all_chunks(content)
        if kind == "JPEG":  # the end marker FF D9 never occurs among the pixels
            size = content.seek(0, os.SEEK_END)
            content.seek(max(0, size - 16))
            return content.read().rstrip(b"\0\n").endswith(b"\xff\xd9")
    return False


def _has_all_chunks(file: BinaryIO) -> bool:
    """Whether a PNG has its last chunk, and only pixels between its first chunk of pixels and the last chunk."""
    file.seek(8)
    pixels = False
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if pixels and name != b"IDAT":
            return name == b"IEND"
        pixels = name == b"IDAT"
        file.seek(length + 4, os.SEEK_CUR)  # skips the content and its checksum
    return False
