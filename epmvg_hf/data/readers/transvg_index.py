"""
The index files of TransVG, VLTVG, CLIP-VG and others: one `.pth` file per split, one row per expression.

The format (djiajunustc/TransVG on GitHub) is a list of tuples saved with `torch.save`, without tensors. What a tuple
holds, and in which convention its box is written, differs by benchmark (see `LAYOUTS`); the boxes are those of the
original annotations. TransVG's loader truncates the numbers of COCO's boxes to integers and uses the inclusive boxes
of the other benchmarks as if they were half-open. Here nothing is truncated, and all boxes become half-open and are
counted from 0.
"""

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..annotations import AnnotatedImage, is_box
from ..benchmarks import SplitRequest, short_split_name
from ..files.image_files import ImageFolders, file_statuses
from ..files.safe_pickle import read_torch_file
from .source import GroundingSource, digest_files

# Where `<name>_<split>.pth` may be. TransVG's option `--split_root` names a folder "data" or "split".
FOLDERS = ("{name}", ".", "data/{name}", "split/{name}", "split/data/{name}", "ln_data/{name}")


@dataclass(frozen=True)
class Layout:
    """
    What the tuples of a benchmark's index files hold: the name of an image file, often the name of an annotation, a
    box, an expression, and sometimes its attributes, which are not used.

    Args:
        description (`str`): What a tuple looks like, for error messages.
        box (`int`): The position of the box; the expression follows it.
        image (`re.Pattern`): Matches the name of an image file; its group is the id of the image.
        annotation (`re.Pattern` or `None`): Matches the name of an annotation; its group is the id of the annotation.
        to_half_open (`Callable`): Turns the four numbers of a box into xyxy, 0-based and half-open.
    """

    description: str
    box: int
    image: re.Pattern
    annotation: re.Pattern | None
    to_half_open: Callable[[float, float, float, float], list[float]]


COCO = Layout(
    "('COCO_train2014_<12 digits>.jpg', '<annotation>.pth', [x, y, width, height], expression, attributes)",
    2,
    re.compile(r"COCO_train2014_(?=[0-9]{12}\.)0*([0-9]+)\.jpg"),
    re.compile(r"([0-9]+)\.pth"),
    lambda x, y, width, height: [x, y, x + width, y + height],
)
LAYOUTS = {
    "refcoco": COCO,
    "refcoco+": COCO,
    "refcocog": COCO,
    "referitgame": Layout(
        "('<image>.jpg', '<image>_<region>.pth', [xmin, ymin, xmax, ymax], expression, attributes)",
        2,
        re.compile(r"([0-9]+)\.jpg"),
        re.compile(r"([0-9]+_[0-9]+)\.pth"),
        lambda xmin, ymin, xmax, ymax: [xmin, ymin, xmax + 1, ymax + 1],  # xmax is the last pixel
    ),
    "flickr30k_entities": Layout(
        "('<image>.jpg', [xmin, ymin, xmax, ymax], expression)",
        1,
        re.compile(r"([0-9]+)\.jpg"),
        None,
        lambda xmin, ymin, xmax, ymax: [xmin - 1, ymin - 1, xmax, ymax],  # inclusive as well, but counted from 1
    ),
}


class IndexFile(GroundingSource):
    """
    One split from an index file. Index files have no image sizes, so the images must be the original ones.

    The files of Flickr30K Entities only have the smallest box around all boxes of a phrase, and their phrases are in
    lower case, without articles, possessives, conjunctions and punctuation ("unk" if nothing is left).

    Args:
        name (`str`): The benchmark.
        path (`Path`): The file.
        split (`str`): The split that the file holds.
        images ([`ImageFolders`]): The images that it names.
    """

    images: ImageFolders

    def __init__(self, name: str, path: Path, split: str, images: ImageFolders):
        self.name, self.path, self.split, self.images = name, path, split, images
        self.columns = {"ann_id": datasets.Value("string")} if LAYOUTS[name].annotation else {}

    @classmethod
    def find(cls, request: SplitRequest) -> "IndexFile | None":
        for folder in FOLDERS if request.split_by in request.benchmark.index_names else ():
            name = request.benchmark.index_names[request.split_by]
            path = request.data_dir / folder.format(name=name) / _file_name(request)
            if path.is_file():
                if request.boxes != "union":
                    raise ValueError(f'boxes must be "union" for {path}, which has no other boxes.')
                return cls(request.benchmark.name, path, request.split, request.images)
        return None

    @classmethod
    def looks_for(cls, request: SplitRequest) -> str:
        if request.split_by not in request.benchmark.index_names:
            return f"(for split_by={' or '.join(map(repr, request.benchmark.index_names))} only) an index file .pth"
        return f"{request.benchmark.index_names[request.split_by]}/{_file_name(request)}"

    def fingerprint(self) -> str:
        """A digest of the file, and of the sizes and times of change of all images."""
        return digest_files([self.path], file_statuses(self.images.paths.values()))

    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        entries = read_torch_file(self.path)
        if type(entries) is not list:
            raise ValueError(f"{self.path} holds {reprlib.repr(entries)}, expected a list of tuples.")
        if not entries:  # true of the files unc_trainval.pth and unc+_trainval.pth that are in circulation
            raise ValueError(f"{self.path} has no rows, expected at least one.")
        layout, problems = LAYOUTS[self.name], []
        found: dict[str, AnnotatedImage] = {}
        for number, entry in enumerate(entries):
            try:
                name, image_id, row = _read_entry(entry, layout, f"{self.path}, row [{number}]")
                found.setdefault(image_id, AnnotatedImage(name, image_id, None, [])).rows.append(row)
            except ValueError as error:
                problems.append(str(error))
        return list(found.values()), problems


def _file_name(request: SplitRequest) -> str:
    return f"{request.benchmark.index_names[request.split_by]}_{short_split_name(request.split)}.pth"


def _read_entry(entry: Any, layout: Layout, where: str) -> tuple[str, str, dict[str, Any]]:
    """The name of the image's file, the id of the image, and a row."""
    if type(entry) not in (tuple, list) or len(entry) != (5 if layout.annotation else 3):
        raise ValueError(f"{where} is {reprlib.repr(entry)}, expected {layout.description}.")
    box, expression = entry[layout.box : layout.box + 2]
    if type(expression) is not str:
        raise ValueError(f"{where} has the expression {reprlib.repr(expression)}, expected a string.")
    if not is_box(box):
        raise ValueError(f"{where} has the box {reprlib.repr(box)}, expected 4 numbers of pixels.")
    row = {"where": where, "expression": expression, "box": layout.to_half_open(*map(float, box))}
    image_id = _read_name(entry[0], layout.image, layout, where)
    if layout.annotation:
        row["ann_id"] = _read_name(entry[1], layout.annotation, layout, where)
    return entry[0], image_id, row


def _read_name(name: Any, pattern: re.Pattern, layout: Layout, where: str) -> str:
    """The id in a name. As the whole name must match the pattern, it cannot lead out of the folder of images."""
    match = pattern.fullmatch(name) if type(name) is str else None
    if match is None:
        raise ValueError(f"{where} names {reprlib.repr(name)}, expected {layout.description}.")
    return match[1]
