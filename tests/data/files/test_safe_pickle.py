"""Tests of reading untrusted pickles: plain data as pickle and torch write it, and files that attack."""

import io
import os
import pickle
import random
import struct
import sys
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
    "others": [None, True, False, (), (1,), (1, (2,))],
    "long": "x" * 300,
    (1, "key"): 7,
}
ROWS = [
    ("COCO_train2014_000000000839.jpg", "482127.pth", [303.58, 69.03, 293.29, 425.79], "guy", [("r1", ["guy"])]),
    ("1011572216.jpg", np.array([127, 142, 285, 500], dtype=np.float32), "bride"),
]


def write(folder: Path, content: bytes, name: str = "refs(unc).p") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def assert_same(actual, expected):
    """Equal in values and in types, where NumPy's arrays and numbers count as lists and floats."""
    if isinstance(expected, np.ndarray):
        assert isinstance(actual, list) and actual == expected.tolist()
    elif isinstance(expected, np.number):
        assert isinstance(actual, float) and actual == expected
    elif isinstance(expected, dict):
        assert_same(list(actual.items()), list(expected.items()))
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(actual) is type(expected) and actual == expected


# Plain data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data(tmp_path, protocol):
    path = write(tmp_path, pickle.dumps(PLAIN, protocol))
    assert_same(read_pickle(path), PLAIN)
    assert_same(read_pickle(str(path)), PLAIN)


# At protocol 5, NumPy writes arrays in another way, which torch.save does not use.
@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "i8", "f2", "f4", "f8", ">i4", ">f8"])
def test_numpy_numbers(tmp_path, protocol, dtype):
    row, table = np.array([1, 200, 3.5, -4]).astype(dtype), np.arange(6).reshape(2, 3).astype(dtype)
    value = [row, {"again": row}, table, np.asfortranarray(table), row[1]]
    assert_same(read_pickle(write(tmp_path, pickle.dumps(value, protocol))), value)


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
    (b"S'caf\\xc3\\xa9 \"x\"\\n'\n.", 'café "x"\n'),  # UTF-8
    (b"S'caf\\xe9'\n.", "café"),  # Latin-1
    (b"\x80\x02U\x05caf\xc3\xa9.", "café"),
    (b"\x80\x02U\x04caf\xe9.", "café"),
    (b"\x80\x02](U\x02\xc3\xa9U\x01\xe9e.", ["é", "é"]),  # each string has an encoding of its own
    (b"\x80\x02T\x2c\x01\x00\x00" + b"\xe9" * 300 + b".", "é" * 300),
]


@pytest.mark.parametrize(("content", "expected"), PYTHON_2)
def test_python_2(tmp_path, content, expected):
    assert_same(read_pickle(write(tmp_path, content)), expected)


# Files of torch

ONE = pickle.dumps([1], 2)


def legacy(content: bytes = ONE, magic: Any = 0x1950A86A20F9469CFC6C) -> bytes:
    """torch's older format: magic number, version, system, the object and the keys of its tensors."""
    head = b"".join(pickle.dumps(part, 2) for part in (magic, 1001, {"little_endian": True}))
    return head + content + pickle.dumps([], 2)


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("zipped", [False, True])
def test_torch_file(tmp_path, zipped):
    path = tmp_path / "unc_val.pth"
    torch.save(ROWS, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) is zipped
    assert_same(read_torch_file(path), ROWS)
    for content in (legacy(), archive({"a/data.pkl": ONE, "a/version": b"3"})):  # the containers of the attacks below
        assert read_torch_file(write(tmp_path, content)) == [1]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], {"a": torch.float32}])
def test_tensors_are_refused(tmp_path, zipped, value):
    path = tmp_path / "model.pth"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pth holds tensors and asks for the global torch\..* expected only"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(magic=1), "magic number"),
        (legacy(content=b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x000tQ."), "data outside of its pickle"),
        (ONE, "is a pickle, but not of torch.save, expected torch's magic number"),
        (b"", "ends before its pickle does"),
        (legacy()[:-30], "ends before its pickle does"),
        (archive({"a/data.pkl": ONE, "b/data.pkl": ONE}), r"expected one uncompressed member <name>/data\.pkl"),
        (archive({"a/version": b"3"}), "expected one uncompressed member"),
        (archive({"a/data.pkl": ONE}, zipfile.ZIP_DEFLATED), "expected one uncompressed member"),  # it may be a bomb
        (archive({"a/data.pkl": ONE})[:-10], "cannot be read .*BadZipFile"),
        (archive({"a/data.pkl": ONE}).replace(ONE, ONE[:-1] + b"x"), "cannot be read"),
    ],
)
def test_broken_torch_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"unc_val\.pth .*{message}"):
        read_torch_file(write(tmp_path, content, "unc_val.pth"))


# Real files, where they are


def real_files(pattern: str) -> list:
    paths = sorted(REAL_DATA.glob(pattern))
    return paths or [pytest.param(None, marks=pytest.mark.skip(reason=f"no {pattern} in {REAL_DATA}"))]


@pytest.mark.parametrize("path", real_files("transvg_index/*/*.pth"), ids=lambda path: path and path.name)
def test_real_index_files(path):
    assert_same(read_torch_file(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("path", real_files("refcoco/*/refs(*).p"), ids=lambda path: path and path.parent.name)
def test_real_refs(path):
    assert_same(read_pickle(path), pickle.loads(path.read_bytes(), encoding="utf-8"))


# Files that attack


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


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
CONTAINERS = {
    "pickle": (read_pickle, lambda content: content),
    "legacy": (read_torch_file, legacy),
    "zip": (read_torch_file, lambda content: archive({"a/data.pkl": content})),
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_is_executed(tmp_path, how, container):
    marker = tmp_path / "marker"
    read, wrap = CONTAINERS[container]
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p .*expected"):
        read(write(tmp_path, wrap(HOSTILE[how](f"touch {marker}"))))
    assert not marker.exists()


@pytest.mark.parametrize("how", THAT_FIRE)
def test_the_attacks_would_work(tmp_path, how):
    marker = tmp_path / "marker"
    pickle.loads(HOSTILE[how](f"touch {marker}"))
    assert marker.exists()


def test_message(tmp_path):
    path = write(tmp_path, b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(ValueError) as error:
        read_pickle(path)
    assert str(error.value) == (
        f"{path} asks for the global os.system, expected only lists, tuples, dicts, sets, strings, bytes, None and "
        "numbers; nothing in it was executed."
    )


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "__builtin__.getattr",
        "builtins.object",
        "builtins.bytearray",
        "builtins.type",
        "numpy.load",
        "numpy.core.multiarray.frombuffer",
        "numpy.core.records.recarray",
        "numpy.ndarray.tofile",
        "_codecs.decode",
        "copyreg._reconstructor",
        "functools.partial",
        "epmvg_hf.data.files.safe_pickle.read_pickle",
        "é\n\x1b.x",
    ],
)
def test_globals_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    content = b"\x80\x04]" + b"\x8c" + bytes([len(module.encode())]) + module.encode() + short(attribute) + b"\x93a."
    with pytest.raises(ValueError) as error:
        read_pickle(write(tmp_path, content))
    assert f"asks for the global {ascii(name)[1:-1]}, expected only lists" in str(error.value)


# What a file can do with the names that are allowed

DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00i4\x89\x88tR"
DTYPE_STATE = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
NEW_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"


def array_with(shape=b"(K\x02t", dtype=DTYPE + DTYPE_STATE, raw=b"C\x08" + bytes(8)) -> bytes:
    return NEW_ARRAY + b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb."


@pytest.mark.parametrize(
    "content",
    [
        array_with(shape=b"(K\x03t"),
        array_with(raw=b"C\x07" + bytes(7)),
        array_with(raw=b"](NNe"),
        array_with(dtype=b"N"),
        array_with(dtype=b"cnumpy\ndtype\n"),
        *(array_with(dtype=DTYPE.replace(b"i4", code) + DTYPE_STATE) for code in (b"O8", b"V8", b"S4", b"M8", b"b1")),
        array_with(dtype=DTYPE + DTYPE_STATE.replace(b"<", b"!")),
        NEW_ARRAY + b"}b.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nC\x04\0\0\0\0tR.",
        b"c_codecs\nencode\n(C\x01aX\x06\0\0\0base64tR.",
        b"c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0rot13tR.",
        b"c_codecs\nencode\n(X\x01\0\0\0aX\x06\0\0\0latin1X\x06\0\0\0ignoretR.",
        b"K\x01)R.",
        b"cnumpy\ndtype\n]R.",
        b"Pid\n.",
    ],
)
def test_bad_arguments(tmp_path, content):
    assert_same(read_pickle(write(tmp_path, array_with())), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p (cannot be read|has NumPy data|has bytes|calls|refers to)"):
        read_pickle(write(tmp_path, content))


@pytest.mark.parametrize("name", ["numpy.ndarray", "numpy.dtype", "_codecs.encode", "numpy.core.multiarray.scalar"])
@pytest.mark.parametrize("state", [b"N}X\x05\0\0\0orderX\x01\0\0\0>s\x86", b"}X\x08\0\0\0__init__Ns"])
def test_a_file_cannot_change_how_the_next_one_is_read(tmp_path, name, state):
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ValueError, match=r"cannot be read|sets the state"):
        read_pickle(write(tmp_path, f"c{module}\n{attribute}\n".encode() + state + b"b."))
    value = [np.array([1, 2], np.int32), np.float32(3)]
    assert_same(read_pickle(write(tmp_path, pickle.dumps(value, 2))), value)


def test_other_encodings_are_not_used(tmp_path):
    sys.modules.pop("encodings.punycode", None)
    with pytest.raises(ValueError, match=r"has bytes in an encoding that pickle does not use, expected latin1"):
        read_pickle(write(tmp_path, b"\x80\x02c_codecs\nencode\n" + short("a") + short("punycode") + b"\x86R."))
    assert "encodings.punycode" not in sys.modules


# Files that would end the process or take all memory

DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple; hashing it overflows the stack of C
DOUBLED = b")" + b"2\x86" * 64  # a pair of the same pair of the same pair; hashing it takes 2**64 steps
HASHED = {
    "SETITEM": lambda key: b"\x80\x02}" + key + b"Ns.",
    "SETITEMS": lambda key: b"\x80\x02}(K\x01N" + key + b"Nu.",
    "DICT": lambda key: b"(K\x01N" + key + b"Nd.",
    "ADDITEMS": lambda key: b"\x80\x04\x8f(K\x01" + key + b"\x90.",
    "FROZENSET": lambda key: b"\x80\x04(K\x01" + key + b"\x91.",
}


@pytest.mark.parametrize("how", HASHED)
@pytest.mark.parametrize("key", [DEEP, DOUBLED, b"]", b"\x8f(\x91"], ids=["deep", "doubled", "list", "set"])
def test_only_flat_values_are_hashed(tmp_path, how, key):
    assert len(read_pickle(write(tmp_path, HASHED[how](b"K\x02" + short("key") + b"\x86")))) in (1, 2)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p has a dict or set .* expected only strings, bytes, numbers"):
        read_pickle(write(tmp_path, HASHED[how](key)))


@pytest.mark.parametrize("content", [DEEP, b"]" * 200_000 + b"a" * 199_999], ids=["tuples", "lists"])
def test_deep_values(tmp_path, content):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p has values that lie more than 100 deep in others"):
        read_pickle(write(tmp_path, b"\x80\x02" + content + b"."))


def test_rows_of_small_values_under_long_names_are_read(tmp_path):
    rows = [{f"a name of a column that is long {column}": True for column in range(20)} for _ in range(2_000)]
    assert read_pickle(write(tmp_path, pickle.dumps(rows, 4))) == rows


def test_long_numbers_as_keys_take_no_time(tmp_path):
    number, places = 1 << 800_000, 20_000
    content = b"\x80\x02\x8b" + struct.pack("<I", 100_001) + number.to_bytes(100_001, "little") + b"q\x00}("
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p unpacks to far more than its own size"):
        read_pickle(write(tmp_path, content + b"h\x00N" * places + b"u."))


def test_a_value_that_contains_itself(tmp_path):
    rows: list = []
    rows.append(rows)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p has a value that contains itself, expected plain data"):
        read_pickle(write(tmp_path, pickle.dumps(rows, 2)))


@pytest.mark.parametrize(
    "shared", [[f"expression {number}" for number in range(300)], "a" * 10_000, {"sents": tuple(range(300))}]
)
def test_what_stands_in_many_places_counts_each_time(tmp_path, shared):
    """A row for each place would take all memory."""
    few, many = pickle.dumps([shared] * 2, 2), pickle.dumps([shared] * 100_000, 2)
    assert read_pickle(write(tmp_path, few)) == [shared] * 2
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p unpacks to far more than its own size"):
        read_pickle(write(tmp_path, many))


@pytest.mark.parametrize(
    "content",
    [
        DOUBLED + b"K\x05R.",
        b"K\x05" + DOUBLED + b"R.",
        DOUBLED + b"Nb.",
        DOUBLED + b"Na.",
        DOUBLED + b"K\x01Ns.",
        DOUBLED + b"Q.",
        b"c_codecs\nencode\n" + short("a") + DOUBLED + b"\x86R.",
        array_with(shape=DOUBLED),
        array_with(dtype=b"cnumpy\ndtype\n" + DOUBLED + b"\x85R"),
    ],
)
def test_messages_do_not_spell_out_repeated_values(tmp_path, content):
    with pytest.raises(ValueError) as error:
        read_pickle(write(tmp_path, b"\x80\x02" + content))
    assert len(str(error.value)) < 1000


def read_within(path: Path, num_bytes: int) -> Any:
    """Reads a pickle without allocating more than so much memory at any time."""
    tracemalloc.start()
    try:
        return read_pickle(path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < num_bytes


@pytest.mark.parametrize("store", [b"r" + struct.pack("<I", 10**7), b"p10000000\n"])
def test_memory_of_stored_values(tmp_path, store):
    assert read_within(write(tmp_path, b"\x80\x02]" + store + b"."), 10**6) == []


@pytest.mark.parametrize("instruction", [b"\x8e", b"\x8d", b"\x95", b"\x96"])
def test_memory_of_claimed_lengths(tmp_path, instruction):
    path = write(tmp_path, b"\x80\x05" + instruction + struct.pack("<Q", 2**28) + b"]")
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p (ends before its pickle does|has .* BYTEARRAY8, expected)"):
        read_within(path, 10**6)


TEXT = short("a" * 10**5) + b"q\x000"
BYTES = b"c_codecs\nencode\n(h\x00X\x06\0\0\0latin1tR"
RAW = DTYPE.replace(b"i4", b"u1") + DTYPE_STATE + b"q\x010B" + struct.pack("<I", 10**4) + bytes(10**4) + b"q\x020"


def array_of_raw(num_axes: int) -> bytes:
    return array_with(b"(M\x10\x27" + b"K\x01" * (num_axes - 1) + b"t", b"h\x01", b"h\x02")[:-1]


@pytest.mark.parametrize(
    ("start", "plain", "attack"),
    [
        (TEXT, BYTES * 2, BYTES * 500),
        (RAW, array_of_raw(1) * 2, array_of_raw(1) * 500),
        (RAW, array_of_raw(4), array_of_raw(30)),
    ],
    ids=["bytes", "arrays", "axes"],
)
def test_memory_of_what_is_made(tmp_path, start, plain, attack):
    assert len(read_within(write(tmp_path, start + b"](" + plain + b"e."), 10**7)) in (1, 2)
    path = write(tmp_path, start + b"](" + attack + b"e.")
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p unpacks to far more than its own size"):
        read_within(path, 10**7)


# Broken files


def test_missing_file(tmp_path):
    for reader in (read_pickle, read_torch_file):
        with pytest.raises(FileNotFoundError, match=r"No file refs\(unc\)\.p in .*"):
            reader(tmp_path / "refs(unc).p")


def test_large_files_are_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "large.p"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)
    monkeypatch.setattr(Path, "open", None)
    for reader in (read_pickle, read_torch_file):
        with pytest.raises(ValueError, match=r"large\.p has 1,073,741,825 bytes, expected at most 1,073,741,824"):
            reader(path)


@pytest.mark.parametrize("reader", [read_pickle, read_torch_file])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html><head>", "is a web page, not a pickle: download the file itself."),
        (b"<HTML>", "is a web page, not a pickle: download the file itself."),
        (b"<!-- saved from a browser --><html>", "is a web page, not a pickle: download the file itself."),
        (b"\xef\xbb\xbf\r\n<html>", "is a web page, not a pickle: download the file itself."),
        ("\ufeff <html>".encode("utf-16-le"), "is a web page, not a pickle: download the file itself."),
        ("\ufeff<html>".encode("utf-16-be"), "is a web page, not a pickle: download the file itself."),
        (b"version https://git-lfs.example/spec/v1\noid sha256:4d7a\nsize 1\n", "is a Git LFS pointer, not the file"),
    ],
)
def test_files_that_are_downloaded_by_mistake(tmp_path, reader, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        reader(path)
    assert str(error.value).startswith(f"{path} {message}")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncated(tmp_path, protocol):
    content = pickle.dumps([PLAIN, ROWS], protocol)
    for length in range(0, len(content), 11):
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p "):
            read_pickle(write(tmp_path, content[:length]))


@pytest.mark.parametrize(
    "content",
    [
        b".",
        b"\x80\x06N.",
        b"h\x07.",
        b"Ix\n.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"X\x01\0\0\0\xff.",
    ],
)
def test_broken_files(tmp_path, content):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p cannot be read as a pickle of plain data"):
        read_pickle(write(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends before its pickle does: it is empty or was cut off."),
        (b"\x80\x02](K\x01", "ends before its pickle does: it is empty or was cut off."),
        (b'{"a": 1}', "is not an intact pickle: it has the byte 0x7b in place of an instruction."),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.", "has the pickle instruction BYTEARRAY8, expected only "),
        (b"\x80\x02\x82\x01.", "has the pickle instruction EXT1, expected only "),
    ],
)
def test_messages_of_broken_files(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        read_pickle(path)
    assert str(error.value).startswith(f"{path} {message}")


@pytest.mark.parametrize("error", [RecursionError("too deep"), MemoryError()])
def test_errors_of_python_become_one_sentence(tmp_path, monkeypatch, error):
    def fail(file):
        raise error

    monkeypatch.setattr(safe_pickle, "_load", fail)
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p cannot be read .*{type(error).__name__}"):
        read_pickle(write(tmp_path, ONE))


def is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(is_plain(part) for item in value.items() for part in item)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_plain(part) for part in value)
    return isinstance(value, (type(None), bool, int, float, str, bytes, bytearray))


@pytest.mark.parametrize("zipped", [False, True])
def test_random_changes(tmp_path, zipped):
    content = pickle.dumps([*ROWS, PLAIN], 2)
    original = archive({"a/data.pkl": content}) if zipped else legacy(content)
    path, rng, num_plain = tmp_path / "unc_val.pth", random.Random(0), 0
    for _ in range(300):
        content = bytearray(original)
        content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in strings
            try:
                value = read_torch_file(path)
            except ValueError as error:
                assert str(error).startswith(str(path)) and len(str(error)) < 1000
            else:
                num_plain += is_plain(value)
    assert 0 < num_plain < 300
