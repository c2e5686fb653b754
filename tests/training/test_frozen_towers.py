"""Training from the kept outputs of frozen towers, compared with training in which the towers run in every step."""

import logging
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Image
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, ImageGroups, load_grounding_dataset
from epmvg_hf.training import frozen_towers
from tests.fixtures.models import ONE_STEP, tiny_model, uneven_shapes
from tests.fixtures.tiny_teacher import TinyTeacher

TOWERS = ["vision_model", "text_model"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(frozen_towers, "_IMAGES_PER_SHARD", 5)
    monkeypatch.setattr(frozen_towers, "_EXPRESSIONS_PER_SHARD", 6)


class Losses(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.logs.append({name: logs[name] for name in logs if "loss" in name or name == "grad_norm"})


class Run:
    """A training of the tiny model, and how many images and expressions its towers saw."""

    def __init__(self, folder, processor, dataset, cached, teacher=None, captions=None, model=None, **arguments):
        self.model = tiny_model(box_head="map", teacher_projection_dim=24) if model is None else model
        self.images = self.expressions = 0
        student = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        student.model.vision_model.register_forward_hook(self.count_images)
        student.model.text_model.register_forward_hook(self.count_expressions, with_kwargs=True)
        losses = Losses()
        settings = {"max_steps": 8, "learning_rate": 1e-3, "frozen_parameters": TOWERS}
        settings |= {"tower_cache_dir": str(folder / "towers"), **arguments}
        self.trainer = EpmVGTrainer(
            self.model,
            EpmVGTrainingArguments(
                str(folder),
                **{**ONE_STEP, "per_device_train_batch_size": 4, "cache_frozen_towers": cached, **settings},
            ),
            train_dataset=dataset,
            processing_class=processor,
            teacher=teacher,
            caption_dataset=captions,
            callbacks=[losses],
        )
        self.trainer.train()
        self.logs = losses.logs

    def count_images(self, module, inputs, output):
        self.images += len(output.feature_maps[0])

    def count_expressions(self, module, inputs, kwargs, output):
        self.expressions += len(output.last_hidden_state)


def assert_close(run: Run, expected: Run, tolerance: float = 1e-4):
    assert len(run.logs) == len(expected.logs) > 1
    for log, other in zip(run.logs, expected.logs, strict=True):
        assert log == pytest.approx(other, rel=tolerance)


def three_words(processor) -> Dataset:
    """Expressions of three words about 8 images: no batch pads them."""
    dataset = load_grounding_dataset("shapes", split="train", num_images=20)
    dataset = dataset.filter(lambda expression: len(expression.split()) == 3, input_columns="expression")
    images = list(dict.fromkeys(dataset["image_id"]))[:8]
    dataset = dataset.filter(lambda image_id: image_id in images, input_columns="image_id")
    assert len(images) == 8 and processor(text=list(dataset["expression"]))["attention_mask"].all()
    return dataset


def test_training_is_bit_equal_to_one_without_the_cache(tmp_path, processor, monkeypatch):
    """Where both give the towers batches of the same shapes. Others may differ in the last bits, see below."""
    dataset = three_words(processor)
    plain = Run(tmp_path, processor, dataset, cached=False)
    decoded, decode = [], Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: decoded.append(1) or decode(*args, **kwargs))
    cached = Run(tmp_path, processor, dataset, cached=True)
    assert len(plain.logs) == 8 and cached.logs == plain.logs
    expected = plain.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in cached.model.state_dict().items())
    # Every image was decoded once, and seen once in batches of four, which shards of five fill up.
    assert len(decoded) == 8 and cached.images == 12 and plain.images == 32
    assert cached.expressions == len(set(dataset["expression"])) < plain.expressions


def test_everything_together(tmp_path, processor):
    """Uneven numbers and lengths of expressions, a limit for them, captions, and a teacher that is cached too."""
    dataset = uneven_shapes([8, 1, 5, 3, 8, 2, 7])
    captions = load_grounding_dataset("shapes", split="validation", num_images=3).remove_columns("box")
    weights = dict.fromkeys(("relation_loss_coefficient", "feature_loss_coefficient"), 1.0)
    settings = {"captions": captions, "max_expressions_per_image": 4, **weights}
    plain, cached = (
        Run(tmp_path, processor, dataset, cached, teacher=TinyTeacher(), **settings) for cached in (False, True)
    )
    assert "loss_teacher_map" in cached.logs[0] and "loss_relation" in cached.logs[0]
    assert_close(cached, plain)
    before = cached.images, cached.expressions
    again = Run(tmp_path, processor, dataset, True, teacher=TinyTeacher(), **settings)
    assert (again.images, again.expressions) == (0, 0) and min(before) > 0
    assert again.logs == cached.logs


def test_one_tower_is_frozen(tmp_path, processor, caplog):
    dataset = uneven_shapes([8, 1, 5, 3])
    for position, tower in enumerate(TOWERS):
        plain, cached = (
            Run(tmp_path, processor, dataset, cached, frozen_parameters=[tower]) for cached in (False, True)
        )
        assert_close(cached, plain)
        seen = (cached.images < plain.images, cached.expressions < plain.expressions)
        assert seen == (position == 0, position == 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_towers_are_trained_after_the_first_epochs(tmp_path, processor, workers):
    """Also with workers that are still there when the towers begin to change."""
    dataset = uneven_shapes([8, 1, 5, 3, 8, 2, 7, 8])
    settings = {"freeze_backbone_epochs": 2, "frozen_parameters": None, "num_train_epochs": 4, "max_steps": -1}
    settings |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    plain, cached = (Run(tmp_path, processor, dataset, cached, **settings) for cached in (False, True))
    assert_close(cached, plain)
    # Once for the cache, in shards of 5 and 3 images, and in the last two epochs.
    assert plain.images == 4 * 8 and cached.images == 12 + 2 * 8


def test_half_precision_on_disk(tmp_path, processor):
    dataset = uneven_shapes([8, 1, 5, 3])
    folders = {dtype: tmp_path / dtype for dtype in ("float32", "float16")}
    single, half = (
        Run(tmp_path, processor, dataset, True, tower_cache_dtype=dtype, tower_cache_dir=str(folder))
        for dtype, folder in folders.items()
    )
    assert half.logs != single.logs
    assert_close(half, single, tolerance=2e-2)
    sizes = {dtype: sum(file.stat().st_size for file in folder.rglob("*.arrow")) for dtype, folder in folders.items()}
    assert sizes["float16"] < 0.7 * sizes["float32"]
    with pytest.raises(ValueError, match='tower_cache_dtype must be "float32" or "float16"'):
        EpmVGTrainingArguments(str(tmp_path), use_cpu=True, tower_cache_dtype="bfloat16")

    model = tiny_model(box_head="map")
    with torch.no_grad():
        model.model.vision_model.embedder.embedder.convolution.weight.mul_(1e8)
        for module in model.model.vision_model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(1e4)
    with pytest.raises(ValueError, match=r"torch\.float16 cannot hold: set tower_cache_dtype to float32"):
        Run(tmp_path, processor, dataset, True, model=model, tower_cache_dtype="float16")


def test_what_is_computed_anew(tmp_path, processor):
    """After a change of a tower's weights or of its inputs, that tower's outputs are computed again, no others."""
    dataset = uneven_shapes([8, 1, 5, 3])
    settings = {"tower_cache_dir": str(tmp_path / "cache"), "max_steps": 1}

    def computes(model=None, rows=dataset) -> tuple[bool, bool]:
        run = Run(tmp_path, processor, rows, True, model=model, **settings)
        return run.images > 0, run.expressions > 0

    assert computes() == (True, True) and computes() == (False, False)
    model = tiny_model(box_head="map")
    torch.nn.init.ones_(model.model.text_model.embeddings.LayerNorm.bias)
    assert computes(model) == (False, True)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert computes() == (True, False)
    processor.do_lower_case = True
    assert computes() == (False, True)
    assert computes(rows=dataset.select(range(len(dataset) - 1))) == (True, True)
    (shard, *_) = sorted((tmp_path / "cache").rglob("images-*.arrow"))
    shard.unlink()
    assert sum(computes()) + sum(computes(rows=dataset.select(range(len(dataset) - 1)))) <= 1


def _unfinished(name: str, because: str) -> str:
    return f"cache_frozen_towers: the {name} runs in every step, because {because}"


BOTH = ("vision backbone", "text tower")


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"frozen_parameters": ["vision_model"]}, [_unfinished(BOTH[1], "21 of its parameters are trained")]),
        (
            {"augment": True},
            [_unfinished(name, "its input is augmented (augment), transformed or streamed") for name in BOTH],
        ),
        (
            {"teacher": TinyTeacher(), "cache_teacher": False},
            [_unfinished(BOTH[0], "the teacher sees the pixels in every step (cache_teacher)")],
        ),
    ],
    ids=["trained", "augmented", "teacher"],
)
def test_what_cannot_be_cached_is_said(tmp_path, processor, changes, sentences, caplog):
    with caplog.at_level(logging.WARNING, "epmvg_hf"):
        Run(tmp_path, processor, uneven_shapes([8, 1, 5, 3]), cached=True, max_steps=1, **changes)
    assert [record.getMessage() for record in caplog.records if "towers" in record.name] == sentences


def test_streams_and_padding_on_the_left_are_said(tmp_path, processor, caplog):
    dataset = uneven_shapes([8, 1, 5, 3])
    Run(tmp_path, processor, dataset.to_iterable_dataset(), cached=True, max_steps=1)
    assert caplog.text.count("its input is augmented (augment), transformed or streamed") == 2
    processor.tokenizer.padding_side = "left"
    Run(tmp_path, processor, dataset, cached=True, max_steps=1)
    assert "the text tower runs in every step, because its tokenizer pads on the left" in caplog.text


def test_a_tower_with_an_adapter_is_trained(tmp_path, processor, caplog):
    model = get_peft_model(tiny_model(box_head="map"), LoraConfig(r=2, target_modules=r".*text_model.*(query|value)"))
    run = Run(tmp_path, processor, uneven_shapes([8, 1, 5, 3]), True, model=model, frozen_parameters=None)
    assert "the text tower runs in every step, because 4 of its parameters are trained" in caplog.text
    assert run.images == 4 and run.expressions > 8


def test_rows_without_an_image(tmp_path, processor):
    rows = uneven_shapes([2, 1])
    first = rows.to_list()[0]
    dataset = Dataset.from_list([first, {**first, "image_id": "x", "image": None}], rows.features)
    assert len(ImageGroups(dataset)) == 2
    with pytest.raises(
        ValueError, match="the vision backbone cannot be cached for row 1 of the dataset, which has no"
    ):
        Run(tmp_path, processor, dataset, cached=True)


def test_folder(tmp_path, processor):
    Run(tmp_path, processor, uneven_shapes([2, 1]), cached=True, max_steps=1, tower_cache_dir=None)
    files = {path.name for path in Path(datasets.config.HF_DATASETS_CACHE, "epmvg_towers").rglob("*.*")}
    assert files >= {"images-00000-of-00001.arrow", "expressions-00000-of-00001.arrow", "key.json"}
