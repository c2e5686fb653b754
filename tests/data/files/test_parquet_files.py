"""Tests of writing folders of images; reading is tested with the columns of the Hub, in test_hub_parquet."""

from pathlib import Path

import pytest

from epmvg_hf.data.files.parquet_files import has_all_images, write_image_files

IMAGES = [("a.jpg", b"one"), ("b.jpg", b"two")]


def fail_after_the_first():
    yield IMAGES[0]
    raise OSError("disk full")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jpg")}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write_image_files(tmp_path / "images", fail_after_the_first(), 6)
    with pytest.raises(ValueError, match=r"the images up to b\.jpg have 6 bytes, expected at most 5"):
        write_image_files(tmp_path / "images", IMAGES, 5)
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # the second time is as a process that was slower
        write_image_files(tmp_path / "images", IMAGES, 6)
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
        assert contents(tmp_path / "images") == dict(IMAGES)


def test_a_folder_gets_the_images_that_it_lacks(tmp_path):
    folder = tmp_path / "images"
    assert not has_all_images(folder)
    write_image_files(folder, IMAGES, 6)
    for path in list(folder.iterdir()):
        assert has_all_images(folder)
        path.unlink()
        before = {kept: kept.stat().st_ino for kept in folder.iterdir()}
        assert not has_all_images(folder)
        write_image_files(folder, IMAGES, 6)
        assert contents(folder) == dict(IMAGES)
        assert before.items() <= {kept: kept.stat().st_ino for kept in folder.iterdir()}.items()
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
