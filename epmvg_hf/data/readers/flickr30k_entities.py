"""Flickr30K Entities: one row per boxed phrase of the five sentences of a Flickr30k photo.

The format (https://bryanplummer.com/Flickr30kEntities) has two files per photo. `Sentences/<id>.txt` holds five
lines with mentions `[/EN#<chain>/<type>[/<type>...] words]`, where a chain is one thing named in several sentences.
`Annotations/<id>.xml` holds the size of the original photo and objects, which give the chains they belong to and
either a box or the flags `scene` and `nobndbox`. Those boxes are integers, 1-based and inclusive.
"""

import hashlib
import os
import re
import reprlib
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import datasets

from ..annotations import AnnotatedImage
from ..benchmarks import Wanted, short_split_name
from ..files.image_files import ImageFolders, file_statuses, list_files
from .source import GroundingSource

ANNOTATION_FOLDERS = ("Annotations", "Sentences")

MAX_ANNOTATION_BYTES = 2**20  # a bound on files of unknown origin; real ones have up to 17 kB

MENTION = re.compile(r"\[/EN#([0-9]+)((?:/[a-z]+)+) +([^\[\] ][^\[\]]*)\]")
POSITIVE = re.compile(r"\s*[1-9][0-9]{0,8}\s*")
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: encrypted or unknown method


class Flickr30kEntities(GroundingSource):
    """
    One split from files in the official layout. A row is one mention whose chain has at least one box: mentions of
    chain 0 ("notvisual") and of chains that are only flagged as `scene` or `nobndbox` have no row.

    Args:
        data_dir (`str` or `os.PathLike`): Folder with the ids of the splits in `train.txt`, `val.txt` and `test.txt`,
            and with `annotations.zip` or the folders `Annotations` and `Sentences` (there or in its folder
            `annotations`; folders go before the zip).
        split (`str`): `"train"`, `"validation"` or `"test"`.
        images ([`ImageFolders`]): the images `<id>.jpg`.
        boxes (`str`, *optional*, defaults to `"union"`): `"union"` for `box` alone, the smallest around all boxes of
            the chain; `"any"` for a column `boxes` beside it, with each of them.
    """

    name = "flickr30k_entities"

    def __init__(self, data_dir: str | os.PathLike, split: str, images: ImageFolders, boxes: str = "union"):
        self.split, self.images, self.boxes = split, images, boxes
        self.root = Path(data_dir).resolve()
        self.annotations = AnnotationFiles(self.root)
        self.image_ids = read_split_list(self.root / list_name(split))
        string, number = datasets.Value("string"), datasets.Value("int32")
        self.columns = {
            "sentence": string,
            "sentence_id": number,
            "chain_id": string,
            "phrase_types": datasets.List(string),
            "num_boxes": number,
        }
        if boxes == "any":
            self.columns["boxes"] = datasets.List(datasets.List(datasets.Value("float32"), length=4))

    @classmethod
    def find(cls, wanted: Wanted) -> "Flickr30kEntities | None":
        if AnnotationFiles.locate(wanted.data_dir) is None:
            return None
        return cls(wanted.data_dir, wanted.split, wanted.images, wanted.boxes)

    @classmethod
    def looks_for(cls, wanted: Wanted) -> str:
        return f"{list_name(wanted.split)} with annotations.zip or the folders Annotations and Sentences"

    def fingerprint(self) -> str:
        """Digest of everything the rows depend on, without opening an image."""
        digest = hashlib.sha256(f"{self.boxes}\n".encode() + "\n".join(self.image_ids).encode())
        if self.annotations.is_zip:
            digest.update(self.annotations.path.read_bytes())
        else:
            digest.update(file_statuses(self.annotations.list_unpacked().values()).encode())
        there = (self.path_of(image_id) for image_id in self.image_ids)
        digest.update(file_statuses(path for path in there if path).encode())
        return digest.hexdigest()[:32]

    def list_images(self) -> tuple[list[str], list[str]]:
        self.annotations.check_complete(self.image_ids)
        return self.image_ids, []

    def image_id_of(self, item: str) -> str:
        return item

    def name_of(self, item: str) -> str:
        return f"{item}.jpg"

    def annotate(self, item: str) -> AnnotatedImage:
        size, rows = read_rows(self.annotations, item)
        for row in rows:
            # The last pixel of an inclusive 1-based box is the first one after it when counted from 0.
            boxes = [[xmin - 1, ymin - 1, xmax, ymax] for xmin, ymin, xmax, ymax in row.pop("boxes")]
            xmins, ymins, xmaxs, ymaxs = zip(*boxes, strict=True)
            row["box"] = [min(xmins), min(ymins), max(xmaxs), max(ymaxs)]
            if self.boxes == "any":
                row["boxes"] = boxes
        return AnnotatedImage(self.name_of(item), item, size, rows)


class AnnotationFiles:
    """`annotations.zip` or the folders `Annotations` and `Sentences`, read by exact name only."""

    def __init__(self, root: Path):
        path = self.locate(root)
        if path is None:
            raise FileNotFoundError(
                f"No annotations of Flickr30K Entities in {root}: expected annotations.zip or the folders Annotations "
                "and Sentences, there or in its folder annotations."
            )
        self.path, self.is_zip = path, path.suffix == ".zip"
        self._zip: tuple[int, zipfile.ZipFile] | None = None

    @staticmethod
    def locate(root: Path) -> Path | None:
        """The zip file, or the folder that has the two folders, which goes before it."""
        for folder in (root, root / "annotations"):
            if all((folder / name).is_dir() for name in ANNOTATION_FOLDERS):
                return folder
        archive = root / "annotations.zip"
        return archive if archive.exists() else None

    def __getstate__(self) -> dict:  # an open zip cannot be sent to a worker
        return {**self.__dict__, "_zip": None}

    def read(self, name: str) -> str:
        """Text of one file, such as `"Annotations/36979.xml"`."""
        path, archive = self.path / name, self._open_zip() if self.is_zip else None
        size = archive.getinfo(name).file_size if archive else path.stat().st_size
        if size > MAX_ANNOTATION_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, expected at most {MAX_ANNOTATION_BYTES:,}.")
        try:
            return (archive.read(name) if archive else path.read_bytes()).decode()
        except (*ZIP_ERRORS, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as UTF-8 text: {error}.") from error

    def check_complete(self, image_ids: Iterable[str]) -> None:
        """Raises a `FileNotFoundError` if one of the photos lacks one of its two files."""
        there = set(self._open_zip().namelist()) if self.is_zip else self.list_unpacked()
        missing = [name for image_id in image_ids for name in annotation_names(image_id) if name not in there]
        if missing:
            raise FileNotFoundError(
                f"{len(missing):,} annotation files of the split are missing in {self.path}, such as {missing[0]}."
            )

    def list_unpacked(self) -> dict[str, str]:
        """Paths of the unpacked files by name, such as `"Annotations/36979.xml"`."""
        return {f"{f}/{name}": path for f in ANNOTATION_FOLDERS for name, path in list_files(self.path / f).items()}

    def _open_zip(self) -> zipfile.ZipFile:
        # Once per process, as it takes a while, and not with a forked parent's handle, whose position is shared.
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = (os.getpid(), zipfile.ZipFile(self.path))
            except ZIP_ERRORS as error:
                raise ValueError(f"{self.path} is not a readable zip file: {error}.") from error
        return self._zip[1]


def read_rows(annotations: AnnotationFiles, image_id: str) -> tuple[tuple[int, int], list[dict]]:
    """Width and height in the XML, and a row per boxed mention, with its boxes in the numbers of the XML."""
    xml_name, text_name = annotation_names(image_id)
    size, boxes = parse_objects(annotations.read(xml_name), annotations.path / xml_name)
    lines = annotations.read(text_name).rstrip("\n").split("\n")
    if len(lines) != 5:
        raise ValueError(f"{annotations.path / text_name} has {len(lines)} lines, expected 5 sentences.")
    rows = []
    for sentence_id, line in enumerate(lines):
        where = f"{annotations.path / text_name}, line {sentence_id + 1}"
        rest = MENTION.sub("", line)
        if "[/" in rest or "EN#" in rest or rest.count("[") != rest.count("]"):
            raise ValueError(f"{where}: expected mentions as in '[/EN#chain/type words]', got {line.strip()!r}.")
        sentence = " ".join(MENTION.sub(r"\3", line).split())
        for chain_id, types, words in MENTION.findall(line):
            if chain_id == "0":  # "notvisual": never looked for in the photo
                continue
            if chain_id not in boxes:
                raise ValueError(f"{where}: chain {chain_id} has no object, expected its name in {xml_name}.")
            if boxes[chain_id]:
                rows.append(
                    {
                        "where": where,
                        "expression": " ".join(words.split()),
                        "boxes": boxes[chain_id],
                        "sentence": sentence,
                        "sentence_id": sentence_id,
                        "chain_id": chain_id,
                        "phrase_types": types[1:].split("/"),
                        "num_boxes": len(boxes[chain_id]),
                    }
                )
    return size, rows


def parse_objects(text: str, source: Path) -> tuple[tuple[int, int], dict[str, list[tuple]]]:
    """Size of the photo, and the boxes of every chain (none if it is only flagged) in the numbers of the XML."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{source} declares a document type or an entity, expected neither.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{source} is not well-formed XML: {error}.") from error
    width, height = (positive_integer(root, f"size/{tag}", source, "annotation") for tag in ("width", "height"))
    boxes: dict[str, list[tuple[int, ...]]] = {}
    for number, element in enumerate(root.iterfind("object"), start=1):
        names = list(dict.fromkeys((name.text or "").strip() for name in element.iterfind("name")))
        what = f"object {number} (chain {', '.join(names)})"
        if not names or not all(names):
            raise ValueError(f"{source}: object {number} has no or an empty <name>, expected the id of its chain.")
        elements = element.findall("bndbox")
        if not elements and element.find("scene") is None and element.find("nobndbox") is None:
            raise ValueError(f"{source}: {what} has none of <bndbox>, <scene> and <nobndbox>, expected one.")
        found = []
        for box_element in elements:
            box = tuple(positive_integer(box_element, tag, source, what) for tag in ("xmin", "ymin", "xmax", "ymax"))
            if not (box[0] <= box[2] <= width and box[1] <= box[3] <= height):
                raise ValueError(f"{source}: {what} has the box {box}, expected one within {width} x {height} pixels.")
            found.append(box)
        for name in names:
            boxes.setdefault(name, []).extend(found)
    return (width, height), boxes


def positive_integer(element: ElementTree.Element, path: str, source: Path, what: str) -> int:
    """The integer below an element; a `ValueError` if it is missing, or not from 1."""
    text = element.findtext(path)
    if text is None or not POSITIVE.fullmatch(text):
        raise ValueError(f"{source}: {what} has {text!r} as <{path}>, expected an integer from 1.")
    return int(text)


def list_name(split: str) -> str:
    """The file with the image ids of a split."""
    return f"{short_split_name(split)}.txt"


def read_split_list(path: Path) -> list[str]:
    """
    The ids of the images of a split.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: It has something else than digits, an id twice, or none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No list of image ids {path.name} in {path.parent}.")
    image_ids = path.read_text(encoding="utf-8", errors="replace").split()
    for image_id in image_ids:
        if not re.fullmatch("[0-9]{1,20}", image_id):  # also keeps every path made of it inside the data folder
            raise ValueError(f"{path}: {reprlib.repr(image_id)} is not an image id, expected digits only.")
    if not image_ids or len(set(image_ids)) != len(image_ids):
        raise ValueError(f"{path} has {'an image id twice' if image_ids else 'no image ids'}, expected each id once.")
    return image_ids


def annotation_names(image_id: str) -> tuple[str, str]:
    """The names of a photo's two files."""
    return f"Annotations/{image_id}.xml", f"Sentences/{image_id}.txt"
