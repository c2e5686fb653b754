import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from epmvg_hf.training.finite_steps import FiniteSteps, NonFiniteError
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor
from tests.fixtures.tiny_teacher import TinyTeacher


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.after.append({name: value.clone() for name, value in model.named_parameters()})


def _trainer(folder: Path, teacher=None, callbacks=None, **arguments) -> EpmVGTrainer:
    dataset = load_grounding_dataset("shapes", split="train", num_images=16)
    defaults = {**ONE_STEP, "output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    return EpmVGTrainer(
        model=tiny_model(box_head="map", frozen_batch_norm=True),
        args=EpmVGTrainingArguments(**{**defaults, "per_device_train_batch_size": 4, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny_processor(),
        teacher=teacher,
        callbacks=callbacks,
    )


def test_a_rate_that_is_too_high_ends_the_training_before_a_weight_is_lost(tmp_path):
    trainer = _trainer(tmp_path, learning_rate=1e30, max_grad_norm=0.0, lr_scheduler_type="constant", optim="sgd")
    with pytest.raises(NonFiniteError, match=r"step \d: .* (nan|inf).*a lower learning rate may help"):
        trainer.train()
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values() if value.is_floating_point())


class BrokenTeacher(TinyTeacher):
    def encode_texts(self, expressions: list[str]) -> torch.Tensor:
        embeds = super().encode_texts(expressions).clone()
        embeds[1] = torch.nan
        return embeds


def test_a_teacher_that_gives_no_numbers_is_named(tmp_path):
    trainer = _trainer(tmp_path, teacher=BrokenTeacher(), cache_teacher=False)
    words = r"step 1: loss_teacher_map is nan, .*because teacher_text_embeds has NaN or infinity in rows \d+"
    with pytest.raises(NonFiniteError, match=words):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def _break_second_step(trainer: EpmVGTrainer, monkeypatch) -> None:
    compute_loss = trainer.compute_loss

    def broken(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss * torch.nan if trainer.model.training and trainer.state.global_step == 1 else loss

    monkeypatch.setattr(trainer, "compute_loss", broken)


def test_a_step_is_skipped_where_that_is_asked_for(tmp_path, monkeypatch, caplog):
    weights = Weights()
    trainer = _trainer(tmp_path, callbacks=[weights], nonfinite_steps="skip", max_steps=3)
    _break_second_step(trainer, monkeypatch)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "step 2: the norm of the gradient is nan" in caplog.text and "The step was skipped" in caplog.text
    first, second, third = weights.after
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(value.isfinite().all() for value in third.values())


def test_a_gradient_alone_ends_the_training(tmp_path, monkeypatch):
    trainer = _trainer(tmp_path)
    _break_second_step(trainer, monkeypatch)
    with pytest.raises(NonFiniteError, match="step 2: the norm of the gradient is nan, while all loss terms"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_other_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match='nonfinite_steps must be "stop" or "skip", got'):
        EpmVGTrainingArguments(str(tmp_path), nonfinite_steps="ignore")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"pixel_values": torch.tensor([[[1.0]], [[torch.inf]]])}, "pixel_values has NaN or infinity in rows 8, 9"),
        ({"teacher_text_embeds": torch.tensor([[1.0], [torch.nan], [0.0]])}, "teacher_text_embeds .* in rows 8$"),
        ({"labels": torch.full((3, 4), torch.nan)}, r"all inputs of the batch \(rows 7, 8, 9\) are numbers"),
    ],
    ids=["image", "expression", "no box"],
)
def test_rows_are_named(inputs, words):
    steps = FiniteSteps(skips=False, has_scaler=False)
    known = {"row_index": torch.tensor([7, 8, 9]), "image_index": torch.tensor([0, 1, 1])}
    steps.watch_terms({"loss_map": torch.tensor(torch.nan), "loss_giou": torch.tensor(1.0)}, {**known, **inputs})
    assert not steps._step.is_finite(with_gradient=True)
    sentence = steps._step.describe()
    assert "loss_map is nan" in sentence and "loss_giou" not in sentence
    assert re.search(words, sentence), sentence


def test_weights_that_are_no_numbers_are_neither_saved_nor_give_a_box(tmp_path, processor):
    trainer = _trainer(tmp_path)
    with torch.no_grad():
        trainer.model.box_head[-1].bias[0] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"the model is not saved: NaN or infinity in 1 of its \d+ tensors, such as box_head"
    ):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="The box of expression 0 is"):
        trainer.evaluate()
