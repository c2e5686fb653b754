"""Tests of the reader of untrusted pickles: plain data as pickle and torch write it, and files that attack."""

import copyreg
import io
import os
import pickle
import random
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epmvg_hf.data.files import safe_pickle
from epmvg_hf.data.files.safe_pickle import read_pickle, read_torch_file
from tests.fixtures.paths import REAL_DATA

PROTOCOLS = range(6)
PLAIN = {
    "file_name": "COCO_train2014_000000000716_0.jpg",
    "sent_ids": [0, 1, -1, 255, 65536, 2**31, -(2**40), 2**100],
    "sentences": [{"tokens": ["man", "café", "☕"], "raw": ""}, {}],
    "box": (407.6, -0.0, 1e300, float("inf")),
    "others": [None, True, False, b"", b"\x00\xff", (), (1,), (1, (2,)), set(), {1, "a"}, frozenset({2.5, (1, "b")})],
    "long": "x" * 300,
    (1, "key"): 7,
    3: np.float64(2.5),
}
ARRAYS = [
    np.array([127, 142, 285, 500], dtype=np.float32),
    np.array([[1, -2, 3]], dtype=np.int64),
    np.array([True, False, True]),
    np.array([233, 195, 169], dtype=np.uint8),
    np.array(5, dtype=np.int16),
    np.array([], dtype=np.float32),
    np.zeros((0, 3), dtype=np.float16),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(24, dtype=np.uint32).reshape(2, 3, 4).transpose(1, 2, 0),
    np.arange(24).reshape(4, 6)[::2, ::3],
    np.array([1, 256], dtype=">i4"),
    np.array([[1.5, -2]], dtype=">f8"),
]
NUMPY_SCALARS = [np.float32(2.5), np.float64(-1), np.int64(-7), np.uint8(200), np.bool_(True), np.float16(0.5)]
TRANSVG_ROWS = [
    (
        "COCO_train2014_000000000839.jpg",
        "482127.pth",
        [303.58, 69.03, 293.29, 425.79],
        "guy flopping around on the right",
        [("r1", ["guy"])],
    ),
    ("1011572216.jpg", np.array([127, 142, 285, 500], dtype=np.float32), "bride"),
]


def write(folder: Path, content: bytes, name: str = "refs(unc).p") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def assert_same(actual, expected):
    """Equal in values and in types, all the way down."""
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.tobytes() == expected.tobytes()
        assert actual.flags.writeable
        assert actual.flags.f_contiguous == expected.flags.f_contiguous
    elif isinstance(expected, dict):
        assert_same(list(actual.items()), list(expected.items()))
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


# Plain data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data(tmp_path, protocol):
    path = write(tmp_path, pickle.dumps(PLAIN, protocol))
    assert_same(read_pickle(path), PLAIN)
    assert_same(read_pickle(str(path)), PLAIN)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_arrays(tmp_path, protocol, array):
    content = pickle.dumps([array, {"again": array}], protocol)
    actual = read_pickle(write(tmp_path, content))
    expected = pickle.loads(content)[0]
    expected = expected.astype(expected.dtype.newbyteorder("="))  # which pickle does at the protocols 0 to 4 only
    assert_same(actual, [expected, {"again": expected}])
    assert actual[0] is actual[1]["again"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("scalar", NUMPY_SCALARS, ids=lambda scalar: scalar.dtype.str)
def test_numpy_scalars(tmp_path, protocol, scalar):
    assert_same(read_pickle(write(tmp_path, pickle.dumps((scalar, [scalar]), protocol))), (scalar, [scalar]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_small_arrays_share_their_bytes(tmp_path, protocol):
    # Python has one object for every string of one byte, and pickle refers back to it.
    arrays = [np.array([k % 2], dtype=np.int8) for k in range(300)] + [np.bool_(k % 2) for k in range(300)]
    assert_same(read_pickle(write(tmp_path, pickle.dumps(arrays, protocol))), arrays)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_self_reference(tmp_path, protocol):
    value = [1]
    value.append((value, {"me": value}))
    actual = read_pickle(write(tmp_path, pickle.dumps(value, protocol)))
    assert actual[1][0] is actual
    assert actual[1][1]["me"] is actual


def test_large_objects_have_frames_of_their_own(tmp_path):
    value = ["x" * 100_000, b"y" * 100_000, np.zeros(100_000), list(range(50_000))]
    assert_same(read_pickle(write(tmp_path, pickle.dumps(value, 4))), value)
    assert_same(read_pickle(write(tmp_path, pickle.dumps(value, 5))), value)


# Pickles as Python 2 wrote them, with str and unicode, int and long

PYTHON_2 = [
    (
        b"(lp1\n(dp2\nS'sent_ids'\np3\n(lp4\nI0\naI-5\naL12345678901234567890L\nasS'split'\np5\nS'val'\np6\nsS'raw'\np7\n"
        b"V\\u2615 caf\xe9\np8\nsS'flag'\nI01\nsS'x'\nF1.5\nsS'pair'\n(I1\ng6\ntp9\nsS'none'\nNsa.",
        [
            {
                "sent_ids": [0, -5, 12345678901234567890],
                "split": "val",
                "raw": "☕ café",
                "flag": True,
                "x": 1.5,
                "pair": (1, "val"),
                "none": None,
            }
        ],
    ),
    (
        b"\x80\x02]q\x01}q\x02(U\x08sent_idsq\x03]q\x04(K\x00J\xfb\xff\xff\xff\x8a\x05\x00\x00\x00\x00\x01eU\x05splitq\x05"
        b"U\x03valq\x06X\x03\x00\x00\x00rawq\x07T\x03\x00\x00\x00manua.",
        [{"sent_ids": [0, -5, 2**32], "split": "val", "raw": "man"}],
    ),
    (b"c__builtin__\nset\np1\n((lp2\nI1\naS'a'\natp3\nRp4\n.", {1, "a"}),
    (b"S'caf\\xc3\\xa9 \"x\"\\n'\n.", 'café "x"\n'),  # UTF-8
    (b"S'caf\\xe9'\n.", "café"),  # Latin-1
    (b"\x80\x02U\x05caf\xc3\xa9.", "café"),
    (b"\x80\x02U\x04caf\xe9.", "café"),
    (b"\x80\x02T\x02\x00\x00\x00\xe9\xff.", "éÿ"),
]


@pytest.mark.parametrize(("content", "expected"), PYTHON_2)
def test_python_2(tmp_path, content, expected):
    assert_same(read_pickle(write(tmp_path, content)), expected)


def python_2_dtype(code: str, order: str) -> bytes:
    head = b"cnumpy\ndtype\nq\x05(U\x02" + code.encode() + b"K\x00K\x01tq\x06Rq\x07(K\x03U\x01" + order.encode()
    return head + b"q\x08NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x09b"


def python_2_array(code: str, order: str, shape: tuple[int, ...], raw: bytes, fortran: bool = False) -> bytes:
    """What Python 2 wrote at protocol 2, the bytes as str."""
    numbers = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in shape) + b"t"
    head = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85q\x03U\x01bq\x04\x87Rq\x0a"
    )
    state = b"(K\x01" + numbers + b"q\x0b" + python_2_dtype(code, order) + (b"\x88" if fortran else b"\x89")
    return head + state + b"T" + struct.pack("<i", len(raw)) + raw + b"q\x0ctq\x0db."


@pytest.mark.parametrize(
    "array",
    [
        *ARRAYS,
        np.arange(256, dtype=np.uint8),
        np.frombuffer("é☕ü".encode(), dtype=np.uint8),  # bytes that are valid UTF-8
        np.frombuffer("éé".encode("latin1"), dtype=np.uint8),
        np.frombuffer(b"ab", dtype=np.int16),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_python_2_arrays(tmp_path, array):
    fortran = array.flags.fnc
    raw = array.tobytes(order="F" if fortran else "C")
    order = {"=": "<"}.get(array.dtype.byteorder, array.dtype.byteorder)
    content = python_2_array(array.dtype.str[1:], order, array.shape, raw, fortran)
    expected = array.astype(array.dtype.newbyteorder("="), order="F" if fortran else "C")
    assert_same(pickle.loads(content, encoding="latin1"), expected)
    assert_same(read_pickle(write(tmp_path, content)), expected)


def test_python_2_protocol_0_array_and_scalar(tmp_path):
    dtype = "cnumpy\ndtype\np5\n(S'f4'\nI0\nI1\ntp6\nRp7\n(I3\nS'<'\np8\nNNNI-1\nI-1\nI0\ntp9\nb"
    head = "(lp0\ncnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntp3\nS'b'\np4\ntRp10\n"
    scalar = "acnumpy.core.multiarray\nscalar\np12\n(g7\nS'\\x00\\x00\\xc0\\xbf'\np13\ntRp14\na."
    raw = "I00\nS'\\x00\\x00\\x80?\\x00\\x00 \\xc0'\np15\ntp16\nb"
    content = (head + "(I1\n(I2\ntp11\n" + dtype + raw + scalar).encode()
    expected = [np.array([1, -2.5], dtype=np.float32), np.float32(-1.5)]
    assert_same(pickle.loads(content, encoding="latin1"), expected)
    assert_same(read_pickle(write(tmp_path, content)), expected)


# Files of torch


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_torch_file(tmp_path, zipped, protocol):
    path = tmp_path / "unc_val.pth"
    torch.save(TRANSVG_ROWS, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    assert zipfile.is_zipfile(path) is zipped
    assert_same(read_torch_file(path), TRANSVG_ROWS)
    with pytest.raises(ValueError):
        read_pickle(path)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], {"a": torch.float32}])
def test_tensors_are_refused(tmp_path, zipped, value):
    path = tmp_path / "model.pth"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pth holds tensors and wants the global torch\..* expected only"):
        read_torch_file(path)


ONE = pickle.dumps([1], 2)


def legacy(*, magic=0x1950A86A20F9469CFC6C, protocol=1001, content=ONE, keys=(), rest=b"") -> bytes:
    parts = [magic, protocol, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in parts) + content + pickle.dumps(list(keys), 2) + rest


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("content", [legacy(), archive({"a/data.pkl": ONE, "a/version": b"3"})])
def test_torch_containers_made_here(tmp_path, content):
    assert read_torch_file(write(tmp_path, content)) == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(magic=1), "magic number"),
        (legacy(protocol=1000), "magic number and protocol"),
        (legacy(magic=np.zeros(2)), "cannot be read"),
        (legacy(keys=["0"]), "holds tensors"),
        (legacy(rest=b"x"), "1 bytes after its pickle"),
        (legacy(content=b""), "cannot be read"),
        (legacy(content=b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x000tQ."), "holds tensors .*persistent id"),
        (ONE, "magic number"),
        (b"", "EOFError"),
        (archive({"a/data.pkl": ONE + b"x"}), "1 bytes after its pickle"),
        (archive({"a/data.pkl": ONE, "b/data.pkl": ONE}), "has 2 members <name>/data.pkl, expected one"),
        (archive({"a/version": b"3"}), "has 0 members"),
        (archive({"data.pkl": ONE}), "has 0 members"),
        (archive({"a/data.pkl": ONE, "a/constants.pkl": ONE}), "TorchScript"),
        (archive({"a/data.pkl": ONE})[:-10], "cannot be read .*BadZipFile"),
        (archive({"a/data.pkl": ONE}).replace(ONE, ONE[:-1] + b"x"), "cannot be read .*CRC"),
    ],
)
def test_broken_torch_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"unc_val\.pth .*{message}"):
        read_torch_file(write(tmp_path, content, "unc_val.pth"))


def test_zip_bomb(tmp_path, monkeypatch):
    path = write(tmp_path, archive({"a/data.pkl": pickle.dumps("x" * 100_000)}, zipfile.ZIP_DEFLATED))
    assert len(read_torch_file(path)) == 100_000
    monkeypatch.setattr(safe_pickle, "MAX_BYTES", 50_000)
    with pytest.raises(ValueError, match=r"data\.pkl of 100,0.. bytes, expected at most 50,000"):
        read_torch_file(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_that_unpack_without_bound(tmp_path, compression):
    with pytest.raises(ValueError, match="neither stored nor deflated"):
        read_torch_file(write(tmp_path, archive({"a/data.pkl": ONE}, compression)))


@pytest.mark.parametrize("declared", [50, 200_000])
def test_zip_member_with_a_wrong_size(tmp_path, declared):
    content = archive({"a/data.pkl": pickle.dumps("x" * 100_000, 2)}, zipfile.ZIP_DEFLATED)
    size = struct.pack("<I", len(pickle.dumps("x" * 100_000, 2)))
    assert content.count(size) == 2
    with pytest.raises(ValueError):
        read_torch_file(write(tmp_path, content.replace(size, struct.pack("<I", declared))))


# Real files, where they are


def real_files(pattern: str) -> list:
    paths = sorted(REAL_DATA.glob(pattern))
    return paths or [pytest.param(None, marks=pytest.mark.skip(reason=f"no {pattern} in {REAL_DATA}"))]


ROWS = {
    "unc_val.pth": 10_834,
    "unc+_val.pth": 10_758,
    "gref_umd_val.pth": 4_896,
    "referit_val.pth": 5_842,
    "flickr_val.pth": 14_433,
    "refcoco": 3_811,
    "refcoco+": 3_805,
    "refcocog": 2_573,
}


@pytest.mark.parametrize("path", real_files("transvg_index/*/*.pth"), ids=lambda path: path and path.name)
def test_real_index_files(path):
    rows = read_torch_file(path)
    assert len(rows) == ROWS[path.name]
    assert_same(rows, torch.load(path, weights_only=False))


@pytest.mark.parametrize("path", real_files("refcoco/*/refs(*).p"), ids=lambda path: path and path.parent.name)
def test_real_refs(path):
    refs = read_pickle(path)
    assert len(refs) == ROWS[path.parent.name]
    assert_same(refs, pickle.loads(path.read_bytes(), encoding="utf-8"))


# Files that attack


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(marker: Path) -> str:
    return f"touch {marker}"


def short(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


HOSTILE = {
    "GLOBAL and REDUCE": lambda command: b"cos\nsystem\n(" + short(command) + b"tR.",
    "STACK_GLOBAL": lambda command: b"\x80\x04" + short("os") + short("system") + b"\x93" + short(command) + b"\x85R.",
    "INST": lambda command: b"(" + short(command) + b"ios\nsystem\n.",
    "OBJ": lambda command: b"(cos\nsystem\n" + short(command) + b"o.",
    "NEWOBJ": lambda command: (
        b"cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nsystem\n](" + short(command) + b"et\x81t\x81."
    ),
    "NEWOBJ_EX": lambda command: (
        b"\x80\x04cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nsystem\n](" + short(command) + b"et}\x92t}\x92."
    ),
    "popped": lambda command: b"cos\nsystem\n(" + short(command) + b"tR0K\x01.",
    "list that calls": lambda command: b"](cos\nsystem\n(" + short(command) + b"tRe.",
    "os.system": lambda command: pickle.dumps(Call(os.system, command)),
    "eval": lambda command: pickle.dumps(Call(eval, f"__import__('os').system({command!r})"), 2),
    "getattr": lambda command: (
        b"cbuiltins\ngetattr\n(cposix\nsystem\n" + short("__call__") + b"tR(" + short(command) + b"tR."
    ),
    "in an object array": lambda command: pickle.dumps(np.array([Call(os.system, command), None], dtype=object)),
    "in a structured array": lambda command: pickle.dumps([np.zeros(2, "i4,f4"), Call(os.system, command)]),
    "state of an array": lambda command: (
        pickle.dumps(np.zeros(2), 2)[:-1] + b"(K\x01K\x01\x85cos\nsystem\n(" + short(command) + b"tR\x89" + b"Ntb."
    ),
    "name with dots": lambda command: (
        b"\x80\x04" + short("numpy") + short("os.system") + b"\x93" + short(command) + b"\x85R."
    ),
}
THAT_FIRE = [name for name in HOSTILE if name not in ("in a structured array", "state of an array", "name with dots")]


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("container", ["pickle", "legacy", "zip"])
def test_nothing_is_run(tmp_path, how, container):
    marker = tmp_path / "marker"
    content = HOSTILE[how](touch(marker))
    reader = read_pickle if container == "pickle" else read_torch_file
    if container == "legacy":
        content = legacy(content=content)
    elif container == "zip":
        content = archive({"a/data.pkl": content})
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p .*expected"):
        reader(write(tmp_path, content))
    assert not marker.exists()


@pytest.mark.parametrize("how", THAT_FIRE)
def test_the_attacks_would_work(tmp_path, how):
    marker = tmp_path / "marker"
    pickle.loads(HOSTILE[how](touch(marker)))
    assert marker.exists()


def test_message(tmp_path):
    path = write(tmp_path, b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(ValueError) as error:
        read_pickle(path)
    assert str(error.value) == (
        f"{path} wants the global os.system, expected only lists, tuples, dicts, sets, None, booleans, numbers, "
        "strings, bytes and NumPy numbers; nothing in it was run."
    )


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.getattr",
        "__builtin__.getattr",
        "builtins.object",
        "builtins.bytearray",
        "builtins.type",
        "numpy.load",
        "numpy.core.multiarray.frombuffer",
        "numpy._core.numeric.fromfunction",
        "numpy.core.records.recarray",
        "numpy.matrix",
        "numpy.ndarray.tofile",
        "_codecs.decode",
        "collections.OrderedDict",
        "copyreg._reconstructor",
        "functools.partial",
        "torch.FloatStorage",
        "torch._utils._rebuild_tensor_v2",
        "epmvg_hf.data.files.safe_pickle.read_pickle",
        "é\n\x1b.x",
    ],
)
def test_globals_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    content = b"\x80\x04]" + b"\x8c" + bytes([len(module.encode())]) + module.encode() + short(attribute) + b"\x93a."
    with pytest.raises(ValueError) as error:
        read_pickle(write(tmp_path, content))
    assert f"wants the global {ascii(name)[1:-1]}, expected only lists" in str(error.value)


DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00i4\x89\x88tR"
DTYPE_STATE = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
NEW_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
LONG = b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00"  # 2**64 - 1


def array_with(shape=b"(K\x02t", dtype=DTYPE + DTYPE_STATE + b"b", fortran=b"\x89", raw=b"C\x08" + bytes(8)) -> bytes:
    return NEW_ARRAY + b"(K\x01" + shape + dtype + fortran + raw + b"tb."


def test_array_with_is_valid(tmp_path):
    assert_same(read_pickle(write(tmp_path, array_with())), np.zeros(2, dtype=np.int32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array_with(shape=b"(K\x03t"), "bytes are not as many"),
        (array_with(shape=b"(K\x01t"), "bytes are not as many"),
        (array_with(shape=b"(J\xff\xff\xff\xfft"), "a size that is not an integer from 0"),
        (array_with(shape=b"(" + LONG + b"t"), "a size that is not an integer from 0"),
        (array_with(shape=b"(\x88K\x02t"), "a size that is not an integer"),
        (array_with(shape=b"(G\x40\x00\x00\x00\x00\x00\x00\x00t"), "a size that is not an integer"),
        (array_with(shape=b"(" + b"K\x01" * 33 + b"t"), "shape is not a tuple of at most 32"),
        (array_with(shape=b"(" + b"J\0\0\0\x40" * 5 + b"K\x00t", raw=b"C\x00"), "cannot be read .*ValueError"),
        (array_with(shape=b"]K\x02a"), "shape is not a tuple"),
        (array_with(shape=b"N"), "shape is not a tuple"),
        (array_with(raw=b"C\x07" + bytes(7)), "bytes are not as many"),
        (array_with(raw=b"](NNe"), "bytes are not as many"),
        (array_with(raw=short("\u20ac" * 8)), "cannot be read|bytes are not as many"),
        (array_with(fortran=b"N"), "a state other than"),
        (array_with(dtype=b"N"), "without a dtype"),
        (array_with(dtype=DTYPE), "without a dtype"),
        (array_with(dtype=b"X\x02\x00\x00\x00i4"), "without a dtype"),
        (array_with(dtype=DTYPE.replace(b"i4", b"O8") + DTYPE_STATE + b"b"), "NumPy data of type 'O8'"),
        (array_with(dtype=DTYPE.replace(b"i4", b"V8") + DTYPE_STATE + b"b"), "NumPy data of type 'V8'"),
        (array_with(dtype=DTYPE.replace(b"i4", b"S4") + DTYPE_STATE + b"b"), "NumPy data of type 'S4'"),
        (array_with(dtype=DTYPE.replace(b"i4", b"M8") + DTYPE_STATE + b"b"), "NumPy data of type 'M8'"),
        (array_with(dtype=DTYPE.replace(b"i4", b"c8") + DTYPE_STATE + b"b"), "NumPy data of type 'c8'"),
        (b"cnumpy\ndtype\n(](K\x01etR.", "NumPy data of type list"),
        (DTYPE + DTYPE_STATE.replace(b"<", b"!") + b"b.", "unknown byte order"),
        (DTYPE + DTYPE_STATE.replace(b"NNN", b"N](e}") + b"b.", "more than a byte order"),
        (DTYPE + DTYPE_STATE.replace(b"NNN", b"NN}") + b"b.", "more than a byte order"),
        (DTYPE + DTYPE_STATE.replace(b"K\x00t", b"K\x3ft") + b"b.", "more than a byte order"),
        (DTYPE + b"}b.", "more than a byte order"),
        (DTYPE + DTYPE_STATE + b"b.", "holds a bare Int32DType"),
        (DTYPE + b".", "holds a bare Unfinished"),
        (DTYPE + DTYPE_STATE + b"b" + DTYPE_STATE + b"b.", "sets the state of a Int32DType"),
        (NEW_ARRAY + b".", "holds a bare Unfinished"),
        (b"]" + NEW_ARRAY + b"a.", "holds a bare Unfinished"),
        (NEW_ARRAY + b"q\x00h\x00.", "before its content"),
        (NEW_ARRAY + b"}b.", "a state other than"),
        (NEW_ARRAY + b"N}X\x05\x00\x00\x00valueK\x01s\x86b.", "a state other than"),
        (array_with()[:-1] + b"(K\x01K\x02\x85NNNtb.", "sets the state of a ndarray"),
        (array_with()[:-1] + b"K\x00K\x01s.", "sets an item of a ndarray"),
        (array_with()[:-1] + b"K\x01a.", "cannot be read"),
        (array_with()[:-1] + b")R.", "calls a ndarray"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\nset\n(K\x00tC\x01btR.", "unknown class"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(NNNtR.", "unknown class"),
        (b"cnumpy.core.multiarray\n_reconstruct\n)R.", "cannot be read .*TypeError"),
        (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nC\x04\0\0\0\0tR.", "without a dtype"),
        (b"cnumpy._core.numeric\n_frombuffer\n(C\x00" + DTYPE + DTYPE_STATE + b"bK\x00\x85NtR.", "unknown order"),
        (
            b"cnumpy._core.numeric\n_frombuffer\n(C\x00" + DTYPE + DTYPE_STATE + b"bK\x00\x85X\x01\0\0\0KNtR.",
            "axes are not integers",
        ),
        (
            b"cnumpy._core.numeric\n_frombuffer\n(C\x00" + DTYPE + DTYPE_STATE + b"bK\x00\x85X\x01\0\0\0KK\x05\x85tR.",
            "cannot be read",
        ),
        (
            array_with(dtype=(DTYPE + DTYPE_STATE + b"b").replace(b"i4", b"b1"), raw=b"C\x02\x01\x02"),
            "neither 0 nor 1",
        ),
        (b"cnumpy\nndarray\n.", "holds a bare Global"),
        (b"cnumpy\nndarray\n(K\x02tR.", "calls a Global"),
        (b"cnumpy\nndarray\n)\x81.", r"the instruction b'\\x81'"),
        (b"cnumpy\ndtype\nN}X\x04\x00\x00\x00callNs\x86b.", "sets the state of a Global"),
        (b"cnumpy\ndtype\n]R.", "calls a Global"),
        (b"(cnumpy\ndtype\nX\x02\x00\x00\x00i4o.", r"the instruction b'o'"),
        (b"(X\x02\x00\x00\x00i4inumpy\ndtype\n.", "makes an instance"),
        (b"\x80\x04cnumpy\ndtype\n)}\x92.", r"the instruction b'\\x92'"),
        (b"c__builtin__\nset\n(K\x05tR.", "makes a set of something else"),
        (b"c__builtin__\nbytes\n(" + LONG + b"tR.", "cannot be read .*TypeError"),
        (b"c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0rot13tR.", "_codecs.encode"),
        (b"c_codecs\nencode\n(X\x01\0\0\0atR.", "_codecs.encode"),
        (b"N}X\x01\0\0\0aK\x01sb.", "sets the state of a NoneType"),
        (b"]N}X\x06\0\0\0appendK\x01s\x86b.", "sets the state of a list"),
        (b"}K\x01K\x02K\x03\x86b.", "sets the state of a int"),
        (b"K\x01)R.", "calls a int"),
        (b"Pid\n.", r"the instruction b'P'"),
        (b"K\x01Q.", "persistent id"),
        (b"\x80\x05\x97.", r"the instruction b'\\x97'"),
        (b"\x80\x05\x96\x01\0\0\0\0\0\0\0a\x98.", r"the instruction b'\\x98'"),
        (b"]2.", r"the instruction b'2'"),
    ],
)
def test_hostile_content(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p .*({message})"):
        read_pickle(write(tmp_path, content))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("instruction", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"])
def test_extension_codes(tmp_path, instruction, cached):
    copyreg.add_extension("os", "getcwd", 0xF0)
    try:
        if cached:
            pickle.loads(b"\x80\x02" + instruction + b".")
        with pytest.raises(ValueError, match="has the instruction"):
            read_pickle(write(tmp_path, b"\x80\x02" + instruction + b")R."))
    finally:
        copyreg.remove_extension("os", "getcwd", 0xF0)


def test_a_persistent_id(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", "0") if isinstance(value, slice) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump([slice(1)])
    with pytest.raises(ValueError, match=r"holds tensors .*persistent id"):
        read_pickle(write(tmp_path, stream.getvalue()))


# Files that exhaust


def tuples(depth: int) -> bytes:
    """A tuple of two of the tuple of two of the ..., each stored once."""
    levels = (b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(depth))
    return b"\x80\x02)q\x000" + b"".join(levels) + b"h" + bytes([depth])


def test_repeated_references_stay_references(tmp_path):
    value = read_pickle(write(tmp_path, tuples(200) + b"."))
    for _ in range(200):
        assert value[0] is value[1]
        value = value[0]
    assert value == ()


@pytest.mark.parametrize(
    "content",
    [
        b"}" + tuples(100) + b"K\x01s.",
        b"(" + tuples(100) + b"K\x01d.",
        b"}(" + tuples(100) + b"K\x01u.",
        b"\x80\x04\x8f(" + tuples(100) + b"\x90.",
        b"\x80\x04(" + tuples(100) + b"\x91.",
        b"c__builtin__\nset\n(](" + tuples(100) + b"et" + b"R.",
        b"})" + b"\x85" * 200_000 + b"K\x01s.",  # to hash this would end the process
    ],
)
def test_keys_are_not_nested(tmp_path, content):
    with pytest.raises(ValueError, match="has a nested key or set member"):
        read_pickle(write(tmp_path, content))


@pytest.mark.parametrize("content", [b")" + b"\x85" * 500_000, b"]" * 500_000 + b"a" * 499_999])
def test_deep_nesting(tmp_path, content):
    value, depth = read_pickle(write(tmp_path, content + b".")), 0
    while value:
        value, depth = value[0], depth + 1
    assert depth >= 499_999


MEGABYTE = struct.pack("<I", 2**20) + b"x" * 2**20
REPEATED = {  # instructions that make something large of what was stored, and how that is stored
    "bytes": (b"X" + MEGABYTE + short("latin1") + b"\x86q\x00", b"c_codecs\nencode\nh\x00R"),
    "arrays": (b"(K\x01(J\0\0\4\0t" + DTYPE + DTYPE_STATE + b"b\x89B" + MEGABYTE + b"tq\x00", NEW_ARRAY + b"h\x00b"),
    "sets": (
        b"](" + b"".join(b"M" + struct.pack("<H", n) for n in range(10_000)) + b"e\x85q\x00",
        b"c__builtin__\nset\nh\x00R",
    ),
}


@pytest.mark.parametrize("what", REPEATED)
def test_small_files_do_not_fill_the_memory(tmp_path, what):
    stored, repeated = REPEATED[what]
    path = write(tmp_path, b"\x80\x04](" + stored + b"0" + repeated + b"e.")
    assert len(read_pickle(path)) == 1
    write(tmp_path, b"\x80\x04](" + stored + b"0" + repeated * 1000 + b"e.")
    with pytest.raises(ValueError, match="makes more of its bytes than it has"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x80\x02Nr\xff\xff\xff\xff.", None),  # for which pickle in C reserves 64 GiB
        (b"Np99999999999999999999\n.", None),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**45) + b"a.", ValueError),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**64 - 1) + b"a.", ValueError),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**45) + b"a.", ValueError),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"a.", ValueError),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**64 - 1) + b"N.", ValueError),
        (b"B\xff\xff\xff\xffabc.", ValueError),
        (b"T\xff\xff\xff\xffabc.", ValueError),
        (b"\x8b\xff\xff\xff\x7f\x01.", ValueError),
        (b"L" + b"9" * 5000 + b"L\n.", ValueError),
    ],
)
def test_sizes_are_not_believed(tmp_path, content, expected):
    path = write(tmp_path, content)
    if expected is None:
        assert read_pickle(path) is None
    else:
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p "):
            read_pickle(path)


def test_memory_is_not_reserved_before_there_is_content(tmp_path):
    path = write(tmp_path, b"\x80\x05\x96" + struct.pack("<Q", 2**28) + b"a.")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# Broken files


def test_missing_file(tmp_path):
    for reader in (read_pickle, read_torch_file):
        with pytest.raises(FileNotFoundError, match=r"No file refs\(unc\)\.p in .*"):
            reader(tmp_path / "refs(unc).p")
        with pytest.raises(FileNotFoundError):
            reader(tmp_path)


def test_large_file(tmp_path):
    path = tmp_path / "large.p"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)
    for reader in (read_pickle, read_torch_file):
        with pytest.raises(ValueError, match=r"large\.p has 1,073,741,825 bytes, expected at most 1,073,741,824"):
            reader(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncated(tmp_path, protocol):
    content = pickle.dumps([PLAIN, ARRAYS[0]], protocol)
    for length in range(0, len(content), 11):
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p "):
            read_pickle(write(tmp_path, content[:length]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\n",
        b"not a pickle",
        b"{}",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x03\x04",
        b"\x80\x06N.",
        b"\x80\xffN.",
        b"a.",
        b"NNs.",
        b"h\x07.",
        b"Sx\n.",
        b"Ix\n.",
        b"Fx\n.",
        b"(NNNd.",
        b"\x80\x02N.N.",
        b"\x80\x04\x95\x03\0\0\0\0\0\0\0N.N",
        b"X\x01\0\0\0\xff.",
    ],
)
def test_broken_files(tmp_path, content):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p (cannot be read|has the|goes on|sets an item)"):
        read_pickle(write(tmp_path, content))


def is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(is_plain(part) for item in value.items() for part in item)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_plain(part) for part in value)
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and value.dtype.kind in "biuf"
    return type(value) in (type(None), bool, int, float, str, bytes, bytearray) or isinstance(value, np.generic)


SEEDS = {f"protocol {protocol}": pickle.dumps([PLAIN, *ARRAYS[:4]], protocol) for protocol in (0, 2, 5)}
SEEDS["Python 2"] = python_2_array("f4", "<", (2, 2), bytes(range(16)))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_changes(tmp_path, seed):
    rng, plain = random.Random(seed), 0
    for _ in range(300):
        content = bytearray(SEEDS[seed])
        for _ in range(rng.choice((1, 1, 2, 4))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path = write(tmp_path, content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in strings
            try:
                value = read_pickle(path)
            except ValueError as error:
                assert str(error).startswith(str(path))
                assert len(str(error)) < 1000
            else:
                assert is_plain(value)
                plain += 1
    assert 0 < plain < 300


@pytest.mark.parametrize("zipped", [False, True])
def test_random_changes_of_torch_files(tmp_path, zipped):
    path = tmp_path / "unc_val.pth"
    torch.save(TRANSVG_ROWS, path, _use_new_zipfile_serialization=zipped)
    original, rng = path.read_bytes(), random.Random(0)
    for _ in range(100):
        content = bytearray(original)
        content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            assert is_plain(read_torch_file(path))
        except ValueError as error:
            assert str(error).startswith(str(path))
