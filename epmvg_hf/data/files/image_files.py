"""Image files of unknown origin: found by name below a folder, measured and checked without being decoded."""

import os
import reprlib
import struct
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from PIL import ExifTags, Image

MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own default, beyond which it warns of decompression bombs

# What files of unknown origin may be. Pillow knows more formats; for EPS it would run Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageFolders:
    """
    The image files in some folders, by name. Where two folders have a file of one name, the first folder's counts.
    Folders that are not there have no files.

    Args:
        folders (`Iterable[Path]`): the folders, whose own folders are not looked into.
    """

    def __init__(self, folders: Iterable[Path]):
        self.folders = list(folders)
        self.paths: dict[str, str] = {}
        for folder in reversed(self.folders):
            self.paths.update(list_files(folder))

    def find(self, name: str) -> str | None:
        """The path of a file, if it is there. Only exact names are: no name leads out of the folders."""
        return self.paths.get(name)

    def describe(self) -> str:
        """The places, for error messages."""
        places = [str(folder) for folder in self.folders]
        return places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"


class ImageRoot:
    """
    A folder in which images are named by relative paths, as in data of one's own.

    Args:
        root (`Path`): the folder.
    """

    def __init__(self, root: Path):
        self.root = root

    def find(self, name: str) -> str | None:
        """The path of a file, if it is there; a `ValueError` if the name would lead out of the folder."""
        path = PureWindowsPath(name)  # takes both slashes, and knows drives
        if not path.parts or path.anchor or ".." in path.parts or "\0" in name:
            raise ValueError(
                f"the image {reprlib.repr(name)} is not a path within {self.root}, expected a relative one."
            )
        found = self.root.joinpath(*path.parts)
        try:
            return str(found) if found.is_file() else None
        except OSError as error:  # such as a name that is too long
            raise ValueError(f"the image {reprlib.repr(name)} cannot be looked for: {error.strerror}.") from error

    def describe(self) -> str:
        """The place, for error messages."""
        return str(self.root)


def list_files(folder: Path) -> dict[str, str]:
    """Name and path of the files of a folder; none if there is no such folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.path for entry in entries if entry.is_file()}


def file_statuses(paths: Iterable[str]) -> str:
    """Changes when any of the files does, by size or time of change; for fingerprints."""
    lines = []
    for path in sorted(paths):
        status = os.stat(path)  # noqa: PTH116 (Path takes three times as long, and COCO has 82,783 images)
        lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n")
    return "".join(lines)


def measure_image(path: str, turned: bool = False) -> tuple[int, int]:
    """
    Width and height of an image in pixels, from its header, after making sure that it can be decoded as it is meant.

    Args:
        path (`str`): the file.
        turned (`bool`, *optional*, defaults to `False`):
            What to do about an EXIF orientation, which `datasets` applies when it decodes an image: give the size of
            the turned image (`True`), or refuse the file because its boxes are those of the stored pixels (`False`).

    Raises:
        `ValueError`: The file is no image, ends too early, or has more than `MAX_IMAGE_PIXELS` pixels.
    """
    try:
        image = Image.open(path, formats=FORMATS)
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
            complete = _is_complete(path, image.format)
            # Pillow's own for PNG decodes the image, to look for EXIF behind its pixels.
            exif = Image.Image.getexif(image) if complete else image.getexif()
            orientation = exif.get(ExifTags.Base.Orientation, 1)
            if not complete:
                image.load()
        except Exception as error:
            raise ValueError(f"{path} cannot be decoded to its end: {error}.") from error
        width, height = image.size
    if orientation in range(2, 9):
        if not turned:
            raise ValueError(f"{path} has EXIF orientation {orientation}, expected an image stored upright.")
        if orientation >= 5 and image.format != "TIFF":  # a quarter turn, which Pillow itself makes for TIFF
            width, height = height, width
    return width, height


def _is_complete(path: str, kind: str | None) -> bool:
    """Whether all of a JPEG or PNG is there and its EXIF known from its header. If not, decoding it will tell."""
    with Path(path).open("rb") as file:
        if kind == "PNG":
            return _has_all_chunks(file)
        if kind == "JPEG":  # within its pixels, FF is never followed by D9
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16))
            return file.read().rstrip(b"\0\n").endswith(b"\xff\xd9")
    return False


def _has_all_chunks(file: BinaryIO) -> bool:
    """Whether a PNG goes on to its last chunk, with nothing but pixels between the first of them and that."""
    file.seek(8)
    pixels = False
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if pixels and name != b"IDAT":
            return name == b"IEND"
        pixels = name == b"IDAT"
        file.seek(length + 4, os.SEEK_CUR)  # past the content and its checksum
    return False
