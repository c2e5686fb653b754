from importlib.util import find_spec

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from safetensors.torch import load_file

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from tests.fixtures.models import ONE_STEP, tiny_model
from tests.fixtures.paths import DISTRIBUTED
from tests.fixtures.process_groups import run_script
from tests.fixtures.tiny_teacher import TinyTeacher

WITHOUT = {"relation_loss_coefficient": 0.0, "feature_loss_coefficient": 0.0, "teacher_map_loss_coefficient": 0.0}


@pytest.fixture
def dataset():
    return load_grounding_dataset("shapes", split="train", num_images=12)


def _trainer(folder, processor, dataset, model=None, teacher=None, caption_dataset=None, callbacks=None, **arguments):
    defaults = {
        **ONE_STEP,
        "output_dir": str(folder),
        "per_device_train_batch_size": 12,
        "max_grad_norm": 0.0,
        **dict.fromkeys(WITHOUT, 1.0),
    }
    return EpmVGTrainer(
        model or tiny_model(box_head="map", frozen_batch_norm=True, teacher_projection_dim=24),
        EpmVGTrainingArguments(**{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
        teacher=teacher,
        caption_dataset=caption_dataset,
        callbacks=callbacks,
    )


def _first_log(trainer: EpmVGTrainer) -> dict[str, float]:
    trainer.train()
    return trainer.state.log_history[0]


def test_loss_is_the_weighted_sum_of_its_terms(tmp_path, processor, dataset):
    weights = {
        "relation_loss_coefficient": 0.5,
        "feature_loss_coefficient": 2.0,
        "teacher_map_loss_coefficient": 0.3,
    }
    log = _first_log(_trainer(tmp_path, processor, dataset, teacher=TinyTeacher(), **weights))
    box = log["loss_bbox"] + log["loss_giou"] + log["loss_map"]
    distilled = 0.5 * log["loss_relation"] + 2 * log["loss_feature"] + 0.3 * log["loss_teacher_map"]
    assert log["loss"] == pytest.approx(box + distilled, rel=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_terms_fall_and_the_student_moves_into_the_teachers_space(tmp_path, processor, dataset, cached):
    trainer = _trainer(
        tmp_path, processor, dataset, teacher=TinyTeacher(), cache_teacher=cached, max_steps=30, learning_rate=3e-3
    )
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[29]
    for name in ("loss_relation", "loss_feature", "loss_teacher_map"):
        assert last[name] < first[name] - 0.05, name


def test_distil_only_trains_what_stands_before_fusion_and_nothing_else(tmp_path, processor, dataset, monkeypatch):
    """The terms are those of a usual step. Fusion is not even run, and boxes, which are all empty, play no part."""
    usual = _first_log(_trainer(tmp_path, processor, dataset, teacher=TinyTeacher()))
    rows = dataset.remove_columns("box").add_column("box", [None] * len(dataset))
    model = tiny_model(box_head="map", frozen_batch_norm=True, teacher_projection_dim=24)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = _trainer(tmp_path, processor, rows, model=model, teacher=TinyTeacher(), distil_only=True)
    monkeypatch.setattr(model.model, "_fuse", None)
    log = _first_log(trainer)
    assert {name: log[name] for name in log if name.startswith("loss_")} == pytest.approx(
        {name: usual[name] for name in ("loss_relation", "loss_feature", "loss_teacher_map")}
    )
    assert log["loss"] == pytest.approx(sum(value for name, value in log.items() if name.startswith("loss_")))
    changed = {name.split(".")[1] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {
        "vision_model", "input_projection", "encoder", "visual_projection", "text_model", "text_projection",
        "teacher_image_projection", "teacher_text_projection",
    }  # fmt: skip
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "fusion" in name)


def test_distil_only_needs_a_teacher_that_teaches_and_nothing_to_evaluate(tmp_path, processor, dataset):
    with pytest.raises(ValueError, match="distil_only needs a teacher"):
        _trainer(tmp_path, processor, dataset, distil_only=True)
    with pytest.raises(ValueError, match="distil_only trains by the terms of the distillation, and all their weights"):
        EpmVGTrainingArguments(str(tmp_path), distil_only=True, **WITHOUT)
    with pytest.raises(ValueError, match='eval_strategy must be "no", got'):
        EpmVGTrainingArguments(str(tmp_path), distil_only=True, eval_strategy="epoch")


def test_without_weights_the_teacher_is_never_asked(tmp_path, processor, dataset):
    teacher = TinyTeacher()
    with_teacher = _trainer(tmp_path, processor, dataset, teacher=teacher, **WITHOUT)
    log, plain = _first_log(with_teacher), _first_log(_trainer(tmp_path, processor, dataset))
    assert teacher.calls == 0
    assert log["loss"] == plain["loss"] and log["grad_norm"] == plain["grad_norm"]
    assert not any(name in log for name in ("loss_relation", "loss_feature", "loss_teacher_map"))


def test_teacher_is_neither_saved_nor_optimized_nor_changed(tmp_path, processor, dataset):
    teacher = TinyTeacher()
    before = teacher.projection.clone()
    trainer = _trainer(tmp_path, processor, dataset, teacher=teacher, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) == set(trainer.model.state_dict()) and not any(name == "projection" for name in saved)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert id(teacher.projection) not in optimized and torch.equal(teacher.projection, before)
    assert teacher.projection.grad is None and not teacher.training


def test_cached_equals_on_the_fly(tmp_path, processor, dataset):
    captioned = load_grounding_dataset("shapes", split="validation", num_images=5).remove_columns("box")
    teachers = TinyTeacher(), TinyTeacher()
    logs = [
        _first_log(_trainer(tmp_path, processor, dataset, teacher=teacher, caption_dataset=captioned, cache_teacher=c))
        for teacher, c in zip(teachers, (True, False), strict=True)
    ]
    for name in ("loss_relation", "loss_feature", "loss_teacher_map"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=2e-3), name  # float16 on disk
    calls = teachers[0].calls
    _first_log(_trainer(tmp_path, processor, dataset, teacher=teachers[0], caption_dataset=captioned))
    assert calls > 0 and teachers[0].calls == calls


def test_augmented_images_are_shown_to_the_teacher_as_the_student_sees_them(tmp_path, processor, dataset):
    teacher = TinyTeacher()
    log = _first_log(_trainer(tmp_path, processor, dataset, teacher=teacher, augment=True, max_steps=3))
    assert teacher.calls == 3 and np.isfinite(log["loss"])


def test_captions_teach_without_boxes_and_boxes_that_they_have_are_learned(tmp_path, processor, dataset):
    """Rows without a box must not dilute the mean over boxes."""
    captioned = load_grounding_dataset("shapes", split="validation", num_images=12)
    arguments = {"teacher": TinyTeacher(), "per_device_train_batch_size": 24}
    plain = _first_log(_trainer(tmp_path, processor, dataset, teacher=TinyTeacher()))
    without, boxed = (
        _first_log(_trainer(tmp_path, processor, dataset, caption_dataset=captions, **arguments))
        for captions in (captioned.remove_columns("box"), captioned)
    )
    # As many images are labelled as are captioned; the mean is over all expressions with a box.
    both = concatenate_datasets([dataset, captioned.select_columns(dataset.column_names)])
    together = _first_log(_trainer(tmp_path, processor, both, **arguments))
    for name in ("loss_bbox", "loss_giou", "loss_map"):
        assert without[name] == pytest.approx(plain[name], rel=1e-5)
        assert boxed[name] == pytest.approx(together[name], rel=1e-5)
    assert boxed["loss_giou"] != pytest.approx(plain["loss_giou"], rel=1e-3)
    assert without["loss_feature"] != pytest.approx(plain["loss_feature"], rel=1e-3)
    assert without["loss_relation"] > plain["loss_relation"] * 0.5


def test_a_batch_of_captions_alone_trains(tmp_path, processor, dataset):
    from datasets import Value

    rows = dataset.map(lambda row: {"box": None}, features=None)
    assert rows[0]["box"] is None or rows.features["box"] == Value("null")
    log = _first_log(_trainer(tmp_path, processor, rows, teacher=TinyTeacher()))
    assert np.isfinite(log["loss"]) and np.isfinite(log["grad_norm"]) and "loss_bbox" not in log


def test_accumulated_batches_equal_one_batch_but_for_the_relation(tmp_path, processor, dataset):
    """The relation compares within a batch, so smaller batches give it another value; the other terms are means."""
    arguments = {"teacher": TinyTeacher(), "relation_loss_coefficient": 0.0, "feature_loss_coefficient": 0.0}
    whole = _first_log(_trainer(tmp_path, processor, dataset, **arguments))
    parts = _first_log(
        _trainer(
            tmp_path, processor, dataset, per_device_train_batch_size=3, gradient_accumulation_steps=4, **arguments
        )
    )
    for name in ("loss", "grad_norm", "loss_teacher_map", "loss_bbox"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_impossible_combinations_are_refused(tmp_path, processor, dataset):
    with pytest.raises(ValueError, match="need a model with teacher_projection_dim"):
        _trainer(tmp_path, processor, dataset, model=tiny_model(), teacher=TinyTeacher())
    with pytest.raises(ValueError, match=r"\(24\) to be the teacher's width \(16\)"):
        _trainer(tmp_path, processor, dataset, teacher=TinyTeacher(embed_dim=16))
    _trainer(tmp_path, processor, dataset, teacher=TinyTeacher(embed_dim=16), feature_loss_coefficient=0.0)
    without_patches = TinyTeacher()
    without_patches.has_patches = False
    with pytest.raises(ValueError, match="set teacher_map_loss_coefficient to 0"):
        _trainer(tmp_path, processor, dataset, teacher=without_patches)
    with pytest.raises(ValueError, match="caption_dataset needs a teacher"):
        _trainer(tmp_path, processor, dataset, caption_dataset=dataset.remove_columns("box"))
    _trainer(tmp_path, processor, dataset, caption_dataset=dataset)  # its boxes teach something
    with pytest.raises(ValueError, match="has no column box"):
        _trainer(tmp_path, processor, dataset.remove_columns("box"), teacher=TinyTeacher()).train()
    with pytest.raises(ValueError, match="caption_dataset needs a term"):
        captions = dataset.remove_columns("box")
        _trainer(tmp_path, processor, dataset, teacher=TinyTeacher(), caption_dataset=captions, **WITHOUT)


def test_two_processes_equal_one(tmp_path):
    """
    Every term: 8 images of 1 to 8 expressions, half of them without boxes, as one batch or as half a batch on each of
    two processes; and all terms together with the student sharded by FSDP2, and by DeepSpeed's ZeRO-2 where that is
    installed, the teacher outside.
    """
    zero2 = ["deepspeed"] if find_spec("deepspeed") else []
    script = DISTRIBUTED / "distillation.py"
    one, two = run_script(script, tmp_path / "one", 1, "8"), run_script(script, tmp_path / "two", 2, "4", *zero2)
    assert (one["processes"], two["processes"]) == (1, 2)
    for run, log in one["logs"].items():
        for name, value in log.items():
            assert two["logs"][run][name] == pytest.approx(value, rel=1e-5), (run, name)
    pairs = [(run, run) for run in one["logs"]] + [("all", "all, sharded")] + [("all", "all, zero2") for _ in zero2]
    for run, other in pairs:
        gradients = load_file(tmp_path / "one" / f"{run}.safetensors")
        others = load_file(tmp_path / "two" / f"{other}.safetensors")
        assert gradients.keys() == others.keys()
        difference = sum(((gradients[name] - others[name]) ** 2).sum() for name in gradients) ** 0.5
        print(f"{other}: relative difference of the gradients {difference / one['logs'][run]['grad_norm']:.1e}")
        assert difference <= 1e-5 * one["logs"][run]["grad_norm"], other
    assert {f"loss_{name}" for name in ("bbox", "giou", "map", "relation", "feature", "teacher_map")} <= set(
        one["logs"]["all"]
    )


def _captions_of(log: dict[int, set[str]], trainer_module, monkeypatch):
    """Note which captioned images each epoch shows."""
    shown = trainer_module.CaptionedGroups.__getitem__

    def noting(self, index):
        group = shown(self, index)
        if index >= len(self.labelled):
            log.setdefault(self.epoch.item(), set()).add(group.image_id)
        return group

    monkeypatch.setattr(trainer_module.CaptionedGroups, "__getitem__", noting)


def test_every_epoch_shows_other_captions_also_when_accelerate_hides_the_dataset(
    tmp_path, processor, dataset, monkeypatch
):
    from epmvg_hf.training import trainer as trainer_module

    captioned = load_grounding_dataset("shapes", split="validation", num_images=36).remove_columns("box")
    log = {}
    _captions_of(log, trainer_module, monkeypatch)
    arguments = {"teacher": TinyTeacher(), "caption_dataset": captioned, "per_device_train_batch_size": 24}
    arguments |= {"save_strategy": "steps", "save_steps": 1, "max_steps": -1, "num_train_epochs": 3}
    _trainer(tmp_path, processor, dataset, **arguments).train()
    assert list(log) == [0, 1, 2]
    assert sorted(name for names in log.values() for name in names) == sorted(set(captioned["image_id"]))
    straight = dict(log)
    log.clear()
    _trainer(tmp_path, processor, dataset, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert log == {epoch: straight[epoch] for epoch in (1, 2)}


def test_rows_without_boxes_are_predicted_and_measure_nothing(tmp_path, processor, dataset):
    rows = dataset.map(lambda row, index: {"box": None if index % 2 else row["box"]}, with_indices=True)
    some = _trainer(tmp_path, processor, rows)
    whole = _trainer(tmp_path, processor, dataset.select(range(0, len(dataset), 2)), model=some.model)
    output, metrics, expected = some.predict(rows), some.evaluate(), whole.evaluate()
    assert len(output.predictions) == len(rows)
    for name in ("eval_mean_iou", "eval_acc@0.5", "eval_loss", "eval_loss_map"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name


def test_projections_that_no_term_uses_ask_for_no_gradient(tmp_path, processor, dataset):
    def asking(**arguments) -> set[str]:
        trainer = _trainer(tmp_path, processor, dataset, **arguments)
        return {name for name, p in trainer.model.named_parameters() if "teacher_" in name and p.requires_grad}

    assert asking() == asking(teacher=TinyTeacher(), relation_loss_coefficient=0.0, feature_loss_coefficient=0.0)
    assert asking() == set() and len(asking(teacher=TinyTeacher())) == 2


@pytest.mark.parametrize("cache_teacher", [True, False])
def test_the_teacher_runs_in_the_autocast_dtype(tmp_path, processor, dataset, cache_teacher):
    class Noting(TinyTeacher):
        def encode_images(self, pixel_values, output_patches=True):
            self.dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            return super().encode_images(pixel_values, output_patches)

    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        teacher = Noting()
        arguments = {"cache_teacher": cache_teacher, "teacher_cache_dir": str(tmp_path / "cache"), "bf16": bf16}
        _trainer(tmp_path, processor, dataset, teacher=teacher, **arguments).train()
        assert teacher.dtype == dtype


def test_the_map_may_be_taught_only_where_there_is_no_box(tmp_path, processor, dataset):
    captioned = load_grounding_dataset("shapes", split="validation", num_images=12).remove_columns("box")
    arguments = {"relation_loss_coefficient": 0.0, "feature_loss_coefficient": 0.0, "teacher_map_rows": "without_box"}
    alone = _first_log(_trainer(tmp_path, processor, dataset, teacher=TinyTeacher(), **arguments))
    assert alone["loss"] == pytest.approx(alone["loss_bbox"] + alone["loss_giou"] + alone["loss_map"], rel=1e-5)
    arguments |= {"per_device_train_batch_size": 24, "caption_dataset": captioned, "teacher": TinyTeacher()}
    mixed = _first_log(_trainer(tmp_path, processor, dataset, **arguments))
    captions = captioned.map(lambda row: {"box": None})
    only = _first_log(_trainer(tmp_path, processor, captions, **{**arguments, "caption_dataset": None}))
    assert mixed["loss_teacher_map"] == pytest.approx(only["loss_teacher_map"], rel=1e-5)
    assert mixed["loss"] == pytest.approx(alone["loss"] + mixed["loss_teacher_map"], rel=1e-5)


@pytest.mark.parametrize("rows", ["all", "without_box"])
def test_the_map_is_not_taught_for_what_is_absent(tmp_path, processor, dataset, rows):
    """Rows that name nothing in their image change neither the term nor its weight, whatever the batches."""
    captions = dataset.map(lambda row, index: {"box": None if index % 3 else row["box"]}, with_indices=True)
    arguments = {"relation_loss_coefficient": 0.0, "feature_loss_coefficient": 0.0, "teacher_map_rows": rows}
    arguments |= {"teacher": TinyTeacher(), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    without = _first_log(_trainer(tmp_path, processor, captions, **arguments))
    shown = captions.add_column("absent", [False] * len(captions))
    gone = shown.map(lambda row: {"box": None, "absent": True}).select(range(0, len(shown), 5))
    both = _first_log(_trainer(tmp_path, processor, concatenate_datasets([shown, gone]), **arguments))
    for name in ("loss", "loss_teacher_map", "loss_bbox"):
        assert both[name] == pytest.approx(without[name], rel=1e-5), name
