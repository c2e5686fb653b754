"""Tests of finding image files by name, and of reading the sizes of files that may be damaged or hostile."""

import hashlib
import os
import re
import struct
import zlib
from pathlib import Path

import datasets
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from epmvg_hf.data.files import image_files
from epmvg_hf.data.files.image_files import ImageFolders, ImageRoot, file_statuses, list_files, measure_image

FORMATS = ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"]

UPWARDS = ["../secret.jpg", "deep/../../secret.jpg", "deep/..", "..\\secret.jpg", "deep\\..\\a.jpg"]
ABSOLUTE = ["/a.jpg", "//a.jpg", "\\a.jpg", "\\\\server\\share\\a.jpg", "C:\\a.jpg", "c:/a.jpg", "C:a.jpg", "C:"]
EMPTY = ["", ".", "./"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def draw(path: Path, size: tuple[int, int] = (40, 20), **options) -> Path:
    """Noise, which no format can store in a few bytes, but the same each time."""
    pixels = hashlib.shake_128(b"noise").digest(3 * size[0] * size[1])
    Image.frombytes("RGB", size, pixels).save(path, **options)
    return path


def draw_oriented(path: Path, orientation: int, **options) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return draw(path, exif=exif, **options)


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"".join([SIGNATURE, header, *chunks, chunk(b"IEND")])


def decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:
        return False
    return True


def measures(path: Path) -> bool:
    try:
        measure_image(str(path))
    except ValueError:
        return False
    return True


# Finding


@pytest.fixture
def root(tmp_path) -> ImageRoot:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("images/a.jpg", "images/deep/b.jpg", "secret.jpg"):
        draw(tmp_path / name)
    return ImageRoot(tmp_path / "images")


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "deep/b.jpg", "deep//b.jpg", "deep\\b.jpg"])
def test_relative_paths_are_found(root, name):
    assert root.find(name) == str(root.root / name.replace("\\", "/").replace("//", "/"))


@pytest.mark.parametrize("name", ["A.jpg", "b.jpg", "deep", "deep/", "a.jpg/b", "~/a.jpg", "a\ud800.jpg"])
def test_other_paths_are_not(root, name):
    assert root.find(name) is None


@pytest.mark.parametrize("name", [*UPWARDS, *ABSOLUTE, *EMPTY, "a.jpg\0", "\0"])
def test_no_name_leads_out_of_the_folder(root, name):
    with pytest.raises(ValueError, match=r"is not a path within .*images, expected a relative one"):
        root.find(name)
    assert ImageFolders([root.root]).find(name) is None


def test_no_absolute_name_is_taken_even_if_within_the_folder(root):
    with pytest.raises(ValueError, match="is not a path within"):
        root.find(str(root.root / "a.jpg"))


def test_too_long_names(root):
    with pytest.raises(ValueError, match=r"the image 'aaa.* cannot be looked for: File name too long") as error:
        root.find("a" * 5000)
    assert len(str(error.value)) < 300


def test_folders_have_files_by_exact_name(root, tmp_path):
    folders = ImageFolders([tmp_path / "nowhere", root.root, tmp_path])
    assert folders.find("a.jpg") == str(root.root / "a.jpg")
    assert folders.find("secret.jpg") == str(tmp_path / "secret.jpg")
    assert [folders.find(name) for name in ("deep", "deep/b.jpg", "images/a.jpg")] == [None] * 3
    assert folders.describe() == f"{tmp_path}/nowhere, {root.root} and {tmp_path}"
    assert ImageFolders([root.root]).describe() == root.describe() == str(root.root)


def test_first_folder_counts(root, tmp_path):
    draw(tmp_path / "a.jpg")
    assert ImageFolders([root.root, tmp_path]).find("a.jpg") == str(root.root / "a.jpg")
    assert ImageFolders([tmp_path, root.root]).find("a.jpg") == str(tmp_path / "a.jpg")


def test_symlinked_files_and_folders(root, tmp_path):
    (root.root / "linked.jpg").symlink_to(tmp_path / "secret.jpg")
    (root.root / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "link").symlink_to(root.root)
    for images in (root, ImageFolders([root.root]), ImageRoot(tmp_path / "link"), ImageFolders([tmp_path / "link"])):
        assert measure_image(images.find("linked.jpg")) == (40, 20)
        assert images.find("broken.jpg") is None


def test_file_statuses(root, tmp_path):
    paths = [root.find("a.jpg"), root.find("deep/b.jpg")]
    before = file_statuses(paths)
    assert file_statuses(reversed(paths)) == before
    assert file_statuses(paths[:1]) != before
    os.utime(paths[0], ns=(0, 5))
    touched = file_statuses(paths)
    draw(Path(paths[1]), (41, 20))
    assert len({before, touched, file_statuses(paths)}) == 3


# Measuring


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", [False, True])
def test_size(tmp_path, kind, orientation):
    assert measure_image(str(draw(tmp_path / f"a.{kind}")), orientation) == (40, 20)


def test_format_is_not_taken_from_the_name(tmp_path):
    assert measure_image(str(draw(tmp_path / "a.jpg", format="png"))) == (40, 20)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_photos_are_not_decoded(tmp_path, monkeypatch, kind):
    path = draw(tmp_path / f"a.{kind}")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert measure_image(str(path)) == (40, 20)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_body(tmp_path, kind):
    path = draw(tmp_path / f"a.{kind}")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(ValueError, match=rf"a\.{kind} (cannot be decoded to its end|has no readable image header)"):
        measure_image(str(path))


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_ends_anywhere_is_accepted_if_it_decodes(tmp_path, kind, progressive):
    path = draw_oriented(tmp_path / f"a.{kind}", 1, progressive=progressive)
    data = path.read_bytes()
    accepted = set()
    for end in [*range(0, len(data), 97), *range(len(data) - 20, len(data) + 1)]:
        for rest in (b"", bytes(20), b"\n", b"noise"):
            path.write_bytes(data[:end] + rest)
            assert measures(path) == decodes(path), (end, rest)
            accepted.add(measures(path))
    assert accepted == {False, True}


@pytest.mark.parametrize("rest", [b"\0", bytes(100), b"\n", b"\r\n", b"comment", b"\xff\xd8\xff" + bytes(40)])
def test_bytes_behind_the_end(tmp_path, rest):
    for kind in ("jpeg", "png", "gif"):
        path = draw(tmp_path / f"a.{kind}")
        path.write_bytes(path.read_bytes() + rest)
        assert measure_image(str(path)) == (40, 20)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xd8", b"GIF89a", SIGNATURE, b"PK\3\4", b"<html>", b"<svg/>"])
def test_no_image(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jpg has no readable image header: .*expected that of JPEG, PNG, WEBP"):
        measure_image(str(path))


def test_postscript_is_no_image(tmp_path):
    path = draw(tmp_path / "a.jpg", format="eps")  # Pillow decodes it with another program
    with pytest.raises(ValueError, match=r"a\.jpg has no readable image header"):
        measure_image(str(path))


def test_file_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpg has no readable image header: .*No such file"):
        measure_image(str(tmp_path / "a.jpg"))


# Decompression bombs


def test_claimed_size_beyond_what_pillow_opens(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(100)))))
    with pytest.raises(ValueError, match=r"a\.png is refused: Image size \(3600000000 pixels\) exceeds limit"):
        measure_image(str(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_claimed_size_beyond_what_is_accepted(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png(10_000, 10_000, chunk(b"IDAT")))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)  # nor is EXIF looked for before
    with pytest.raises(ValueError, match=r"a\.png has 10000 x 10000 pixels, more than the 89,478,485 accepted"):
        measure_image(str(path))


@pytest.mark.parametrize("kind", FORMATS)
def test_limit(tmp_path, monkeypatch, kind):
    path = draw(tmp_path / f"a.{kind}")
    monkeypatch.setattr(image_files, "MAX_IMAGE_PIXELS", 800)
    assert measure_image(str(path)) == (40, 20)
    monkeypatch.setattr(image_files, "MAX_IMAGE_PIXELS", 799)
    with pytest.raises(ValueError, match="has 40 x 20 pixels, more than the 799 accepted"):
        measure_image(str(path))


# EXIF orientation


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_row(tmp_path, kind, orientation):
    path = str(draw_oriented(tmp_path / f"a.{kind}", orientation))
    decoded = datasets.Image().decode_example({"path": path, "bytes": None})
    assert decoded.size == ((20, 40) if orientation >= 5 else (40, 20))
    assert measure_image(path, exif_oriented=True) == decoded.size
    if orientation == 1:
        assert measure_image(path) == (40, 20)
    else:
        message = f"a.{kind} has EXIF orientation {orientation}, expected an image stored upright"
        with pytest.raises(ValueError, match=re.escape(message)):
            measure_image(path)


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    path = draw_oriented(tmp_path / "a.png", 6)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert datasets.Image().decode_example({"path": str(path), "bytes": None}).size == (20, 40)
    assert measure_image(str(path), exif_oriented=True) == (20, 40)
    with pytest.raises(ValueError, match="EXIF orientation 6"):
        measure_image(str(path))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_without_meaning(tmp_path, orientation):
    path = str(draw_oriented(tmp_path / "a.jpg", orientation))
    assert measure_image(path) == measure_image(path, exif_oriented=True) == (40, 20)


def test_links_that_lead_nowhere_are_no_files(tmp_path):
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.jpg").symlink_to("elsewhere.jpg")
    (tmp_path / "there.jpg").touch()
    (tmp_path / "link.jpg").symlink_to("there.jpg")
    assert sorted(list_files(tmp_path)) == ["link.jpg", "there.jpg"]
    assert ImageRoot(tmp_path).find("loop.jpg") is None
