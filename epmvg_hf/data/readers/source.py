"""The interface of a reader: one split of a benchmark in one file format."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..annotations import AnnotatedImage
from ..benchmarks import Wanted
from ..files.image_files import ImageFolders, ImageRoot


class GroundingSource(ABC):
    """
    One split of a benchmark in one format. A source is sent to the processes that prepare rows: it holds paths and no
    open files.

    Attributes:
        name (`str`): of the benchmark; names the folder in the cache.
        split (`str`): of the rows.
        columns (`dict[str, datasets.Value or datasets.List]`): those besides image, image_id, expression and box.
        images ([`ImageFolders`] or [`ImageRoot`]): where the image files are.
        turned (`bool`): whether boxes are for the image as its EXIF orientation turns it.
    """

    name: str
    split: str
    columns: dict[str, Any]
    images: ImageFolders | ImageRoot
    turned = False

    @classmethod
    def find(cls, wanted: Wanted) -> "GroundingSource | None":
        """The source of a split if its files are in the data folder. For benchmarks only."""
        raise NotImplementedError

    @classmethod
    def looks_for(cls, wanted: Wanted) -> str:
        """The files that [`find`] looks for, for error messages."""
        raise NotImplementedError

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when any file does that the rows depend on. Is taken at every opening, so it must be fast."""

    @abstractmethod
    def list_images(self) -> tuple[list[Any], list[str]]:
        """
        What [`annotate`] takes, one item for each image and in the order of the rows, and a sentence for each entry
        of the annotations that cannot be used. `datasets` shares the items out among processes.

        Raises:
            `FileNotFoundError`: A file of annotations is missing.
            `ValueError`: A file is not what it should be.
        """

    def annotate(self, item: Any) -> AnnotatedImage:
        """The image that an item stands for, by default the item itself. May read a file, and raise `ValueError`."""
        return item

    def image_id_of(self, item: Any) -> str:
        """Of an item, without reading a file."""
        return item.image_id

    def name_of(self, item: Any) -> str:
        """The name of the image file of an item, without reading a file."""
        return item.name

    def path_of(self, item: Any) -> str | None:
        """The image file of an item, if it is there. `ValueError` if its name leads out of the folder of images."""
        return self.images.find(self.name_of(item))


def digest_files(files: Iterable[Path], *more: Any) -> str:
    """Of the content of some annotation files and of anything else that rows depend on."""
    digest = hashlib.sha256(repr(more).encode())
    for path in files:
        digest.update(f"{path}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:32]
