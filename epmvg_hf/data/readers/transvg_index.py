"""The index files of TransVG, VLTVG, CLIP-VG and others: one `.pth` file per split, one row per expression.

The format (https://github.com/djiajunustc/TransVG) is a list of tuples saved with `torch.save`, without tensors. What
a tuple holds and how its box is meant differs by benchmark, see `LAYOUTS`; all boxes are those of the original
annotations. TransVG's loader cuts the numbers of COCO's boxes to integers and takes the inclusive boxes of the others
as they are. Here no box is cut, and all are made half-open and counted from 0.
"""

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..annotations import AnnotatedImage, is_box
from ..benchmarks import Wanted, short_split_name
from ..files.image_files import ImageFolders, file_statuses
from ..files.safe_pickle import read_torch_file
from .source import GroundingSource, digest_files

# Where `<name>/<name>_<split>.pth` or the file itself may be: TransVG's `--split_root` is a folder "data" or "split".
FOLDERS = ("{name}", ".", "data/{name}", "split/{name}", "split/data/{name}", "ln_data/{name}")


@dataclass(frozen=True)
class Layout:
    """
    What the tuples of a benchmark's index files hold.

    Args:
        description (`str`): of a tuple, for error messages.
        box (`int`): place of the box, before that of the expression.
        image (`re.Pattern`): matches the name of an image file, the first, with our id of the image as its group.
        annotation (`re.Pattern` or `None`): matches the name of an annotation, the second, with its id as its group.
        to_half_open (`Callable`): makes a box xyxy, 0-based and half-open.
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
        lambda xmin, ymin, xmax, ymax: [xmin, ymin, xmax + 1, ymax + 1],  # inclusive: the last pixel is within
    ),
    "flickr30k_entities": Layout(
        "('<image>.jpg', [xmin, ymin, xmax, ymax], expression)",
        1,
        re.compile(r"([0-9]+)\.jpg"),
        None,
        lambda xmin, ymin, xmax, ymax: [xmin - 1, ymin - 1, xmax, ymax],  # inclusive as well, and counted from 1
    ),
}


class IndexFile(GroundingSource):
    """
    One split from an index file. That of Flickr30K Entities has no box but the smallest around all boxes of a phrase,
    and phrases in lower case without articles, possessives, conjunctions and punctuation ("unk" if nothing is left).
    Index files have no sizes, so the images must be the original ones.

    Args:
        name (`str`): of the benchmark.
        path (`Path`): the file.
        split (`str`): what the file is a split of.
        images ([`ImageFolders`]): the images that it names.
    """

    images: ImageFolders

    def __init__(self, name: str, path: Path, split: str, images: ImageFolders):
        self.name, self.path, self.split, self.images = name, path, split, images
        self.columns = {"ann_id": datasets.Value("string")} if LAYOUTS[name].annotation else {}

    @classmethod
    def find(cls, wanted: Wanted) -> "IndexFile | None":
        for folder in FOLDERS if wanted.split_by in wanted.benchmark.index_names else ():
            name = wanted.benchmark.index_names[wanted.split_by]
            path = wanted.data_dir / folder.format(name=name) / file_name(wanted)
            if path.is_file():
                if wanted.boxes != "union":
                    raise ValueError(f'boxes must be "union" for {path}, which has no others.')
                return cls(wanted.benchmark.name, path, wanted.split, wanted.images)
        return None

    @classmethod
    def looks_for(cls, wanted: Wanted) -> str:
        if wanted.split_by not in wanted.benchmark.index_names:
            return f"(for split_by={' or '.join(map(repr, wanted.benchmark.index_names))} only) an index file .pth"
        return f"{wanted.benchmark.index_names[wanted.split_by]}/{file_name(wanted)}"

    def fingerprint(self) -> str:
        """Digest of the file, and of what is known of all images without opening one."""
        return digest_files([self.path], file_statuses(self.images.paths.values()))

    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        entries = read_torch_file(self.path)
        if type(entries) is not list:
            raise ValueError(f"{self.path} holds {reprlib.repr(entries)}, expected a list of tuples.")
        if not entries:  # as are the files unc_trainval.pth and unc+_trainval.pth that are in circulation
            raise ValueError(f"{self.path} has no rows, expected at least one.")
        layout, problems = LAYOUTS[self.name], []
        found: dict[str, AnnotatedImage] = {}
        for number, entry in enumerate(entries):
            try:
                name, image_id, row = read_entry(entry, layout, f"{self.path}, row [{number}]")
                found.setdefault(image_id, AnnotatedImage(name, image_id, None, [])).rows.append(row)
            except ValueError as error:
                problems.append(str(error))
        return list(found.values()), problems


def file_name(wanted: Wanted) -> str:
    """The name of the index file of a split."""
    return f"{wanted.benchmark.index_names[wanted.split_by]}_{short_split_name(wanted.split)}.pth"


def read_entry(entry: Any, layout: Layout, where: str) -> tuple[str, str, dict[str, Any]]:
    """Name of the image, our id of it, and a row."""
    if type(entry) not in (tuple, list) or len(entry) != (5 if layout.annotation else 3):
        raise ValueError(f"{where} is {reprlib.repr(entry)}, expected {layout.description}.")
    box, expression = entry[layout.box : layout.box + 2]
    if type(expression) is not str:
        raise ValueError(f"{where} has the expression {reprlib.repr(expression)}, expected a string.")
    row = {"where": where, "expression": expression, "box": layout.to_half_open(*read_numbers(box, where))}
    image_id = read_name(entry[0], layout.image, layout, where)
    if layout.annotation:
        row["ann_id"] = read_name(entry[1], layout.annotation, layout, where)
    return entry[0], image_id, row


def read_numbers(box: Any, where: str) -> list[float]:
    """Four numbers from a list or an array; a `ValueError` if it is anything else."""
    numbers = box.tolist() if isinstance(box, np.ndarray) else box
    if type(numbers) in (list, tuple):
        numbers = [value.item() if isinstance(value, np.generic) else value for value in numbers]
    if not is_box(numbers):
        raise ValueError(f"{where} has the box {reprlib.repr(box)}, expected 4 numbers of pixels.")
    return [float(value) for value in numbers]


def read_name(name: Any, pattern: re.Pattern, layout: Layout, where: str) -> str:
    """The id in a name; a `ValueError` if that is not as the layout has it."""
    # Nothing but digits is taken from a name, so that none leads out of a folder.
    match = pattern.fullmatch(name) if type(name) is str else None
    if match is None:
        raise ValueError(f"{where} names {reprlib.repr(name)}, expected {layout.description}.")
    return match[1]
