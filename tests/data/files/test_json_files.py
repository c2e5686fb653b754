"""Tests of reading JSON files of unknown origin."""

import re

import pytest

from epmvg_hf.data.files.json_files import read_json


@pytest.mark.parametrize("content", ['{"a": ["\u2615", 1.5]}', '\ufeff{"a": ["\\u2615", 1.5]}\n'])
def test_content(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert read_json(tmp_path / "a.json", 100) == {"a": ["\u2615", 1.5]}


def test_what_is_parsed_may_be_edited(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": 1, "a": 2}')
    found = read_json(tmp_path / "a.json", 100, lambda content: content.replace(b"2", b"3"), tuple)
    assert found == (("a", 1), ("a", 3))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"1 2", b"\xff", '{"a": 1}'.encode("utf-16"), b"[" * 100_000, b"9" * 5_000], ids=len
)
def test_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/a.json cannot be read as UTF-8 JSON: "):
        read_json(tmp_path / "a.json", 2**20)


def test_too_large(tmp_path):
    (tmp_path / "a.json").write_text("[" + " " * 2_000 + "]")
    with pytest.raises(ValueError, match=r"a\.json has 2,002 bytes, expected at most 2,001\."):
        read_json(tmp_path / "a.json", 2_001)
    assert read_json(tmp_path / "a.json", 2_002) == []
