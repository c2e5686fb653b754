"""Flickr30K Entities: one row per boxed phrase of the five sentences of a Flickr30k photo.

The format (https://bryanplummer.com/Flickr30kEntities) has two files per photo. `Sentences/<id>.txt` holds five
lines with mentions `[/EN#<chain>/<type>[/<type>...] words]`, where a chain is one thing named in several sentences.
`Annotations/<id>.xml` holds the size of the original photo and objects, which give the chains they belong to and
either a box or the flags `scene` and `nobndbox`. Those boxes are integers, 1-based and inclusive.
"""

import hashlib
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import datasets
from PIL import ExifTags, Image

logger = logging.getLogger(__name__)

SPLIT_LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
ANNOTATION_FOLDERS = ("Annotations", "Sentences")
IMAGE_FOLDERS = ("flickr30k_images", "flickr30k-images")

MAX_ANNOTATION_BYTES = 2**20  # bounds on files of unknown origin; real annotations have up to 17 kB
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own default

MENTION = re.compile(r"\[/EN#([0-9]+)((?:/[a-z]+)+) +([^\[\] ][^\[\]]*)\]")
POSITIVE = re.compile(r"\s*[1-9][0-9]{0,8}\s*")
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: encrypted or unknown method


def load_flickr30k_entities(
    data_dir: str | os.PathLike,
    split: str,
    missing_images: str = "error",
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads one split of Flickr30K Entities from files in the official layout. Nothing is downloaded or extracted, and
    images stay where they are: a row stores the path and is decoded when it is read.

    A row is one mention whose chain has at least one box. Mentions of chain 0 ("notvisual") and of chains that are
    only flagged as `scene` or `nobndbox` have no row. The rows of one image are consecutive.

    Args:
        data_dir (`str` or `os.PathLike`): Folder with the ids of the splits in `train.txt`, `val.txt` and `test.txt`,
            with `annotations.zip` or the folders `Annotations` and `Sentences` (there or in its folder `annotations`;
            folders go before the zip), and with `<id>.jpg` in `flickr30k_images` or `flickr30k-images`.
        split (`str`): `"train"`, `"validation"` (or `"val"`) or `"test"`.
        missing_images (`str`, *optional*, defaults to `"error"`): What to do about ids without an image: `"error"`,
            `"skip"` (no rows; how many is logged as a warning when the data is prepared) or `"keep"` (rows whose image
            is `None`, the box in pixels of the size in the XML).
        streaming (`bool`, *optional*, defaults to `False`): Whether to read while iterating, with no file written.
        num_proc (`int`, *optional*): Number of processes that prepare the data. Without effect when streaming.
        cache_dir (`str`, *optional*): Where the prepared data is kept. Defaults to the cache of `datasets`. The data
            is prepared again when annotations, split list or images change.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` with the columns `image` (`PIL.Image.Image` or `None`),
        `image_id` (the stem of the file names), `expression` (the words of the mention), `box`, `sentence` and
        `sentence_id` (where the expression is from, 0 to 4), `chain_id` and `phrase_types` (as in the mention) and
        `num_boxes` (of the chain). The box is the smallest around all boxes of the chain: `[xmin, ymin, xmax, ymax]`,
        float pixels of the image as stored, 0-based and half-open, scaled per axis if the image was resized.

    Raises:
        `FileNotFoundError`: A split list, annotations or (with `missing_images="error"`) images are missing.
        `ValueError`: An argument or the content of a file is not valid. The message names file and object.
    """
    split = "validation" if split == "val" else split
    files = Flickr30kFiles(data_dir, split)
    builder = Flickr30kEntities(
        dataset_name="flickr30k_entities",  # names the cache folder
        data_dir=str(files.root),
        split=split,
        missing_images=missing_images,
        hash=files.fingerprint(),
        cache_dir=cache_dir,
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset(split=split)


@dataclass
class Flickr30kEntitiesConfig(datasets.BuilderConfig):
    """One split under one treatment of missing images; see [`load_flickr30k_entities`]."""

    split: str = "train"
    missing_images: str = "error"


class Flickr30kEntities(datasets.GeneratorBasedBuilder):
    """Prepares the one split its config names. [`load_flickr30k_entities`] adds the hash that keeps the cache true."""

    VERSION = datasets.Version("1.0.0")  # raise it when the rows made from the same files change
    BUILDER_CONFIG_CLASS = Flickr30kEntitiesConfig

    def _info(self) -> datasets.DatasetInfo:
        string, number = datasets.Value("string"), datasets.Value("int32")
        columns = {
            "image": datasets.Image(),
            "image_id": string,
            "expression": string,
            "box": datasets.List(datasets.Value("float32"), length=4),
            "sentence": string,
            "sentence_id": number,
            "chain_id": string,
            "phrase_types": datasets.List(string),
            "num_boxes": number,
        }
        return datasets.DatasetInfo(description=__doc__, features=datasets.Features(columns))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        missing_images = self.config.missing_images
        if missing_images not in ("error", "skip", "keep"):
            raise ValueError(f'missing_images must be "error", "skip" or "keep", not {missing_images!r}.')
        files = Flickr30kFiles(self.config.data_dir, self.config.split)
        files.annotations.check_complete(files.images)
        missing = [image_id for image_id, entry in files.images.items() if entry is None]
        if missing and missing_images != "keep":
            summary = f"{len(missing):,} of {len(files.images):,} images of the {files.split} split are missing"
            places = " and ".join(str(files.root / folder) for folder in IMAGE_FOLDERS)
            if missing_images == "error" or len(missing) == len(files.images):
                raise FileNotFoundError(
                    f"{summary} (looked for <id>.jpg in {places}; one of them is {missing[0]}.jpg); "
                    'missing_images="skip" leaves out their rows (not all), "keep" gives rows without image.'
                )
            num_rows = sum(len(read_rows(files.annotations, image_id)[1]) for image_id in missing)
            logger.warning(f"{summary} in {places}: their {num_rows:,} rows are left out.")
        # `datasets` shares out this list among processes and, when streaming, goes through it element by element.
        present = {image_id: entry.path for image_id, entry in files.images.items() if entry}
        image_ids = present if missing_images == "skip" else files.images
        images = [(image_id, present.get(image_id)) for image_id in image_ids]
        return [datasets.SplitGenerator(files.split, {"images": images, "annotations": files.annotations})]

    def _generate_examples(self, images: list[tuple[str, str | None]], annotations: "AnnotationFiles") -> Iterator:
        for image_id, path in images:
            xml_size, rows = read_rows(annotations, image_id)
            size = xml_size if path is None else stored_size(path)
            scale_x, scale_y = size[0] / xml_size[0], size[1] / xml_size[1]
            image = None if path is None else {"bytes": None, "path": path}
            for index, row in enumerate(rows):
                xmin, ymin, xmax, ymax = row["box"]
                # The last pixel of an inclusive 1-based box is the first one after it when counted from 0.
                box = [(xmin - 1) * scale_x, (ymin - 1) * scale_y, xmax * scale_x, ymax * scale_y]
                yield f"{image_id}-{index}", {**row, "image": image, "image_id": image_id, "box": box}

    def _prepare_split_single(self, **kwargs) -> Iterator:
        # `datasets` hides our message behind its own, and loses it on the way out of a worker process.
        try:
            yield from super()._prepare_split_single(**kwargs)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise


class Flickr30kFiles:
    """What belongs to one split under a data folder: ids, annotations and the images that are there."""

    def __init__(self, data_dir: str | os.PathLike, split: str):
        if split not in SPLIT_LISTS:
            raise ValueError(f"Flickr30K Entities has the splits {', '.join(SPLIT_LISTS)}, not {split!r}.")
        self.split = split
        self.root = Path(data_dir).expanduser().resolve()
        self.annotations = AnnotationFiles(self.root)
        there = {}
        for folder in reversed(IMAGE_FOLDERS):  # the first folder wins
            there.update(list_files(self.root / folder))
        self.images = {i: there.get(f"{i}.jpg") for i in read_split_list(self.root / SPLIT_LISTS[split])}

    def fingerprint(self) -> str:
        """Digest of everything the rows depend on, without opening an image."""
        digest = hashlib.sha256("\n".join(self.images).encode())
        entries = [entry for entry in self.images.values() if entry]
        if self.annotations.is_zip:
            digest.update(self.annotations.path.read_bytes())
        else:
            entries += self.annotations.list_unpacked().values()
        for entry in sorted(entries, key=lambda entry: entry.path):
            status = entry.stat()
            digest.update(f"{entry.path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:32]


class AnnotationFiles:
    """`annotations.zip` or the folders `Annotations` and `Sentences`, read by exact name only."""

    def __init__(self, root: Path):
        unpacked = [f for f in (root, root / "annotations") if all((f / name).is_dir() for name in ANNOTATION_FOLDERS)]
        self.is_zip = not unpacked
        self.path = root / "annotations.zip" if self.is_zip else unpacked[0]
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        if not self.path.exists():
            raise FileNotFoundError(
                f"No annotations of Flickr30K Entities in {root}: expected annotations.zip or the folders Annotations "
                "and Sentences, there or in its folder annotations."
            )

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
        there = set(self._open_zip().namelist()) if self.is_zip else self.list_unpacked()
        missing = [name for image_id in image_ids for name in annotation_names(image_id) if name not in there]
        if missing:
            raise FileNotFoundError(
                f"{len(missing):,} annotation files of the split are missing in {self.path}, such as {missing[0]}."
            )

    def list_unpacked(self) -> dict[str, os.DirEntry]:
        return {f"{f}/{name}": entry for f in ANNOTATION_FOLDERS for name, entry in list_files(self.path / f).items()}

    def _open_zip(self) -> zipfile.ZipFile:
        # Once per process, as it takes a while, and not with a forked parent's handle, whose position is shared.
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = (os.getpid(), zipfile.ZipFile(self.path))
            except ZIP_ERRORS as error:
                raise ValueError(f"{self.path} is not a readable zip file: {error}.") from error
        return self._zip[1]


def read_rows(annotations: AnnotationFiles, image_id: str) -> tuple[tuple[int, int], list[dict]]:
    """Width and height in the XML, and a row per boxed mention, its box the union in the numbers of the XML."""
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
                xmins, ymins, xmaxs, ymaxs = zip(*boxes[chain_id], strict=True)
                rows.append(
                    {
                        "expression": " ".join(words.split()),
                        "box": (min(xmins), min(ymins), max(xmaxs), max(ymaxs)),
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
    boxes = {}
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
    text = element.findtext(path)
    if text is None or not POSITIVE.fullmatch(text):
        raise ValueError(f"{source}: {what} has {text!r} as <{path}>, expected an integer from 1.")
    return int(text)


def stored_size(path: str) -> tuple[int, int]:
    """Width and height of a JPEG file, from its header."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            width, height = image.size
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # Pillow raises many kinds for broken headers
        raise ValueError(f"{path} has no readable JPEG header: {error}.") from error
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{path} has {width} x {height} pixels, more than the {MAX_IMAGE_PIXELS:,} accepted.")
    if orientation in range(2, 9):  # `datasets` turns such an image when it decodes it, away from its boxes
        raise ValueError(f"{path} has EXIF orientation {orientation}, expected an image stored upright.")
    return width, height


def read_split_list(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"No list of image ids {path.name} in {path.parent}.")
    image_ids = path.read_text(encoding="utf-8", errors="replace").split()
    for image_id in image_ids:
        if not re.fullmatch("[0-9]{1,20}", image_id):  # also keeps every path made of it inside the data folder
            raise ValueError(f"{path}: {image_id[:80]!r} is not an image id, expected digits only.")
    if not image_ids or len(set(image_ids)) != len(image_ids):
        raise ValueError(f"{path} has {'an image id twice' if image_ids else 'no image ids'}, expected each id once.")
    return image_ids


def annotation_names(image_id: str) -> tuple[str, str]:
    return f"Annotations/{image_id}.xml", f"Sentences/{image_id}.txt"


def list_files(folder: Path) -> dict[str, os.DirEntry]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry for entry in entries if entry.is_file()}
