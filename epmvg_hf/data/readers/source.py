"""The interface of a reader: one split of a benchmark in one file format."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..annotations import AnnotatedImage
from ..benchmarks import SplitRequest
from ..files.image_files import ImageFolders, ImageRoot


class GroundingSource(ABC):
    """
    One split of a benchmark in one file format. Processes that prepare rows each get a copy of the source, so it holds
    paths but no open files.

    Attributes:
        name (`str`): The benchmark; also the name of its folder in the cache.
        split (`str`): The split, as `datasets` knows it.
        columns (`dict[str, datasets.Value or datasets.List]`):
            The columns besides image, image_id, expression and box.
        images ([`ImageFolders`] or [`ImageRoot`]): Where the image files are.
        exif_oriented (`bool`): Whether boxes are for the image after its EXIF orientation is applied.
    """

    name: str
    split: str
    columns: dict[str, Any]
    images: ImageFolders | ImageRoot
    exif_oriented = False

    @classmethod
    def find(cls, request: SplitRequest) -> "GroundingSource | None":
        """The source of a split, or `None` if its files are not in the data folder. Only benchmarks need this."""
        raise NotImplementedError

    @classmethod
    def looks_for(cls, request: SplitRequest) -> str:
        """Names the files that [`find`] looks for, for error messages."""
        raise NotImplementedError

    @abstractmethod
    def fingerprint(self) -> str:
        """
        A digest that changes whenever a file changes that the rows depend on. It is computed every time the dataset is
        opened, to find out whether the cached rows are still valid, so it must be fast.
        """

    @abstractmethod
    def list_images(self) -> tuple[list[Any], list[str]]:
        """
        Lists the images of the split.

        Returns:
            `tuple`: One item for each image, in the order of the rows, which `datasets` shares out among processes
            and gives back to [`annotate`]; and a sentence for each entry of the annotations that cannot be used.

        Raises:
            `FileNotFoundError`: A file of annotations is missing.
            `ValueError`: A file has another format than this source reads.
        """

    def annotate(self, item: Any) -> AnnotatedImage:
        """
        The expressions and boxes of an item. Here an item is an [`AnnotatedImage`] already. Sources that read a file
        for each image override this method, and raise a `ValueError` for a file with invalid content.
        """
        return item

    def image_id_of(self, item: Any) -> str:
        """The id of an item's image, found without reading a file."""
        return item.image_id

    def name_of(self, item: Any) -> str:
        """The name of an item's image file, found without reading a file."""
        return item.name

    def path_of(self, item: Any) -> str | None:
        """The path of an item's image, or `None`; a `ValueError` if its name leads out of the folder of images."""
        return self.images.find(self.name_of(item))


def digest_files(files: Iterable[Path], *more: Any) -> str:
    """A digest of the content of annotation files, and of anything else that rows depend on."""
    digest = hashlib.sha256(repr(more).encode())
    for path in files:
        digest.update(f"{path}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
