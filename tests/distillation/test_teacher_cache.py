"""The teacher's cache on disk: what it returns, when it is computed again, interruptions, and several processes."""

import io
import json
import multiprocessing
import os
import pickle
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from filelock import FileLock
from PIL import Image as PILImage
from torch import nn

from epmvg_hf import ClipTeacher, EpmVGImageProcessor, EpmVGImageProcessorPil, EpmVGProcessor, ImageGroups
from epmvg_hf.distillation import teacher_cache
from epmvg_hf.distillation.teacher_cache import TeacherCache

IMAGE_IDS = ["c", "a", "c", "b", "e", "a", "d", "e", "b", "c"]  # 5 images, not in the order of their names
EXPRESSIONS = [
    "dog",
    "man",
    "star",
    "dog",
    "left dog",
    "man",
    "red star",
    "dog",
    "right man",
    "blue dog",
]  # 7 distinct
SIZE = {"size": {"height": 64, "width": 64}}


class Teacher(nn.Module):
    """
    Stands in for `ClipTeacher`. Writes to `log`, a file for all processes, a line for each image and expression that
    it sees. Fails at image or expression number `fail_at`.
    """

    embed_dim = 8

    def __init__(self, log: Path, fingerprint: str = "weights", fail_at: int | None = None, seconds: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
        self.log, self.fingerprint, self.fail_at, self.seconds = log, fingerprint, fail_at, seconds
        self.log.touch()

    def fail(self):
        raise RuntimeError("interrupted")

    @torch.no_grad()
    def encode_images(self, pixel_values, output_patches=True):
        assert pixel_values.min() >= 0 and pixel_values.max() <= 1.0001
        # Each image has a colour of its own, which the middle of the canvas shows.
        colours = (pixel_values[:, 0, 32, 32] * 255).round().int().tolist()
        self._note([f"image {colour}" for colour in colours])
        patches = nn.functional.adaptive_avg_pool2d(pixel_values, (2, 4)).permute(0, 2, 3, 1) @ self.weight
        image_embeds = nn.functional.normalize(patches.mean((1, 2)), dim=-1)
        return image_embeds, nn.functional.normalize(patches, dim=-1) if output_patches else None

    @torch.no_grad()
    def encode_texts(self, expressions):
        self._note([f"text {expression}" for expression in expressions])
        generators = [torch.Generator().manual_seed(zlib.crc32(expression.encode())) for expression in expressions]
        return nn.functional.normalize(torch.stack([torch.randn(8, generator=g) for g in generators]), dim=-1)

    def seen(self) -> Counter:
        """The images and expressions that were encoded since the last call, and how often."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return Counter(lines)

    def _note(self, lines: list[str]):
        time.sleep(self.seconds)
        if self.fail_at is not None:
            self.fail_at -= len(lines)
            if self.fail_at < 0:
                self.fail()
        with self.log.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


class KilledTeacher(Teacher):
    def fail(self):
        os._exit(1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """3 shards of images and 3 of expressions."""
    monkeypatch.setattr(teacher_cache, "_IMAGES_PER_SHARD", 2)
    monkeypatch.setattr(teacher_cache, "_EXPRESSIONS_PER_SHARD", 3)


@pytest.fixture
def teacher(tmp_path) -> Teacher:
    return Teacher(tmp_path / "log.txt")


@pytest.fixture
def image_processor() -> EpmVGImageProcessor:
    return EpmVGImageProcessor(**SIZE)


@pytest.fixture
def build(teacher, image_processor, tmp_path):
    """`TeacherCache.build` with defaults for the arguments that a test does not set."""

    def build(**changes) -> TeacherCache:
        arguments = {"teacher": teacher, "dataset": rows(), "image_processor": image_processor}
        return TeacherCache.build(**{**arguments, "cache_dir": tmp_path / "cache", "disable_tqdm": True, **changes})

    return build


def rows(image_ids: list[str] = IMAGE_IDS, expressions: list[str] = EXPRESSIONS) -> Dataset:
    def png(image_id: str) -> bytes:
        file = io.BytesIO()
        number = ord(image_id) - ord("a")
        PILImage.new("RGB", (40, 20 + 8 * number), (40 * number, 255 - 40 * number, 90)).save(file, format="PNG")
        return file.getvalue()

    columns = {
        "image": [{"bytes": png(image_id), "path": None} for image_id in image_ids],
        "image_id": image_ids,
        "expression": expressions,
    }
    features = Features({"image": Image(), "image_id": Value("string"), "expression": Value("string")})
    return Dataset.from_dict(columns, features)


def once() -> Counter:
    """Every image and every distinct expression of `rows`, once."""
    return Counter([f"image {40 * number}" for number in range(5)] + [f"text {e}" for e in set(EXPRESSIONS)])


def folder_of(cache: TeacherCache) -> Path:
    return cache.image_shards[0].parent


def assert_right(cache: TeacherCache, teacher: Teacher, image_processor: EpmVGImageProcessor):
    """The cache of `rows` gives what the teacher gives."""
    groups, expressions = [3, 0, 4, 1, 2, 0], [*EXPRESSIONS[::-1], "star"]
    outputs = cache.lookup(groups, expressions)
    images = [rows().to_list()[ImageGroups(rows()).groups[group][0]] for group in groups]
    images = [PILImage.open(io.BytesIO(row["image"]["bytes"])) for row in images]
    pixel_values = image_processor(images=images, return_tensors="pt")["pixel_values"]
    image_embeds, patch_embeds = teacher.encode_images(image_processor.unnormalize(pixel_values))
    assert image_embeds.unique(dim=0).shape[0] == 5
    expected = {
        "teacher_image_embeds": image_embeds,
        "teacher_text_embeds": teacher.encode_texts(expressions),
        "teacher_patch_embeds": patch_embeds,
    }
    assert outputs.keys() == expected.keys()
    for name, embeds in expected.items():
        assert outputs[name].dtype == torch.float32 and outputs[name].shape == embeds.shape
        # Half a unit of float16 in [0.5, 1].
        torch.testing.assert_close(outputs[name], embeds, atol=2.5e-4, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_gives_what_the_teacher_gives(build, teacher, image_processor, batch_size):
    assert_right(build(batch_size=batch_size), teacher, image_processor)


def test_decodes_and_encodes_everything_once(build, teacher, monkeypatch):
    decoded, decode = [], Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: decoded.append(1) or decode(*args, **kwargs))
    build()
    assert len(decoded) == 5 and teacher.seen() == once()
    build()
    assert len(decoded) == 5 and not teacher.seen()


def test_groups_are_those_of_the_batches(build):
    cache, groups = build(), ImageGroups(rows())
    embeds = {
        group.image_id: cache.lookup([group.index], [])["teacher_image_embeds"]
        for group in (groups[index] for index in range(5))
    }
    assert embeds.keys() == set("abcde")
    # Image i of "abcde" has ever more red.
    order = rows(list("abcde"), ["dog"] * 5)
    torch.testing.assert_close(
        torch.cat([embeds[image_id] for image_id in "abcde"]),
        build(dataset=order).lookup(range(5), [])["teacher_image_embeds"],
    )


def test_shapes(build):
    def shapes(outputs):
        return {name.removeprefix("teacher_"): tuple(embeds.shape) for name, embeds in outputs.items()}

    assert shapes(build(output_patches=False).lookup([1], ["dog"])) == {"image_embeds": (1, 8), "text_embeds": (1, 8)}
    assert shapes(build().lookup([], [])) == {
        "image_embeds": (0, 8), "text_embeds": (0, 8), "patch_embeds": (0, 2, 4, 8)
    }  # fmt: skip


def test_what_is_not_there(build):
    cache = build()
    with pytest.raises(ValueError, match=r"^the teacher cache has no expression 'cat'$"):
        cache.lookup([0], ["dog", "cat"])
    for number in (5, -1):
        with pytest.raises(IndexError, match=f"^the teacher cache has 5 images, so there is no image {number}$"):
            cache.lookup([number], [])


def test_lookup_gives_tensors_of_its_own(build):
    cache = build()
    cache.lookup([0], ["dog"])["teacher_image_embeds"].zero_()
    assert cache.lookup([0], ["dog"])["teacher_image_embeds"].norm() > 0.99


@pytest.mark.parametrize(
    "change",
    [
        lambda arguments, log: {"teacher": Teacher(log, "other weights")},
        lambda arguments, log: {"image_processor": EpmVGImageProcessor(size={"height": 65, "width": 65})},
        lambda arguments, log: {"image_processor": EpmVGImageProcessor(**SIZE, image_mean=[0.1, 0.2, 0.3])},
        lambda arguments, log: {"image_processor": EpmVGImageProcessor(**SIZE, resample=3)},
        lambda arguments, log: {"image_processor": EpmVGImageProcessorPil(**SIZE)},
        lambda arguments, log: {"dataset": rows().select(range(9))},
        lambda arguments, log: {"output_patches": False},
    ],
    ids=["weights", "size", "mean", "resample", "backend", "rows", "patches"],
)
def test_computes_anew_after_a_change(build, teacher, change):
    folder = folder_of(build())
    teacher.seen()
    changes = change(None, teacher.log)
    changed = build(**changes)
    assert folder_of(changed) != folder
    expected = once() - Counter(["text blue dog"]) if "dataset" in changes else once()
    assert teacher.seen() == expected
    # The first one is still there.
    assert folder_of(build()) == folder and not teacher.seen()


def test_computes_anew_in_another_dtype(build, teacher):
    folder = folder_of(build())
    teacher.seen()
    with torch.autocast("cpu", torch.bfloat16):
        assert folder_of(build()) != folder
    assert teacher.seen() == once()


def test_a_saved_image_processor_finds_the_cache(build, processor, teacher, tmp_path):
    build(image_processor=processor.image_processor)
    processor.save_pretrained(tmp_path / "processor")
    teacher.seen()
    build(image_processor=EpmVGProcessor.from_pretrained(tmp_path / "processor").image_processor)
    assert not teacher.seen()


def test_folder(build, teacher, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars are for terminals
    cache = build(cache_dir=None, disable_tqdm=False)
    folder = folder_of(cache)
    assert folder.parent == datasets.config.HF_DATASETS_CACHE / "epmvg_teacher"
    key = json.loads((folder / "key.json").read_text())
    assert key["teacher"] == "weights" and key["images"] == 5 and key["image_processor"]["size"]["height"] == 64
    assert not list(folder.glob("*.tmp"))
    progress = capsys.readouterr().err
    assert "Teacher: images: 100%" in progress and "Teacher: expressions: 100%" in progress

    build(cache_dir=None, disable_tqdm=False)
    assert capsys.readouterr().err == ""
    build(dataset=rows().select(range(9)), disable_tqdm=True)
    monkeypatch.undo()
    build(dataset=rows().select(range(7)), disable_tqdm=False)
    assert capsys.readouterr().err == ""


def test_files_are_datasets(build):
    cache = build()
    images = Dataset.from_file(str(cache.image_shards[1])).with_format("torch")
    assert images.column_names == ["image_embeds", "patch_embeds"] and images[:]["patch_embeds"].shape == (2, 2, 4, 8)
    torch.testing.assert_close(images[:]["image_embeds"].float(), cache.lookup([2, 3], [])["teacher_image_embeds"])
    assert Dataset.from_file(str(cache.expression_shards[0]))["expression"][:] == ["dog", "man", "star"]


def test_embeddings_are_memory_mapped(build):
    cache = build()
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(path) in mapped for path in cache.image_shards + cache.expression_shards)


# Among the images, and, after all 5 images, among the expressions; each time in the middle of the second shard.
@pytest.mark.parametrize(("fail_at", "repeated"), [(3, ["image 40"]), (5 + 4, ["text left dog"])])
def test_an_interrupted_build_goes_on(build, teacher, image_processor, fail_at, repeated):
    with pytest.raises(RuntimeError, match="interrupted"):
        build(teacher=Teacher(teacher.log, fail_at=fail_at), batch_size=1)
    first = teacher.seen()
    assert sum(first.values()) == fail_at
    cache = build(batch_size=1)
    assert teacher.seen() == once() - first + Counter(repeated)
    assert_right(cache, teacher, image_processor)


def test_a_killed_process_leaves_no_lock(build, teacher, image_processor):
    process = fork(build, teacher=KilledTeacher(teacher.log, fail_at=3))
    process.join(60)
    assert process.exitcode == 1
    assert sum(teacher.seen().values()) == 2
    cache = build()
    assert teacher.seen() == once() - Counter(["image 80", "image 0"])
    assert_right(cache, teacher, image_processor)


def test_what_a_killed_process_was_writing_is_overwritten(build, teacher, image_processor):
    cache = build()
    shard = cache.image_shards[1]
    shard.with_suffix(".tmp").write_bytes(shard.read_bytes()[:100])
    shard.unlink()
    teacher.seen()
    assert_right(build(), teacher, image_processor)
    assert not list(shard.parent.glob("*.tmp"))


def test_broken_shards_are_computed_anew(build, teacher, image_processor):
    cache = build()
    shard, other = cache.image_shards[1], cache.image_shards[2]
    content = shard.read_bytes()
    half = content[: len(content) // 2]
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    # Not a shard at all, truncated shards, one with another number of rows, and one in which a bit has flipped.
    for broken in (b"", b"PK\x03\x04", content[:10], half, content[:-100], other.read_bytes(), bytes(flipped)):
        shard.write_bytes(broken)
        teacher.seen()
        assert_right(build(), teacher, image_processor)
        assert shard.read_bytes() == content
    shard.write_bytes(cache.expression_shards[0].read_bytes())
    assert_right(build(), teacher, image_processor)


@pytest.mark.parametrize("method", ["encode_images", "encode_texts"])
def test_a_teacher_that_gives_nan_is_an_error(build, teacher, monkeypatch, method):
    encode = getattr(teacher, method)

    def with_nan(inputs, **options):
        outputs = encode(inputs, **options)
        (outputs if isinstance(outputs, torch.Tensor) else outputs[1])[-1] = torch.nan
        return outputs

    monkeypatch.setattr(teacher, method, with_nan)
    name = {
        "encode_images": "images: patch_embeds of number 1",
        "encode_texts": "expressions: text_embeds of number [0-9]",
    }
    with pytest.raises(ValueError, match=f"Teacher: {name[method]} has NaN or infinity"):
        build()


def test_two_processes_share_the_work(build, teacher, image_processor):
    slow = Teacher(teacher.log, seconds=0.05)
    processes = [fork(build, teacher=slow, batch_size=1) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert teacher.seen() == once()
    assert_right(build(), teacher, image_processor)


def test_waits_for_what_another_process_is_at(build, teacher, image_processor):
    cache = build()
    for shard in cache.image_shards:
        shard.unlink()
    teacher.seen()
    first, second, third = cache.image_shards
    with FileLock(second.with_suffix(".lock")):
        thread = threading.Thread(target=build)
        thread.start()
        wait_for(lambda: first.exists() and third.exists())
        time.sleep(0.1)
        # The shard is neither done nor begun, and no call has returned without it.
        assert not second.exists() and thread.is_alive() and sum(teacher.seen().values()) == 3
    # The other process gave up, so this one has to compute the shard.
    thread.join(60)
    assert sum(teacher.seen().values()) == 2
    assert_right(build(), teacher, image_processor)


def test_pickles_as_file_names(build, teacher, image_processor):
    content = pickle.dumps(build())
    assert len(content) < 2000
    assert_right(pickle.loads(content), teacher, image_processor)


def test_data_loader_workers_can_look_up(build):
    cache = build()
    loader = torch.utils.data.DataLoader(
        range(5), batch_size=2, num_workers=1, collate_fn=lambda groups: cache.lookup(groups, ["man"])
    )
    embeds = torch.cat([batch["teacher_patch_embeds"] for batch in loader])
    assert embeds.equal(cache.lookup(range(5), [])["teacher_patch_embeds"])


def test_concatenate(build):
    first = build()
    second = build(dataset=rows(["d", "f", "d"], ["dog", "cat", "left cat"]))
    both = TeacherCache.concatenate([first, second])
    outputs = both.lookup([6, 0, 5], ["cat", "blue dog", "dog"])
    assert outputs["teacher_image_embeds"][1:2].equal(first.lookup([0], [])["teacher_image_embeds"])
    assert outputs["teacher_patch_embeds"][[2, 0]].equal(second.lookup([0, 1], [])["teacher_patch_embeds"])
    assert outputs["teacher_text_embeds"][[0, 2]].equal(second.lookup([], ["cat", "dog"])["teacher_text_embeds"])
    assert outputs["teacher_text_embeds"][1:].equal(first.lookup([], ["blue dog", "dog"])["teacher_text_embeds"])
    with pytest.raises(IndexError, match="has 7 images"):
        both.lookup([7], [])
    with pytest.raises(ValueError, match="differ in shape"):
        TeacherCache.concatenate([first, build(output_patches=False)])


def test_datasets_that_cannot_be_cached(build):
    with pytest.raises(ValueError, match="cannot be cached for a dataset without rows"):
        build(dataset=rows().select([]))
    first = rows().to_list()[0]
    dataset = Dataset.from_list([first, {**first, "image_id": "x", "image": None}], rows().features)
    with pytest.raises(ValueError, match="cannot be cached for row 1 of the dataset, which has no image"):
        build(dataset=dataset)


def test_with_clip(image_processor, request):
    pytest.importorskip("open_clip")
    teacher = ClipTeacher.from_pretrained(f"local-dir:{request.getfixturevalue('clip_folders')['vit']}")
    cache = TeacherCache.build(teacher, rows(), image_processor, disable_tqdm=True)

    images = [row["image"] for row in rows().select([0, 1])]
    pixel_values = image_processor(images=images, return_tensors="pt")["pixel_values"]
    expected = teacher(image_processor.unnormalize(pixel_values), ["red star", "dog"])
    outputs = cache.lookup([0, 1], ["red star", "dog"])
    for name, embeds in expected.items():
        torch.testing.assert_close(outputs[f"teacher_{name}"], embeds, atol=1e-3, rtol=0)


def fork(build, **changes) -> multiprocessing.Process:
    """Starts a process that builds the cache."""

    def run():
        # As in a worker of a data loader, because PyTorch's threads do not survive the fork.
        torch.set_num_threads(1)
        build(**changes)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
