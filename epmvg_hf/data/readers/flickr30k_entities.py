"""
Flickr30K Entities from its official files: one row per phrase with a box, in the five sentences about a Flickr30k
photo.

The format (Plummer et al., 2015, arXiv 1505.04870) has two files per photo. `Sentences/<id>.txt` holds five lines with
mentions `[/EN#<chain>/<type>[/<type>...] words]`, where a chain is one thing that several sentences mention.
`Annotations/<id>.xml` holds the size of the original photo and its objects: the chains that each belongs to, and
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

from ..annotations import AnnotatedImage, box_around
from ..benchmarks import SplitRequest, short_split_name
from ..files.image_files import ImageFolders, file_statuses, list_files
from .source import GroundingSource

ANNOTATION_FOLDERS = ("Annotations", "Sentences")

MAX_ANNOTATION_BYTES = 2**20  # a bound on files of unknown origin; real ones have up to 17 kB

_MENTION = re.compile(r"\[/EN#([0-9]+)((?:/[a-z]+)+) +([^\[\] ][^\[\]]*)\]")
_POSITIVE = re.compile(r"\s*[1-9][0-9]{0,8}\s*")
# A zip raises RuntimeError if it is encrypted, OSError if it points behind its end.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError)


class Flickr30kEntities(GroundingSource):
    """
    One split from files in the official layout. A row is one mention whose chain has at least one box: mentions of
    chain 0 ("notvisual") and of chains that are only flagged as `scene` or `nobndbox` have no row.

    Args:
        data_dir (`str` or `os.PathLike`):
            Folder with the ids of the splits in `train.txt`, `val.txt` and `test.txt`, and with the annotations:
            either the folders `Annotations` and `Sentences`, there or in its folder `annotations`, or else
            `annotations.zip`.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        images ([`ImageFolders`]): The images `<id>.jpg`.
        boxes (`str`, *optional*, defaults to `"union"`):
            With `"union"`, `box` is the smallest box around all boxes of the chain. With `"any"`, the column `boxes`
            also has each of them.
    """

    name = "flickr30k_entities"

    def __init__(self, data_dir: str | os.PathLike, split: str, images: ImageFolders, boxes: str = "union"):
        self.split, self.images, self.boxes = split, images, boxes
        self.root = Path(data_dir).resolve()
        self.annotations = AnnotationFiles(self.root)
        self.image_ids = _read_image_ids(self.root / _list_name(split))
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
    def find(cls, request: SplitRequest) -> "Flickr30kEntities | None":
        if AnnotationFiles.locate(request.data_dir) is None:
            return None
        return cls(request.data_dir, request.split, request.images, request.boxes)

    @classmethod
    def looks_for(cls, request: SplitRequest) -> str:
        return f"{_list_name(request.split)} with annotations.zip or the folders Annotations and Sentences"

    def fingerprint(self) -> str:
        """A digest of the annotations, and of the sizes and times of change of the images that are there."""
        digest = hashlib.sha256(f"{self.boxes}\n".encode() + "\n".join(self.image_ids).encode())
        if self.annotations.is_zip:
            digest.update(self.annotations.path.read_bytes())
        else:
            digest.update(file_statuses(self.annotations.list_unpacked().values()).encode())
        paths = (self.path_of(image_id) for image_id in self.image_ids)
        digest.update(file_statuses(path for path in paths if path).encode())
        return digest.hexdigest()[:32]

    def list_images(self) -> tuple[list[str], list[str]]:
        self.annotations.check_complete(self.image_ids)
        return self.image_ids, []

    def image_id_of(self, item: str) -> str:
        return item

    def name_of(self, item: str) -> str:
        return f"{item}.jpg"

    def annotate(self, item: str) -> AnnotatedImage:
        size, rows = _read_photo(self.annotations, item)
        for row in rows:
            # Subtracting 1 makes the box 0-based. Adding 1 to its last pixel makes it half-open, so xmax stays.
            boxes = [[xmin - 1, ymin - 1, xmax, ymax] for xmin, ymin, xmax, ymax in row.pop("boxes")]
            row["box"] = box_around(boxes)
            if self.boxes == "any":
                row["boxes"] = boxes
        return AnnotatedImage(self.name_of(item), item, size, rows)


class AnnotationFiles:
    """The files of the photos, in `annotations.zip` or in the folders `Annotations` and `Sentences`."""

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
        """The folder that contains the two folders, or else the zip file."""
        for folder in (root, root / "annotations"):
            if all((folder / name).is_dir() for name in ANNOTATION_FOLDERS):
                return folder
        archive = root / "annotations.zip"
        return archive if archive.exists() else None

    def __getstate__(self) -> dict:  # an open zip cannot be sent to another process
        return {**self.__dict__, "_zip": None}

    def read(self, name: str) -> str:
        """The text of one file, such as `"Annotations/36979.xml"`."""
        path = self.path / name
        try:
            if self.is_zip:
                content = self._read_member(name)
            else:
                with path.open("rb") as file:
                    content = file.read(MAX_ANNOTATION_BYTES + 1)
            if len(content) > MAX_ANNOTATION_BYTES:
                raise ValueError(f"it has more than the {MAX_ANNOTATION_BYTES:,} bytes accepted")
            return content.decode()
        except (*_ZIP_ERRORS, ValueError) as error:
            raise ValueError(f"{path} cannot be read as UTF-8 text: {error}.") from error

    def _read_member(self, name: str) -> bytes:
        """
        Up to a byte more than is accepted of a file in the zip, whose own word on its size may be wrong. Of other
        methods than these, Python decompresses everything at once.
        """
        archive = self._open_zip()
        member = archive.getinfo(name)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"it is compressed by method {member.compress_type}, expected 0 (none) or 8 (deflate)")
        with archive.open(member) as file:
            return file.read(MAX_ANNOTATION_BYTES + 1)

    def check_complete(self, image_ids: Iterable[str]) -> None:
        """Raises a `FileNotFoundError` if one of the photos lacks one of its two files."""
        existing = set(self._open_zip().namelist()) if self.is_zip else self.list_unpacked()
        missing = [name for image_id in image_ids for name in _annotation_names(image_id) if name not in existing]
        if missing:
            raise FileNotFoundError(
                f"{len(missing):,} annotation files of the split are missing in {self.path}, such as {missing[0]}."
            )

    def list_unpacked(self) -> dict[str, str]:
        """The paths of the unpacked files by name, such as `"Annotations/36979.xml"`."""
        return {f"{f}/{name}": path for f in ANNOTATION_FOLDERS for name, path in list_files(self.path / f).items()}

    def _open_zip(self) -> zipfile.ZipFile:
        # Opening takes a while, so each process does it once. A process cannot use the handle that it inherited when
        # it was forked, because the position in the file is shared with its parent.
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = (os.getpid(), zipfile.ZipFile(self.path))
            except _ZIP_ERRORS as error:
                raise ValueError(f"{self.path} is not a readable zip file: {error}.") from error
        return self._zip[1]


def _read_photo(annotations: AnnotationFiles, image_id: str) -> tuple[tuple[int, int], list[dict]]:
    """Width and height of a photo, and a row per mention that has boxes, whose numbers are still those of the XML."""
    xml_name, text_name = _annotation_names(image_id)
    size, boxes = _parse_objects(annotations.read(xml_name), annotations.path / xml_name)
    lines = annotations.read(text_name).rstrip("\n").split("\n")
    if len(lines) != 5:
        raise ValueError(f"{annotations.path / text_name} has {len(lines)} lines, expected 5 sentences.")
    rows = []
    for sentence_id, line in enumerate(lines):
        where = f"{annotations.path / text_name}, line {sentence_id + 1}"
        rest = _MENTION.sub("", line)
        if "[/" in rest or "EN#" in rest or rest.count("[") != rest.count("]"):
            raise ValueError(f"{where}: expected mentions as in '[/EN#chain/type words]', got {line.strip()!r}.")
        sentence = " ".join(_MENTION.sub(r"\3", line).split())
        for chain_id, types, words in _MENTION.findall(line):
            if chain_id == "0":  # "notvisual": the words were not annotated in the photo
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


def _parse_objects(text: str, source: Path) -> tuple[tuple[int, int], dict[str, list[tuple]]]:
    """Width and height of a photo, and the boxes of each chain: an empty list for a chain that is only flagged."""
    # An XML entity can expand to a huge text.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{source} declares a document type or an entity, expected neither.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{source} is not well-formed XML: {error}.") from error
    width, height = (_positive_integer(root, f"size/{tag}", source, "annotation") for tag in ("width", "height"))
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
            box = tuple(_positive_integer(box_element, tag, source, what) for tag in ("xmin", "ymin", "xmax", "ymax"))
            if not (box[0] <= box[2] <= width and box[1] <= box[3] <= height):
                raise ValueError(f"{source}: {what} has the box {box}, expected one within {width} x {height} pixels.")
            found.append(box)
        for name in names:
            boxes.setdefault(name, []).extend(found)
    return (width, height), boxes


def _positive_integer(element: ElementTree.Element, path: str, source: Path, what: str) -> int:
    text = element.findtext(path)
    if text is None or not _POSITIVE.fullmatch(text):
        raise ValueError(f"{source}: {what} has {text!r} as <{path}>, expected a positive integer.")
    return int(text)


def _list_name(split: str) -> str:
    return f"{short_split_name(split)}.txt"


def _read_image_ids(path: Path) -> list[str]:
    """The ids of the images of a split, of which there must be at least one and none twice."""
    if not path.is_file():
        raise FileNotFoundError(f"No list of image ids {path.name} in {path.parent}.")
    image_ids = path.read_text(encoding="utf-8", errors="replace").split()
    for image_id in image_ids:
        if not re.fullmatch("[0-9]{1,20}", image_id):  # also keeps paths made of it inside the data folder
            raise ValueError(f"{path}: {reprlib.repr(image_id)} is not an image id, expected digits only.")
    if not image_ids or len(set(image_ids)) != len(image_ids):
        raise ValueError(f"{path} has {'an image id twice' if image_ids else 'no image ids'}, expected each id once.")
    return image_ids


def _annotation_names(image_id: str) -> tuple[str, str]:
    return f"Annotations/{image_id}.xml", f"Sentences/{image_id}.txt"
