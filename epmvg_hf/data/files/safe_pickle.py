"""
Reads pickles of unknown origin without executing anything in them.

Some annotation files of visual grounding exist only as pickles: `refs(<split_by>).p` of the refer API
(lichengunc/refer on GitHub), written by Python 2, and the `.pth` index files of TransVG (djiajunustc/TransVG), which
are lists of tuples written by `torch.save`.

A pickle can call any object that Python can import, which is what makes it dangerous. The only way to get hold of
such an object is [`pickle.Unpickler.find_class`], so the unpickler below never imports anything: it knows the few
names with which NumPy writes numbers, and answers each of them with a harmless stand-in of this module.

Both kinds of files go through this one unpickler. `torch.load(weights_only=True)` makes the same promise, but it is
written in Python and takes more than four times as long (23 s against 5 s for the 427,226 rows of Flickr30K's training
index), it rejects Python-2 strings of more than 255 bytes, and before torch 2.10, which this package does not require,
a crafted file could corrupt memory through it (CVE-2026-24747).
"""

import codecs
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_BYTES = 2**30

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch.save's older format
_EXPECTED = "expected only lists, tuples, dicts, sets, strings, bytes, None and numbers"


def read_pickle(path: str | os.PathLike) -> Any:
    """
    Reads one pickle, such as `refs(unc).p` of the refer API.

    Args:
        path (`str` or `os.PathLike`): A pickle of any protocol, written by Python 2 or 3.

    Returns:
        Plain data: lists, tuples, dicts, sets, strings, bytes, numbers, booleans and `None`. NumPy arrays of numbers
        come out as lists, NumPy numbers as floats. A string of Python 2 is read as UTF-8, and from the first byte
        that is not valid UTF-8 on as Latin-1.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file has more than 1 GiB, is not an intact pickle, or asks for any object besides plain
            data. The message names the file and the object, which was neither imported nor called.

    Example:

    ```python
    >>> from epmvg_hf.data.files.safe_pickle import read_pickle

    >>> refs = read_pickle("refer/data/refcoco/refs(unc).p")
    >>> sorted(refs[0])
    ['ann_id', 'category_id', 'file_name', 'image_id', 'ref_id', 'sent_ids', 'sentences', 'split']
    ```
    """
    return _read(Path(path), _load)


def read_torch_file(path: str | os.PathLike) -> Any:
    """
    Reads plain data that `torch.save` wrote, such as an index file of TransVG.

    Args:
        path (`str` or `os.PathLike`): A file in torch's zip format or in its older one, a sequence of pickles.

    Returns:
        The saved object, made of what [`read_pickle`] can read.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file has more than 1 GiB, is not an intact file of `torch.save`, or holds tensors or
            anything else that is not plain data. The message names the file and what it asked for.

    Example:

    ```python
    >>> from epmvg_hf.data.files.safe_pickle import read_torch_file

    >>> rows = read_torch_file("index/unc/unc_val.pth")
    >>> rows[0][:4]
    ('COCO_train2014_000000000042.jpg', '482127.pth', [30.58, 9.03, 29.29, 42.79], 'guy on the right')
    ```
    """
    return _read(Path(path), _load_torch)


class _RefusedError(ValueError):
    """A reason to refuse a file, worded to continue a sentence that begins with the file's name."""


def _read(path: Path, load: Callable[[IO[bytes]], Any]) -> Any:
    """Loads a file with `load`. Any problem becomes a `ValueError` of one sentence with the file's name."""
    if not path.is_file():
        raise FileNotFoundError(f"No file {path.name} in {path.parent}.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MAX_BYTES:,}.")
    with path.open("rb") as file:
        try:
            _refuse_other_files(file.read(200))
            file.seek(0)
            return load(file)
        except _RefusedError as error:
            raise ValueError(f"{path} {error}.") from None
        except Exception as error:  # a damaged pickle can raise nearly every kind, RecursionError and MemoryError too
            reason = f"{type(error).__name__}: {error}"[:200].removesuffix(": ")
            raise ValueError(f"{path} cannot be read as a pickle of plain data ({reason}).") from error


def _refuse_other_files(head: bytes) -> None:
    """Refuses the two kinds of files that people often download by mistake in place of the one they want."""
    if re.match(rb"\s*(<!doctype|<html|<\?xml)", head, re.IGNORECASE):
        raise _RefusedError("is a web page, not a pickle: download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise _RefusedError("is a Git LFS pointer, not the file it points to: fetch that with `git lfs pull`")


def _load_torch(file: IO[bytes]) -> Any:
    if file.read(2) == b"PK":
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
            # torch.save never compresses, so that what is unpacked here is no larger than the file.
            if len(members) != 1 or members[0].compress_type != zipfile.ZIP_STORED:
                raise _RefusedError("is not a zip of torch.save, expected one uncompressed member <name>/data.pkl")
            with archive.open(members[0]) as member:
                return _load(member)
    file.seek(0)
    magic, _protocol, _system, value = (_load(file) for _ in range(4))
    if magic != _TORCH_MAGIC:
        raise _RefusedError("is not a file of torch.save, expected its magic number at the beginning")
    return value


def _load(file: IO[bytes]) -> Any:
    return _PlainUnpickler(file, encoding="utf-8", errors="epmvg_hf.latin1").load()


def _decode_latin1(error: UnicodeError) -> tuple[str, int]:
    """Decodes the rest of a Python-2 string, which does not say in which encoding it is."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start :].decode("latin1"), len(error.object)


codecs.register_error("epmvg_hf.latin1", _decode_latin1)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # The name is only compared, never resolved, even if it has dots, such as "system.__call__".
        full_name = f"{module}.{name}"
        if full_name not in _STAND_INS:
            tensors = "holds tensors and " if module.partition(".")[0] == "torch" else ""
            shown_name = ascii(full_name[:80])[1:-1]
            raise _RefusedError(f"{tensors}asks for the global {shown_name}, {_EXPECTED}; nothing in it was executed")
        return _STAND_INS[full_name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"refers to data outside of its pickle, such as tensors, {_EXPECTED}")


# A pickle may call each stand-in with any arguments, and set the state of the stand-in itself. NumPy's own objects
# would be dangerous here: NumPy trusts the state of a dtype or an object array, and a crafted state makes it read and
# write memory that it does not own. The classes below define __setstate__ because pickle sets attributes where that is
# missing.


class _Dtype:
    """A type of numbers: `numpy.dtype(code, False, True)`, whose byte order is its state."""

    def __init__(self, code: Any, *_: Any):
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def read(self, raw: Any) -> np.ndarray:
        """The numbers in some bytes. Booleans, objects, texts and records are refused."""
        if not re.fullmatch("[<>=|]([iu][1248]|f[248])", self.order + self.code):
            raise _RefusedError(f"has NumPy data of the type {self.code!r:.80}, expected integers or floats")
        return np.frombuffer(raw, self.order + self.code)


class _Array(list):
    """The numbers of an array, which is created empty and then given its state."""

    def __init__(self, *_: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, raw = state
        numbers = dtype.read(raw)
        if numbers.size:  # a shape such as (10**9, 0) needs no bytes, but would make 10**9 empty lists
            self[:] = numbers.reshape(shape, order="F" if is_fortran else "C").tolist()


class _Number(float):
    """A NumPy scalar."""

    def __new__(cls, dtype: Any, raw: Any) -> "_Number":
        return super().__new__(cls, dtype.read(raw)[0])

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("sets the state of a number")


_STAND_INS = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": str.encode,  # how bytes are written at the protocols 0 to 2; unlike the original, text only
}
for _package in ("numpy.core", "numpy._core"):  # NumPy before and since 2.0
    _STAND_INS[f"{_package}.multiarray._reconstruct"] = _Array
    _STAND_INS[f"{_package}.multiarray.scalar"] = _Number
