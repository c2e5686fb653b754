"""Reads pickles of unknown origin: plain data and NumPy arrays of numbers come out, anything else is refused unrun.

For the annotation files of visual grounding that only exist as pickles: `refs(<split_by>).p` of the refer API
(https://github.com/lichengunc/refer), written by Python 2, and the `.pth` index files of TransVG
(https://github.com/djiajunustc/TransVG), which are lists of tuples written by `torch.save`.

A pickle is a program whose instructions may call any importable object. Here it runs on the standard library's
machine reduced to the instructions that plain data needs. Each global it names is looked up in a table of stand-ins
of our own, never imported; only a stand-in is ever called, and no object is given attributes or a state.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

MAX_BYTES = 2**30  # of a file, and of the pickle unpacked from one
MAX_DIMENSIONS = 32

TORCH_MAGIC, TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the legacy container
ZIP_MAGIC = b"PK\x03\x04"

DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
DTYPE_STATE = (None, None, None, -1, -1, 0)  # no sub-array, field names, fields; default sizes and flags
SCALARS = {type(None), bool, int, float, str, bytes, bytearray, *(np.dtype(code).type for code in DTYPES)}
CONTAINERS = {list, tuple, dict, set, frozenset}
EXPECTED = "expected only lists, tuples, dicts, sets, None, booleans, numbers, strings, bytes and NumPy numbers"

# Left out are those that make or find objects in other ways (INST, OBJ, NEWOBJ, EXT1, NEXT_BUFFER, ...), and DUP,
# which no pickler writes.
INSTRUCTIONS = """
    PROTO FRAME MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT EMPTY_SET GET BINGET LONG_BINGET
    PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID
"""
CODES = [getattr(pickle, name)[0] for name in INSTRUCTIONS.split()]


def read_pickle(path: str | os.PathLike) -> Any:
    """
    Reads a pickle that may be hostile, such as `refs(unc).p` of the refer API.

    Args:
        path (`str` or `os.PathLike`): A file with one pickle of any protocol from 0 to 5, written by Python 2 or 3.

    Returns:
        What `pickle.load` gives, if that is made of lists, tuples, dicts, sets, `None`, booleans, numbers, strings,
        bytes, and NumPy arrays and scalars of booleans, integers and floats. Keys of dicts and members of sets can be
        strings, bytes, numbers, `None` and flat tuples of these. Arrays are given in the byte order of this machine. A
        string of Python 2 is taken as UTF-8 or, where it is not valid UTF-8, as Latin-1 (`pickle.load` can only be
        told one encoding for all).

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file is not one intact pickle, has more than 1 GiB, or wants anything but plain data. The
            message names the file and what it wants, of which nothing was run.

    Example:

    ```python
    >>> from epmvg_hf.data.files.safe_pickle import read_pickle

    >>> refs = read_pickle("refer/data/refcoco/refs(unc).p")
    >>> sorted(refs[0])
    ['ann_id', 'category_id', 'file_name', 'image_id', 'ref_id', 'sent_ids', 'sentences', 'split']
    ```
    """
    data = read_file(path)
    with one_error(path):
        stream = io.BytesIO(data)
        value = load(stream)
        check_end(stream)
    return value


def read_torch_file(path: str | os.PathLike) -> Any:
    """
    Reads plain data saved by `torch.save` from a file that may be hostile, such as an index file of TransVG.

    Args:
        path (`str` or `os.PathLike`): A file in torch's zip container or its legacy one (five pickles in a row).

    Returns:
        The saved object, made of what [`read_pickle`] can read. There are no tensors in it.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file is not an intact torch file, has more than 1 GiB, or holds tensors or anything else but
            plain data. The message names the file and what it wants, of which nothing was run.

    Example:

    ```python
    >>> from epmvg_hf.data.files.safe_pickle import read_torch_file

    >>> rows = read_torch_file("index/unc/unc_val.pth")
    >>> rows[0][:4]
    ('COCO_train2014_000000000042.jpg', '482127.pth', [30.58, 9.03, 29.29, 42.79], 'guy on the right')
    ```
    """
    data = read_file(path)
    with one_error(path):
        if data.startswith(ZIP_MAGIC):
            stream = io.BytesIO(read_zip_member(data))
            value = load(stream)
        else:
            stream = io.BytesIO(data)
            if load(stream) != TORCH_MAGIC or load(stream) != TORCH_PROTOCOL:
                raise RefusedError("does not begin with torch's magic number and protocol, expected both")
            _system, value, storage_keys = load(stream), load(stream), load(stream)
            if type(storage_keys) is not list or storage_keys:
                raise RefusedError(f"holds tensors, {EXPECTED}")
        check_end(stream)
    return value


class RefusedError(ValueError):
    """Says what is wrong with a file in words that follow its name."""


@contextmanager
def one_error(path: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong with a file becomes a `ValueError` of one sentence with its name."""
    try:
        yield
    except RefusedError as error:
        raise ValueError(f"{path} {error}.") from None
    except Exception as error:  # broken and hostile files raise nearly every kind
        reason = f"{type(error).__name__}: {error}"[:200].removesuffix(": ")
        raise ValueError(f"{path} cannot be read as a pickle of plain data ({reason}).") from error


def read_file(path: str | os.PathLike) -> bytes:
    """The content of a file; a `FileNotFoundError` without one, a `ValueError` if it is larger than `MAX_BYTES`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path.name} in {path.parent}.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MAX_BYTES:,}.")
    return path.read_bytes()


def read_zip_member(data: bytes) -> bytes:
    """The pickle in torch's zip container. Its other members are about tensors."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise RefusedError(f"holds a TorchScript program (constants.pkl), {EXPECTED}")
        if len(members) != 1:
            raise RefusedError(f"has {len(members)} members <name>/data.pkl, expected one")
        size = members[0].file_size
        if size > MAX_BYTES:
            raise RefusedError(f"has a data.pkl of {size:,} bytes, expected at most {MAX_BYTES:,}")
        if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without bound
            raise RefusedError("has a data.pkl that is neither stored nor deflated")
        with archive.open(members[0]) as file:
            content = file.read(size + 1)
    if len(content) != size:
        raise RefusedError(f"has a data.pkl of {len(content):,} bytes, expected {size:,}")
    return content


def load(stream: io.BytesIO) -> Any:
    """The value of the pickle at the stream's position, which is moved to its end."""
    unpickler = PlainUnpickler(stream)
    value = unpickler.load()
    check_plain(value)
    return value


def check_end(stream: io.BytesIO) -> None:
    """Raises a `RefusedError` if the stream goes on."""
    rest = len(stream.read())
    if rest:
        raise RefusedError(f"goes on for {rest:,} bytes after its pickle, expected its end")


def check_plain(value: Any) -> None:
    """Goes through everything that was built, each container once and without recursion."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind in CONTAINERS:
            if id(value) not in seen:
                seen.add(id(value))
                parts = value.values() if kind is dict else value  # keys were checked on the way in
                if not SCALARS.issuperset(map(type, parts)):
                    todo.extend(parts)
        elif kind not in SCALARS and kind is not np.ndarray:
            raise RefusedError(f"holds a bare {kind.__name__}, {EXPECTED}")


def hashable(values: list) -> list:
    """The values, if they can be keys; a `RefusedError` if one is nested deeper than a flat tuple."""
    # Hashing tuples in tuples recurses in C: enough of them end the process, or keep it busy for ever.
    for value in values:
        if type(value) not in SCALARS and not (type(value) is tuple and all(type(part) in SCALARS for part in value)):
            raise RefusedError("has a nested key or set member, expected numbers, strings or flat tuples of them")
    return values


# What the globals of NumPy's pickles do here. Each takes arguments of any kind from the file.


@dataclass(frozen=True)
class Global:
    """What the machine gets for the name of an importable object."""

    name: str
    call: Callable | None


class Instructions(dict):
    """Functions that carry out the instructions, by their code."""

    def __missing__(self, code: int) -> Callable:
        raise RefusedError(f"has the instruction {bytes([code])!r}, expected only those for plain data")


class Unfinished:
    """An array or dtype between the instruction that creates it and the one that gives its content."""

    def __init__(self, finish: Callable[[Any], Any]):
        self.finish = finish
        self.value = None


class Memo(dict):
    """What the pickle refers back to: it stores objects unfinished and wants them finished."""

    def __getitem__(self, key: int) -> Any:
        value = dict.__getitem__(self, key)
        if type(value) is not Unfinished:
            return value
        if value.value is None:
            raise RefusedError("refers to an array or dtype before its content")
        return value.value


def new_dtype(code: Any, *_: Any) -> Unfinished:
    """A plain dtype, whose byte order comes later; a `RefusedError` for any other."""
    if type(code) is not str or code not in DTYPES:
        what = ascii(code[:80]) if type(code) is str else type(code).__name__
        raise RefusedError(f"has NumPy data of type {what}, expected booleans, integers or floats of up to 8 bytes")
    return Unfinished(partial(finish_dtype, code))


def finish_dtype(code: str, state: Any) -> np.dtype:
    """The dtype in its byte order; a `RefusedError` if it is to have anything more."""
    if type(state) is not tuple or len(state) != 8 or state[0] != 3 or state[2:] != DTYPE_STATE:
        raise RefusedError("has a NumPy dtype with more than a byte order, expected a plain number")
    if type(state[1]) is not str or state[1] not in ("<", ">", "|", "="):
        raise RefusedError("has a NumPy dtype with an unknown byte order, expected '<', '>', '|' or '='")
    return np.dtype(state[1] + code)


def new_array(kind: Any, *_: Any) -> Unfinished:
    """An array, whose content comes later; a `RefusedError` for any other class."""
    if type(kind) is not Global or kind.name != "numpy.ndarray":
        raise RefusedError("has a NumPy array of an unknown class, expected numpy.ndarray")
    return Unfinished(finish_array)


def finish_array(state: Any) -> np.ndarray:
    """The array of a state: version, shape, dtype, order and bytes; a `RefusedError` for any other state."""
    if type(state) is not tuple or len(state) != 5 or state[0] != 1 or type(state[3]) not in (bool, int):
        raise RefusedError("has a NumPy array with a state other than version, shape, dtype, order and bytes")
    _, shape, dtype, fortran_order, raw = state
    return make_array(shape, dtype, raw, "F" if fortran_order else "C")


def array_from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """The array of a pickle of protocol 5: bytes, dtype, shape, order; a `RefusedError` for any other order."""
    if type(order) is not str or order not in ("C", "F", "K"):
        raise RefusedError("has a NumPy array of an unknown order, expected 'C', 'F' or 'K'")
    if order != "K":
        return make_array(shape, dtype, raw, "F" if order == "F" else "C")
    if type(axes) not in (tuple, list) or not all(type(axis) is int for axis in axes):
        raise RefusedError("has a NumPy array whose axes are not integers")
    return make_array(shape, dtype, raw, "C").transpose(axes)


def make_scalar(dtype: Any, raw: Any) -> Any:
    """A number of NumPy from its bytes."""
    return make_array((), dtype, raw, "C")[()]


def make_array(shape: Any, dtype: Any, raw: Any, order: Literal["C", "F"]) -> np.ndarray:
    """A copy of the bytes as an array in this machine's byte order; a `RefusedError` if they do not fit."""
    if not isinstance(dtype, np.dtype):
        raise RefusedError("has a NumPy array without a dtype")
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise RefusedError(f"has a NumPy array whose shape is not a tuple of at most {MAX_DIMENSIONS} sizes")
    if not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape):
        raise RefusedError(f"has a NumPy array with a size that is not an integer from 0 to {MAX_BYTES:,}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if type(raw) is str:
        # A string of Python 2, which we have decoded: with a character per byte unless it was read as UTF-8.
        raw = raw.encode("latin1" if len(raw) == num_bytes else "utf-8")
    if type(raw) not in (bytes, bytearray) or len(raw) != num_bytes:
        raise RefusedError("has a NumPy array whose bytes are not as many as its shape and dtype need")
    if dtype.kind == "b" and raw.strip(b"\0\1"):
        raise RefusedError("has a NumPy array of booleans that are neither 0 nor 1")
    return np.ndarray(shape, dtype, raw, order=order).astype(dtype.newbyteorder("="))  # a copy in the same order


def encode_latin1(text: Any, encoding: Any = None) -> bytes:
    """How bytes are written at the protocols 0 to 2."""
    if type(text) is not str or type(encoding) is not str or encoding not in ("latin1", "latin-1"):
        raise RefusedError("calls _codecs.encode with something else than a string and 'latin1'")
    return text.encode("latin1")


def make_set(kind: type, items: Any = ()) -> set | frozenset:
    """A set of a list's items; a `RefusedError` for anything else, or items that nest."""
    if type(items) not in (list, tuple):
        raise RefusedError(f"makes a {kind.__name__} of something else than a list")
    return kind(hashable(items))


GLOBALS: dict[str, Callable[..., Any] | None] = {
    "numpy.dtype": new_dtype,
    "numpy.ndarray": None,
    "_codecs.encode": encode_latin1,
}
for package in ("numpy.core", "numpy._core"):  # NumPy before and since 2.0
    GLOBALS[f"{package}.multiarray._reconstruct"] = new_array
    GLOBALS[f"{package}.multiarray.scalar"] = make_scalar
    GLOBALS[f"{package}.numeric._frombuffer"] = array_from_buffer
for package in ("__builtin__", "builtins"):  # Python 2 and 3
    GLOBALS[f"{package}.set"] = partial(make_set, set)
    GLOBALS[f"{package}.frozenset"] = partial(make_set, frozenset)
    GLOBALS[f"{package}.bytes"] = lambda: b""  # how empty bytes are written at the protocols 0 to 2


# The Unpickler in C has no place to refuse an instruction: it sets attributes, hashes tuples of any depth and may
# reserve as much memory as a file asks for. The one in Python looks its instructions up in `dispatch`.
class PlainUnpickler(pickle._Unpickler):
    """The machine that runs one pickle."""

    # Methods of the original that its type stubs leave out.
    load_global: Callable[[], None]
    pop_mark: Callable[[], list]

    dispatch: ClassVar = Instructions({code: pickle._Unpickler.dispatch[code] for code in CODES})

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin1")
        self.memo = Memo()
        self.stream, self.size = stream, stream.getbuffer().nbytes
        # Bytes of arrays and members of sets that may still be made. All are in the file, some as a string of bytes
        # first. Without a bound, a small file that refers to one large string again and again fills the memory.
        self.left = 2 * self.size

    def load(self) -> Any:
        # The original's loop, which reads by way of a buffer for each frame and takes half as long again.
        self.read, self.readline = self.stream.read, self.stream.readline
        self.metastack: list[list] = []
        self.stack: list = []
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            while code := read(1):
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined] # so do they with this
            return stop.value
        raise EOFError

    def find_class(self, module: str, name: str) -> Global:
        wanted = f"{module}.{name}"
        if wanted in GLOBALS:
            return Global(wanted, GLOBALS[wanted])
        tensors = "holds tensors and " if module.partition(".")[0] == "torch" else ""
        raise RefusedError(f"{tensors}wants the global {ascii(wanted[:80])[1:-1]}, {EXPECTED}; nothing in it was run")

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError(f"holds tensors or other data outside of its pickle (a persistent id), {EXPECTED}")

    def _decode_string(self, value: bytes) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")

    def load_inst(self) -> None:
        self.load_global()  # names what it wants
        raise RefusedError("makes an instance of a class")

    def load_frame(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))  # what a reader of slow files should ask for at once
        if size > self.size - self.stream.tell():
            raise RefusedError("has a frame beyond its end")

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))  # no more than there is, where the original reserves the size first

    def load_reduce(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        if type(target) is not Global or target.call is None or type(arguments) is not tuple:
            raise RefusedError(f"calls a {type(target).__name__}, {EXPECTED}")
        self.push_made(target.call(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack.pop()
        if type(target) is not Unfinished:
            raise RefusedError(f"sets the state of a {type(target).__name__}, {EXPECTED}")
        target.value = target.finish(state)
        self.push_made(target.value)

    def push_made(self, value: Any) -> None:
        """Puts down a value that was made; a `RefusedError` if more is made than the file has bytes for."""
        if isinstance(value, (np.ndarray, np.generic)):
            self.left -= value.nbytes
        elif isinstance(value, (bytes, set, frozenset)):
            self.left -= len(value)
        if self.left < 0:
            raise RefusedError("makes more of its bytes than it has")
        self.append(value)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        if type(key) is str and type(self.stack[-1]) is dict:  # in Python 2's files, one instruction in six
            self.stack[-1][key] = value
        else:
            self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list) -> None:
        """Sets keys and values, in turn, of the dict on top; a `RefusedError` if it is none."""
        if type(self.stack[-1]) is not dict:
            raise RefusedError(f"sets an item of a {type(self.stack[-1]).__name__}, expected a dict")
        self.stack[-1].update(zip(hashable(items[::2]), items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise RefusedError(f"adds members to a {type(self.stack[-1]).__name__}, expected a set")
        self.stack[-1].update(hashable(items))

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # changes which stack is appended to
        self.append(frozenset(hashable(items)))

    dispatch[pickle.INST[0]] = load_inst
    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
