import zipfile

import pytest
import torch

from epmvg_hf.model.convert_transvg import read_transvg_checkpoint
from epmvg_hf.model.weight_files import check_unpacked_size


def _compress(path, target):
    """The same archive with compressed parts."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))


def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    torch.save({"model": {"weight": torch.zeros(5_000_000)}}, tmp_path / "whole.pth")
    check_unpacked_size(tmp_path / "whole.pth")
    _compress(tmp_path / "whole.pth", tmp_path / "bomb.pth")
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"bomb\.pth is not loaded: its [0-9,]+ bytes unpack to 20,000,"):
        read_transvg_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_other_files_are_left_to_torch(tmp_path, content):
    (tmp_path / "file.pth").write_bytes(content)
    check_unpacked_size(tmp_path / "file.pth")
