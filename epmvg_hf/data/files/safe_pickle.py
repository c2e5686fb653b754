"""
Reads pickles of unknown origin without executing anything in them.

Some annotation files of visual grounding exist only as pickles: `refs(<split_by>).p` of the refer API
(lichengunc/refer on GitHub), written by Python 2, and the `.pth` index files of TransVG (djiajunustc/TransVG), which
are lists of tuples written by `torch.save`.

A pickle is a program: instructions for a small machine with a stack. There are three ways to attack with it.

* It can call any object that Python can import, which is what makes pickles dangerous. The only way to get hold of
  such an object is [`pickle.Unpickler.find_class`], so the unpickler below never imports anything: it knows the few
  names with which NumPy writes numbers, and answers each of them with a harmless stand-in of this module.
* It can end the process in a way that no `except` catches. Hashing a tuple in a tuple in a tuple, a million levels
  deep, overflows the stack of C. So keys of dicts and members of sets are checked before they are hashed.
* It can take all memory with few bytes. Storing one value under the number 150 million makes the standard library's
  unpickler in C allocate a list of that length, and one string of bytes can be made into many arrays. So the
  unpickler below keeps stored values in a dict, and what its stand-ins make is bounded by the size of the file. So is
  what a file would be if each value was written out wherever it stands, since that is what rows are made of.

The last two need a say in single instructions, which only the standard library's unpickler in Python allows,
`pickle._Unpickler`. Its name has an underscore, but the alternative is no better: to go through a file with
`pickletools.genops` and then read it with the unpickler in C takes as long, is safe only if both understand every byte
alike, and `genops` fails at strings of protocol 0 that are not ASCII.

`torch.load(weights_only=True)` is no alternative: it rejects Python-2 strings of more than 255 bytes, and before torch
2.10, which this package does not require, a crafted file could corrupt memory through it (CVE-2026-24747).
"""

import codecs
import io
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 2**30

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch.save's older format
_UNPACKS_TO_MORE = "unpacks to far more than its own size, as only files made to exhaust the memory do"
_ALWAYS_ALLOWED = 1 << 22  # values and characters, whatever the size of the file
_EXPECTED = "expected only lists, tuples, dicts, sets, strings, bytes, None and numbers"


def read_pickle(path: str | os.PathLike) -> Any:
    """
    Reads one pickle, such as `refs(unc).p` of the refer API.

    Args:
        path (`str` or `os.PathLike`): A pickle of any protocol, written by Python 2 or 3.

    Returns:
        Plain data: lists, tuples, dicts, sets, strings, bytes, numbers, booleans and `None`. NumPy arrays of numbers
        come out as lists, NumPy numbers as floats. Keys of dicts and members of sets are strings, bytes, numbers,
        booleans, `None` or tuples of these. A string of Python 2 is read as UTF-8, and from the first byte
        that is not valid UTF-8 on as Latin-1.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file has more than 1 GiB, is not an intact pickle, asks for any object besides plain data,
            or would unpack to far more than its own size. The message names the file and the object, which was
            neither imported nor called.

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
        `ValueError`: The file has more than 1 GiB, is not an intact file of `torch.save`, holds tensors or anything
            else that is not plain data, or would unpack to far more than its own size. The message names the file
            and what it asked for.

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


def _read(path: Path, load: Callable[[io.BytesIO], Any]) -> Any:
    """Loads a file with `load`. Any problem becomes a `ValueError` of one sentence with the file's name."""
    if not path.is_file():
        raise FileNotFoundError(f"No file {path.name} in {path.parent}.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MAX_BYTES:,}.")
    # In memory, because a file on disk would reserve as many bytes as an instruction claims to be followed by.
    content = path.read_bytes()
    try:
        _refuse_other_files(content[:200])
        return load(io.BytesIO(content))
    except _RefusedError as error:
        raise ValueError(f"{path} {error}.") from None
    except EOFError:
        raise ValueError(f"{path} ends before its pickle does: it is empty or was cut off.") from None
    except Exception as error:  # a damaged pickle can raise nearly every kind, RecursionError and MemoryError too
        reason = f"{type(error).__name__}: {error}"[:200].removesuffix(": ")
        raise ValueError(f"{path} cannot be read as a pickle of plain data ({reason}).") from error


def _refuse_other_files(head: bytes) -> None:
    """Refuses the two kinds of files that people often download by mistake in place of the one they want."""
    # No pickle begins with the byte order mark of a text, with white space or with "<". The zeros are those of UTF-16.
    if re.match(rb"(\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\0]*<", head):
        raise _RefusedError("is a web page, not a pickle: download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise _RefusedError("is a Git LFS pointer, not the file it points to: fetch that with `git lfs pull`")


def _load_torch(file: io.BytesIO) -> Any:
    if file.getvalue().startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
            # torch.save never compresses, so that what is unpacked here is no larger than the file.
            if len(members) != 1 or members[0].compress_type != zipfile.ZIP_STORED:
                raise _RefusedError("is not a zip of torch.save, expected one uncompressed member <name>/data.pkl")
            return _load(io.BytesIO(archive.read(members[0])))
    if _load(file) != _TORCH_MAGIC:
        raise _RefusedError("is a pickle, but not of torch.save, expected torch's magic number at the beginning")
    _protocol, _system, value = (_load(file) for _ in range(3))
    return value


def _load(file: io.BytesIO) -> Any:
    unpickler = _PlainUnpickler(file)
    value = unpickler.load()
    if _written_out(value, {}) > max(_ALWAYS_ALLOWED, 8 * len(file.getvalue())):
        raise _RefusedError(_UNPACKS_TO_MORE)
    return value


def _written_out(value: Any, known: dict[int, int | None], depth: int = 0) -> int:
    """
    How many values there are in a value, and characters in its texts, where what stands in several places counts each
    time: a list of a thousand references to a list of a thousand references takes few bytes, and as rows a million.
    """
    if isinstance(value, str | bytes):
        return 1 + len(value)
    if not isinstance(value, list | tuple | dict | set | frozenset):
        return 1
    if id(value) not in known:
        if depth > 100:
            raise _RefusedError("has values that lie more than 100 deep in others, expected rows")
        known[id(value)] = None  # until its members are counted
        members, keys = (value.values(), len(value)) if isinstance(value, dict) else (value, 0)
        known[id(value)] = 1 + keys + sum(_written_out(member, known, depth + 1) for member in members)
    count = known[id(value)]
    if count is None:
        raise _RefusedError("has a value that contains itself, expected plain data")
    return count


def _decode_latin1(error: UnicodeError) -> tuple[str, int]:
    """Decodes the rest of a Python-2 string, which does not say in which encoding it is."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start :].decode("latin1"), len(error.object)


codecs.register_error("epmvg_hf.latin1", _decode_latin1)


# Stand-ins for what NumPy's pickles ask for, which a file may call with any arguments. NumPy's own objects would be
# dangerous here: NumPy trusts the state of a dtype or an object array, and a crafted state makes it read and write
# memory that it does not own.


class _Dtype:
    """A type of numbers: `numpy.dtype(code, False, True)`, whose byte order is its state."""

    def __init__(self, code: Any, *_: Any):
        self.code, self.order = code, "|"

    def read(self, raw: Any) -> np.ndarray:
        """The numbers in some bytes. Booleans, objects, texts and records are refused."""
        if not re.fullmatch("[<>=|]([iu][1248]|f[248])", self.order + self.code):
            raise _RefusedError(f"has NumPy data of the type {self.code!r:.80}, expected integers or floats")
        return np.frombuffer(raw, self.order + self.code)


def _new_array(*_: Any) -> list:
    """An array, which is created empty and then given its state."""
    return []


def _read_number(dtype: _Dtype, raw: Any) -> float:
    """A NumPy scalar."""
    return float(dtype.read(raw)[0])


def _encode(text: str, encoding: str) -> bytes:
    """Bytes at the protocols 0 to 2. Pickle writes them in this encoding only; others may import modules."""
    if encoding != "latin1":
        raise _RefusedError("has bytes in an encoding that pickle does not use, expected latin1")
    return text.encode("latin1")


_STAND_INS: dict[str, Callable] = {"numpy.ndarray": _new_array, "numpy.dtype": _Dtype, "_codecs.encode": _encode}
for _package in ("numpy.core", "numpy._core"):  # NumPy before and since 2.0
    _STAND_INS[f"{_package}.multiarray._reconstruct"] = _new_array
    _STAND_INS[f"{_package}.multiarray.scalar"] = _read_number


# The unpickler

_INSTRUCTIONS = {ord(instruction.code): instruction for instruction in pickletools.opcodes}

# Plain data needs neither these, which make instances of classes or read from the registry of `copyreg`, nor those of
# protocol 5, which are for bytes that can be changed.
_REFUSED_INSTRUCTIONS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}

_KEY_TYPES = {type(None), bool, int, float, str, bytes}


class _Dispatch(dict):
    """What the unpickler does at each instruction, by its code. Missing ones are refused."""

    def __missing__(self, code: int) -> None:
        if code not in _INSTRUCTIONS:
            raise _RefusedError(f"is not an intact pickle: it has the byte 0x{code:02x} in place of an instruction")
        name = _INSTRUCTIONS[code].name
        raise _RefusedError(f"has the pickle instruction {name}, {_EXPECTED}; nothing in it was executed")


def _with_plain_keys(load: Callable, where: slice) -> Callable:
    """An instruction that hashes the values at `where` of the stack, behind a check that this is safe."""

    def load_with_plain_keys(unpickler: "_PlainUnpickler") -> None:
        for key in unpickler.stack[where]:
            parts = key if type(key) is tuple else (key,)
            if not _KEY_TYPES.issuperset(map(type, parts)):
                raise _RefusedError(
                    "has a dict or set of more than plain data, expected only strings, bytes, numbers, None and "
                    "tuples of these as its keys or members"
                )
            # Long tuples and long numbers take long to hash, and are hashed anew at each use.
            unpickler.spend(len(parts) + sum(part.bit_length() // 64 for part in parts if type(part) is int))
        load(unpickler)

    return load_with_plain_keys


class _PlainUnpickler(pickle._Unpickler):
    stack: list[Any]  # the values since the last MARK instruction

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8", errors="epmvg_hf.latin1")
        # Of bytes, numbers and keys that the file may still make. In an honest file each of them takes a byte or more.
        self.budget = 8 * len(file.getvalue())

    def spend(self, amount: int) -> None:
        """Takes an amount of memory from what this file may still use, and refuses the file when nothing is left."""
        self.budget -= amount
        if self.budget < 0:
            raise _RefusedError(_UNPACKS_TO_MORE)

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

    def load_reduce(self) -> None:
        """Calls a stand-in, the only kind of value on the stack that can be called."""
        arguments = self.stack.pop()
        if type(arguments) is not tuple or not callable(self.stack[-1]):
            raise _RefusedError(f"calls something that is no function, {_EXPECTED}")
        result = self.stack[-1](*arguments)
        if type(result) is bytes:
            self.spend(len(result))
        self.stack[-1] = result

    def load_build(self) -> None:
        """Sets the state of a dtype or an array. In any other object, the original sets attributes."""
        state = self.stack.pop()
        if type(self.stack[-1]) is _Dtype:
            self.stack[-1].order = state[1]
        elif type(self.stack[-1]) is list:
            _version, shape, dtype, is_fortran, raw = state
            numbers = dtype.read(raw)
            self.spend(numbers.size * len(shape))  # each axis can make as many lists as there are numbers
            if numbers.size:  # a shape such as (10**9, 0) needs no bytes, but would make 10**9 empty lists
                self.stack[-1][:] = numbers.reshape(shape, order="F" if is_fortran else "C").tolist()
        else:
            raise _RefusedError(f"sets the state of something that has none, {_EXPECTED}")

    dispatch = _Dispatch(
        (code, load)
        for code, load in pickle._Unpickler.dispatch.items()
        if _INSTRUCTIONS[code].proto < 5 and _INSTRUCTIONS[code].name not in _REFUSED_INSTRUCTIONS
    )
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    for _code, _where in (
        (pickle.SETITEM, slice(-2, -1)),
        (pickle.SETITEMS, slice(0, None, 2)),
        (pickle.DICT, slice(0, None, 2)),
        (pickle.ADDITEMS, slice(None)),
        (pickle.FROZENSET, slice(None)),
    ):
        dispatch[_code[0]] = _with_plain_keys(dispatch[_code[0]], _where)
