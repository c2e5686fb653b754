"""Tests of writing the images of parquet files; reading is tested with the columns of the Hub, in test_hub_parquet."""

from pathlib import Path

import pytest

from epmvg_hf.data.files.parquet_files import write_file


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    write_file(path, b"one")
    write_file(path, b"two")  # as a second process at the same time
    assert [each.name for each in tmp_path.iterdir()] == ["a.jpg"] and path.read_bytes() == b"two"

    def fail(self, content):
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "b.jpg", b"three")
    assert [each.name for each in tmp_path.iterdir()] == ["a.jpg"]
