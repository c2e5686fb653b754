"""Tests of the Flickr30K Entities reader on hand-written files, and on the real ones where they are."""

import logging
import os
import pickle
import re
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from epmvg_hf.data.benchmarks import BENCHMARKS, SplitRequest
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.readers import flickr30k_entities
from epmvg_hf.data.readers.flickr30k_entities import AnnotationFiles, Flickr30kEntities
from tests.fixtures.flickr30k_files import HEAD, TEXT_11, XML_11, XML_22, write
from tests.fixtures.paths import REAL_DATA

# (sentence_id, expression, chain_id, phrase_types, num_boxes, box in 0-based half-open pixels of the XML's 40 x 20)
ROWS_11 = [
    (0, "Two men", "1", ["people"], 2, [0, 0, 40, 20]),
    (0, "the taller one", "2", ["people", "other"], 1, [20, 2, 40, 20]),
    (1, "them", "1", ["people"], 2, [0, 0, 40, 20]),
    (3, "a man 's ring", "5", ["bodyparts", "people"], 1, [6, 7, 7, 8]),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "data")


def pack(root: Path) -> Path:
    """Replaces the two folders by `annotations.zip`."""
    with zipfile.ZipFile(root / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [*root.glob("Annotations/*"), *root.glob("Sentences/*")]:
            archive.write(path, path.relative_to(root))
            path.unlink()
    (root / "Annotations").rmdir()
    (root / "Sentences").rmdir()
    return root


def load_flickr30k_entities(data_dir, split, missing_images="error", boxes="union", **options):
    request = SplitRequest.resolve(BENCHMARKS["flickr30k_entities"], Path(data_dir).resolve(), split, boxes=boxes)
    source = Flickr30kEntities(request.data_dir, request.split, request.images, boxes)
    return open_source(source, missing_images, **options)


def rows(dataset) -> list[dict]:
    """Rows without the decoded image, but with its size."""
    return [{**row, "image": row["image"] and row["image"].size} for row in dataset]


def test_rows(folder):
    first = rows(load_flickr30k_entities(folder, "train"))[:4]
    fields = ("sentence_id", "expression", "chain_id", "phrase_types", "num_boxes", "box")
    assert [tuple(row[field] for field in fields) for row in first] == ROWS_11
    assert {row["image_id"] for row in first} == {"11"}
    assert {row["image"] for row in first} == {(40, 20)}
    assert first[0]["sentence"] == "Two men and the taller one on a street ."
    assert first[2]["sentence"] == "Rain falls on them ."


def test_box_is_scaled_to_the_stored_image(folder):
    last = rows(load_flickr30k_entities(folder, "train"))[4:]
    assert [row["box"] for row in last] == [[1, 0.5, 8, 4.5]] * 4
    assert [row["image"] for row in last] == [(40, 10)] * 4


def test_image_is_a_path_and_not_copied(folder):
    image = load_flickr30k_entities(folder, "val").data.column("image")[0].as_py()
    assert image == {"bytes": None, "path": str(folder / "flickr30k_images" / "22.jpg")}


def test_layouts_give_equal_rows(tmp_path):
    expected = rows(load_flickr30k_entities(write(tmp_path / "plain"), "train"))
    zipped = pack(write(tmp_path / "zipped"))
    (zipped / "flickr30k_images").rename(zipped / "flickr30k-images")
    assert rows(load_flickr30k_entities(zipped, "train")) == expected

    below = write(tmp_path / "below")
    (below / "annotations").mkdir()
    (below / "Annotations").rename(below / "annotations" / "Annotations")
    (below / "Sentences").rename(below / "annotations" / "Sentences")
    assert rows(load_flickr30k_entities(below, "train")) == expected


@pytest.mark.parametrize("packed", [False, True])
def test_streaming_and_processes_give_equal_rows(folder, tmp_path, packed):
    if packed:
        pack(folder)
    expected = rows(load_flickr30k_entities(folder, "train"))
    streamed = load_flickr30k_entities(folder, "train", streaming=True)
    assert rows(streamed) == expected
    assert streamed.num_shards == 2
    assert rows(load_flickr30k_entities(folder, "train", num_proc=2, cache_dir=str(tmp_path / "c"))) == expected


def test_zip_is_opened_once_when_streaming(folder, monkeypatch):
    opened = []
    open_zip = zipfile.ZipFile
    pack(folder)
    monkeypatch.setattr(flickr30k_entities.zipfile, "ZipFile", lambda path: opened.append(path) or open_zip(path))
    assert len(list(load_flickr30k_entities(folder, "train", streaming=True))) == 8
    assert len(opened) == 1


def test_open_zip_is_not_shared_between_processes(folder, monkeypatch):
    annotations = AnnotationFiles(pack(folder))
    first = annotations._open_zip()
    assert annotations._open_zip() is first
    assert pickle.loads(pickle.dumps(annotations)).read("Sentences/11.txt") == TEXT_11  # as for a spawned worker
    monkeypatch.setattr(flickr30k_entities.os, "getpid", lambda: -1)  # as in a forked one
    assert annotations._open_zip() is not first


def test_split_names(folder):
    validation = load_flickr30k_entities(str(folder), "validation")
    assert str(validation.split) == "validation"
    assert rows(load_flickr30k_entities(folder, "val")) == rows(validation)
    assert validation["image_id"][:] == ["22"] * 4


# Missing images


def test_missing_image_is_an_error(folder):
    (folder / "flickr30k_images" / "11.jpg").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_flickr30k_entities(folder, "train")
    assert "1 of 2 images of the train split are missing" in str(error.value)
    assert f"{folder}/flickr30k_images, {folder}/flickr30k-images" in str(error.value)
    assert "11.jpg" in str(error.value)
    with pytest.raises(FileNotFoundError, match="1 of 2 images"):
        load_flickr30k_entities(folder, "train", streaming=True)


def test_missing_image_is_skipped(folder, caplog):
    (folder / "flickr30k_images" / "11.jpg").unlink()
    with caplog.at_level(logging.WARNING, logger="epmvg_hf.data.builder"):
        dataset = load_flickr30k_entities(folder, "train", missing_images="skip")
    assert dataset["image_id"][:] == ["22"] * 4
    assert "1 of 2 images" in caplog.text and "their 4 rows are left out" in caplog.text
    (folder / "flickr30k_images" / "22.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 2 images"):
        load_flickr30k_entities(folder, "train", missing_images="skip")


def test_missing_image_is_kept(folder):
    (folder / "flickr30k_images" / "22.jpg").unlink()
    kept = rows(load_flickr30k_entities(folder, "train", missing_images="keep"))
    assert [row["image"] for row in kept] == [(40, 20)] * 4 + [None] * 4
    assert kept[-1]["box"] == [1, 1, 8, 9]


# Cache


def test_edited_annotations_are_seen(folder):
    assert load_flickr30k_entities(folder, "val")["box"][0] == [1, 0.5, 8, 4.5]
    (folder / "Annotations" / "22.xml").write_text(XML_22.replace("<xmax>8<", "<xmax>9<"))
    assert load_flickr30k_entities(folder, "val")["box"][0] == [1, 0.5, 9, 4.5]


def test_edited_zip_is_seen(folder, tmp_path):
    assert load_flickr30k_entities(pack(folder), "train")["expression"][0] == "Two men"
    edited = pack(write(tmp_path / "edited", text=TEXT_11.replace("Two men", "Six men")))
    (edited / "annotations.zip").replace(folder / "annotations.zip")
    assert load_flickr30k_entities(folder, "train")["expression"][0] == "Six men"


def test_edited_list_and_images_are_seen(folder):
    image = folder / "flickr30k_images" / "22.jpg"
    image.rename(folder / "away.jpg")
    assert load_flickr30k_entities(folder, "train", "keep")[-1]["image"] is None
    Image.new("RGB", (20, 10)).save(image)
    assert load_flickr30k_entities(folder, "train", "keep")[-1]["box"] == [0.5, 0.5, 4, 4.5]
    (folder / "away.jpg").replace(image)
    assert load_flickr30k_entities(folder, "train", "keep")[-1]["box"] == [1, 0.5, 8, 4.5]
    (folder / "train.txt").write_text("11\n")
    assert len(load_flickr30k_entities(folder, "train", "keep")) == 4


def test_unchanged_data_is_prepared_once(folder, tmp_path, monkeypatch):
    expected = rows(load_flickr30k_entities(folder, "train"))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setattr(GroundingBuilder, "_generate_tables", None)
    assert rows(load_flickr30k_entities(tmp_path / "link", "train")) == expected


def test_two_folders_do_not_share_a_cache(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", text=TEXT_11.replace("Two men", "Six men"))
    for path in (p for root in (one, two) for p in root.rglob("*.*")):
        os.utime(path, ns=(0, 0))
    assert load_flickr30k_entities(one, "train")[0]["expression"] == "Two men"
    assert load_flickr30k_entities(two, "train")[0]["expression"] == "Six men"


# Files of unknown origin

MENTIONED = "[/EN#1/people Two men]"
BAD_XML = [
    (HEAD.format(11), "<!DOCTYPE a [<!ENTITY b 'c'>]>" + HEAD.format(11), "11.xml declares a document type"),
    (HEAD.format(11), "<!DOCTYPE annotation>" + HEAD.format(11), "11.xml declares a document type"),
    ("</annotation>", "", "11.xml is not well-formed XML"),
    (HEAD.format(11), "<annotation>", "11.xml: annotation has None as <size/width>, expected a positive integer"),
    ("<width>40", "<width>0", "annotation has '0' as <size/width>"),
    ("<xmax>10<", "<xmax>ten<", "object 1 (chain 1) has 'ten' as <xmax>, expected a positive integer"),
    ("<xmin>1<", "<xmin>0<", "object 1 (chain 1) has '0' as <xmin>, expected a positive integer"),
    ("<xmax>10<", "<xmax>41<", "object 1 (chain 1) has the box (1, 1, 41, 5), expected one within 40 x 20 pixels"),
    ("<xmin>21<", "<xmin>41<", "object 2 (chain 1, 2) has the box (41, 3, 40, 20)"),
    ("<ymax>5</ymax>", "", "object 1 (chain 1) has None as <ymax>"),
    ("<name>5</name>", "", "object 5 has no or an empty <name>"),
    ("<scene>1</scene><nobndbox>0</nobndbox>", "", "object 3 (chain 3) has none of <bndbox>, <scene> and <nobndbox>"),
    ("<name>4</name>", "<name>6</name>", "11.txt, line 2: chain 4 has no object, expected its name in Annotations/11"),
]
BAD_TEXT = [
    (MENTIONED, "[/EN#1/people Two men", "11.txt, line 1: expected mentions as in '[/EN#chain/type words]'"),
    (MENTIONED, "[/EN#1/people Two men]]", "11.txt, line 1: expected mentions"),
    (MENTIONED, "[/EN#1 Two men]", "11.txt, line 1: expected mentions"),
    (MENTIONED, "[/EN#1/people ]", "11.txt, line 1: expected mentions"),
    (MENTIONED, "[/people Two men]", "11.txt, line 1: expected mentions"),
    (MENTIONED, "[EN#1/people Two men]", "11.txt, line 1: expected mentions"),
    ("[/EN#0/notvisual It] rains .\n", "", "11.txt has 4 lines, expected 5 sentences"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("old", "new", "message"), BAD_XML + BAD_TEXT)
def test_bad_annotations(tmp_path, old, new, message, packed):
    assert old in XML_11 or old in TEXT_11
    root = write(tmp_path / "data", XML_11.replace(old, new, 1), TEXT_11.replace(old, new, 1))
    if packed:
        pack(root)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_flickr30k_entities(root, "train")
    assert str(root) in str(error.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(load_flickr30k_entities(root, "train", streaming=True))


def test_message_survives_a_worker_process(tmp_path):
    root = write(tmp_path / "data", XML_11.replace("</annotation>", ""))
    with pytest.raises(ValueError, match=r"11\.xml is not well-formed XML"):
        load_flickr30k_entities(root, "train", num_proc=2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings_hide_nothing(folder, encoding):
    xml = "<!DOCTYPE a [<!ENTITY b 'c\xe9'>]>" + XML_11
    (folder / "Annotations" / "11.xml").write_bytes(xml.encode(encoding))
    with pytest.raises(ValueError, match=r"11\.xml (cannot be read|is not well-formed|declares)"):
        load_flickr30k_entities(folder, "train")


@pytest.mark.parametrize("packed", [False, True])
def test_huge_annotation(folder, packed):
    (folder / "Annotations" / "11.xml").write_text(XML_11 + " " * 2**20)
    if packed:
        pack(folder)
    with pytest.raises(ValueError, match=r"11\.xml cannot be read .*: it has more than the 1,048,576 bytes accepted"):
        load_flickr30k_entities(folder, "train")


def test_damaged_zip(folder):
    path = pack(folder) / "annotations.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("Annotations/11.xml").header_offset
    data[start + 60 : start + 90] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"annotations\.zip/Annotations/11\.xml cannot be read"):
        load_flickr30k_entities(folder, "train")
    path.write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match=r"annotations\.zip is not a readable zip file"):
        load_flickr30k_entities(folder, "train")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_does_not_take_more_memory_than_it_says(folder, tmp_path, method):
    """A file that is small on the disk, and says that it is small, would fill 128 MiB."""
    small, large = b"<annotation/>", bytes(1 << 27)
    with zipfile.ZipFile(tmp_path / "large.zip", "w", method) as archive:
        archive.writestr("Annotations/11.xml", large)
        member = archive.getinfo("Annotations/11.xml")
        member.file_size, member.CRC = len(small), zlib.crc32(small)
    del large
    path = pack(folder) / "annotations.zip"
    (tmp_path / "large.zip").replace(path)
    annotations = AnnotationFiles(folder)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"annotations\.zip/Annotations/11\.xml cannot be read as UTF-8 text: "):
        annotations.read("Annotations/11.xml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize("image_id", ["../11", "/etc/passwd", "11.jpg", "a", "..", "\uff11\uff11", "1" * 21])
def test_ids_are_digits(folder, image_id):
    (folder / "train.txt").write_text(f"11\n{image_id}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.txt: .* is not an image id, expected digits only"):
        load_flickr30k_entities(folder, "train")


@pytest.mark.parametrize(("ids", "message"), [("", "has no image ids"), ("11\n22\n11", "has an image id twice")])
def test_ids_are_each_listed_once(folder, ids, message):
    (folder / "train.txt").write_text(ids)
    with pytest.raises(ValueError, match=message):
        load_flickr30k_entities(folder, "train")


def test_image_with_an_exif_orientation(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(folder / "flickr30k_images" / "11.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"11\.jpg has EXIF orientation 6"):
        load_flickr30k_entities(folder, "train")


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No list of image ids test\.txt in .*data"):
        load_flickr30k_entities(folder, "test")
    with pytest.raises(FileNotFoundError, match=r"No annotations of Flickr30K Entities in .*nowhere"):
        load_flickr30k_entities(tmp_path / "nowhere", "train")
    (folder / "Sentences" / "22.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 annotation files .* missing in .*data, such as Sentences/22\.txt"):
        load_flickr30k_entities(folder, "train")
    (folder / "Annotations").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"expected annotations\.zip or the folders Annotations and Sentences"):
        load_flickr30k_entities(folder, "train")


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match="splits train, validation, test, not 'testA'"):
        load_flickr30k_entities(folder, "testA")
    with pytest.raises(ValueError, match='missing_images must be "error", "skip" or "keep", not \'ignore\''):
        load_flickr30k_entities(folder, "train", missing_images="ignore")


# The real files


def reference_rows(archive: zipfile.ZipFile, image_id: str) -> list[tuple[str, list[float]]]:
    """Expressions and boxes read a second time, character by character and object by object."""
    root = ElementTree.fromstring(archive.read(f"Annotations/{image_id}.xml"))
    found = []
    for line in archive.read(f"Sentences/{image_id}.txt").decode().splitlines():
        for part in line.split("[/EN#")[1:]:
            mark, _, words = part.partition("]")[0].partition(" ")
            corners = [
                [int(box.find(tag).text) for tag in ("xmin", "ymin", "xmax", "ymax")]
                for element in root.findall("object")
                if mark.split("/")[0] in [name.text for name in element.findall("name")]
                for box in element.findall("bndbox")
            ]
            if corners:
                low = [min(c[i] for c in corners) - 1 for i in (0, 1)]
                found.append((words, low + [max(c[i] for c in corners) for i in (2, 3)]))
    return found


@pytest.mark.skipif(not (REAL_DATA / "flickr30k_entities").is_dir(), reason="needs the real Flickr30K Entities")
@pytest.mark.parametrize(("missing_images", "num_rows"), [("keep", 14_433), ("skip", 3_239)])
def test_real_validation_split(missing_images, num_rows):
    dataset = load_flickr30k_entities(REAL_DATA / "flickr30k_entities", "validation", missing_images)
    assert len(dataset) == num_rows
    expected = []
    with zipfile.ZipFile(REAL_DATA / "flickr30k_entities" / "annotations.zip") as archive:
        for image_id in (REAL_DATA / "flickr30k_entities" / "val.txt").read_text().split():
            path = REAL_DATA / "flickr30k_entities" / "flickr30k_images" / f"{image_id}.jpg"
            if path.exists():
                size = ElementTree.fromstring(archive.read(f"Annotations/{image_id}.xml")).find("size")
                with Image.open(path) as image:
                    scale = [image.width / int(size.find("width").text), image.height / int(size.find("height").text)]
            elif missing_images == "skip":
                continue
            else:
                scale = [1, 1]
            for words, box in reference_rows(archive, image_id):
                expected.append(
                    (image_id, words, [pytest.approx(c * s, rel=1e-6) for c, s in zip(box, scale * 2, strict=True)])
                )
    assert list(zip(dataset["image_id"], dataset["expression"], dataset["box"], strict=True)) == expected
