"""Whatever a file holds: its rows have boxes within their images, or a sentence says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmvg_hf.data.benchmarks import BENCHMARKS, SplitRequest
from epmvg_hf.data.builder import read_image
from epmvg_hf.data.files.image_files import measure_image
from epmvg_hf.data.loading import find_reader
from epmvg_hf.data.readers.custom import CustomData
from epmvg_hf.data.readers.source import GroundingSource
from tests.fixtures import flickr30k_files, index_files, own_rows, refer_files, referit_files
from tests.fixtures.mutations import changed_bytes, changed_json


def _benchmark(name: str, split_by: str | None = None) -> Callable[[Path], GroundingSource]:
    return lambda root: find_reader(SplitRequest.resolve(BENCHMARKS[name], root, "train", split_by))


def _own(root: Path) -> GroundingSource:
    return CustomData(root, "train", None, None if (root / "train.json").exists() else "xyxy")


def _write_own(kind: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        own_rows.write_images(root)
        rows = [{"image": image, "expression": text, "box": box} for image, text, box in own_rows.ROWS]
        images = [{"id": number, "file_name": name} for number, name in enumerate(own_rows.SIZES)]
        names = list(own_rows.SIZES)
        annotations = [
            {"id": number, "image_id": names.index(image), "caption": text, "bbox": [*box[:2], box[2] - box[0], 3]}
            for number, (image, text, box) in enumerate(own_rows.ROWS)
        ]
        cells = [f'{image},"{text[:8]}","{box}"' for image, text, box in own_rows.ROWS[:6]]
        lines = {
            "jsonl": [json.dumps(row) for row in rows],
            "csv": ["image,expression,box", *cells],
            "json": [json.dumps({"images": images, "annotations": annotations})],
        }[kind]
        (root / f"train.{kind}").write_text("\n".join(lines) + "\n")
        return root

    return write


# For each kind of data how it is written and opened, and the files that are changed.
KINDS = {
    "refcoco": (refer_files.write, _benchmark("refcoco"), ["refcoco/refs(unc).p", "refcoco/instances.json"]),
    "grefcoco": (
        lambda root: refer_files.write(root, name="grefcoco"),
        _benchmark("grefcoco"),
        ["grefcoco/grefs(unc).json", "grefcoco/instances.json"],
    ),
    "flickr30k": (
        flickr30k_files.write,
        _benchmark("flickr30k_entities"),
        ["train.txt", "Annotations/11.xml", "Sentences/11.txt", "flickr30k_images/11.jpg"],
    ),
    "referit": (
        referit_files.write,
        _benchmark("referitgame"),
        ["referit_query_train.json", "referit_bbox.json", "referit_imsize.json", "referit/images/11.jpg"],
    ),
    "index": (lambda root: index_files.write(root, "unc"), _benchmark("refcoco", "unc"), ["unc/unc_train.pth"]),
    "jsonl": (_write_own("jsonl"), _own, ["train.jsonl", "a.png"]),
    "csv": (_write_own("csv"), _own, ["train.csv", "more/b.jpg"]),
    "coco": (_write_own("json"), _own, ["train.json"]),
}
FILES = [(kind, name) for kind, (*_, names) in KINDS.items() for name in names]


def _read(open_source: Callable[[Path], GroundingSource], root: Path) -> int:
    """Reads all rows, and checks them. Returns how many there are."""
    count = 0
    try:
        source = open_source(root)
        source.fingerprint()
        items, problems = source.list_images()
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return 0
    for item in items:
        path, rows, more = read_image(source, item)
        problems = [*problems, *more]
        if path is not None:
            assert Path(path).resolve().is_relative_to(root.resolve())
        for row in rows:
            assert row["expression"].strip() and row["expression"].encode()
            if row["box"] is not None and path is not None:
                x0, y0, x1, y1 = row["box"]
                width, height = measure_image(path, source.exif_oriented)
                assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            count += 1
    assert all(isinstance(problem, str) and problem for problem in problems)
    return count


@pytest.fixture(scope="module", params=FILES, ids=[f"{kind} {name}" for kind, name in FILES])
def changed(request, tmp_path_factory):
    """A folder of one kind, one of whose files is to be changed."""
    kind, name = request.param
    write, open_source, _ = KINDS[kind]
    root = write(tmp_path_factory.mktemp("data"))
    assert _read(open_source, root) > 0
    file = root / name
    return root, open_source, file, file.read_bytes()


@given(data=st.data())
def test_changed_bytes(changed, data):
    root, open_source, file, content = changed
    file.write_bytes(data.draw(changed_bytes(content)))
    _read(open_source, root)


@given(data=st.data())
def test_changed_json(changed, data):
    root, open_source, file, content = changed
    if file.suffix == ".json":
        file.write_text(json.dumps(data.draw(changed_json(json.loads(content)))))
    elif file.suffix == ".jsonl":
        lines = content.decode().splitlines()
        number = data.draw(st.integers(0, len(lines) - 1))
        lines[number] = json.dumps(data.draw(changed_json(json.loads(lines[number]))))
        file.write_text("\n".join(lines))
    else:
        return
    _read(open_source, root)
