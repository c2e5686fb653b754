"""Progress bars are for terminals, and the user's settings of them stay as they are."""

import io
import sys

import datasets
import pytest

from epmvg_hf import load_grounding_dataset
from tests.fixtures.own_rows import write_images

BARS = sys.modules["datasets.utils.tqdm"]  # as an attribute, the name means the class in the module


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["shapes", "custom"])
def prepare(request, tmp_path):
    """Prepares rows anew."""
    if request.param == "shapes":
        return lambda: load_grounding_dataset("shapes", num_images=3, cache_dir=str(tmp_path / "cache"))
    folder = write_images(tmp_path / "data")
    (folder / "train.csv").write_text("image,expression,box\na.png,a dog,1 2 3 4\n")
    return lambda: load_grounding_dataset("custom", folder, box_format="xyxy", cache_dir=str(tmp_path / "cache"))


def test_a_log_file_gets_no_bars(prepare, capfd):
    assert not datasets.are_progress_bars_disabled()
    prepare()
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_a_terminal_gets_bars(prepare, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    prepare()
    assert "Generating train split" in sys.stderr.getvalue()


def test_bars_stay_off_where_a_user_turned_them_off(prepare, monkeypatch):
    monkeypatch.setattr(BARS, "_hf_datasets_progress_bars_disabled", True)
    monkeypatch.setattr(sys, "stderr", Terminal())
    prepare()
    assert sys.stderr.getvalue() == "" and datasets.are_progress_bars_disabled()


def test_bars_are_written_to_files_where_the_variable_says_so(prepare, monkeypatch, recwarn):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setattr(BARS, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    prepare()
    assert "Generating train split" in sys.stderr.getvalue() and not recwarn


def test_bars_come_back_after_an_error(tmp_path):
    folder = write_images(tmp_path / "data")
    (folder / "train.csv").write_text("image,expression,box\na.png,,1 2 3 4\n")
    with pytest.raises(ValueError, match="expected words"):
        load_grounding_dataset("custom", folder, box_format="xyxy", cache_dir=str(tmp_path / "cache"))
    assert not datasets.are_progress_bars_disabled()
