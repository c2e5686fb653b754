"""Tests of writing folders of images; reading is tested with the columns of the Hub, in test_hub_parquet."""

import pytest

from epmvg_hf.data.files.parquet_files import write_image_files

IMAGES = [("a.jpg", b"one"), ("b.jpg", b"two")]


def fail_after_the_first():
    yield IMAGES[0]
    raise OSError("disk full")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write_image_files(tmp_path / "images", fail_after_the_first(), 6)
    with pytest.raises(ValueError, match=r"the images up to b\.jpg have 6 bytes, expected at most 5"):
        write_image_files(tmp_path / "images", IMAGES, 5)
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # the second time is as a process that was slower
        write_image_files(tmp_path / "images", IMAGES, 6)
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
        assert {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()} == dict(IMAGES)
