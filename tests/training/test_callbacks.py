import copy
import json
import shutil

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from epmvg_hf import EpmVGForVisualGrounding, EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from epmvg_hf.training.callbacks import TRAINED_WEIGHTS
from epmvg_hf.training.checkpoint_files import CHECKSUMS
from tests.fixtures.models import ONE_STEP, tiny_model

DECAY = 0.7


@pytest.fixture
def dataset():
    return load_grounding_dataset("shapes", split="train", num_images=16)


class Snapshots(TrainerCallback):
    """Keeps the weights in training after each step."""

    def __init__(self):
        self.models = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.models.append(copy.deepcopy(model))


def _trainer(folder, processor, dataset, seed=0, **arguments) -> tuple[EpmVGTrainer, Snapshots]:
    defaults = {
        **ONE_STEP,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "ema_decay": DECAY,
    }
    snapshots = Snapshots()
    trainer = EpmVGTrainer(
        tiny_model(seed, box_head="map"),
        EpmVGTrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
        callbacks=[snapshots],
    )
    return trainer, snapshots


def _equal(model, other) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def _average(models):
    """The expected average: torch's, over the weights after each step."""
    average = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for model in models:
        average.update_parameters(model)
    return average.module.eval()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_average_is_evaluated_saved_and_kept(tmp_path, processor, dataset, bf16):
    every_step = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "bf16": bf16}
    trainer, snapshots = _trainer(tmp_path, processor, dataset, **every_step)
    trainer.train()
    for step in (2, 4):
        average = _average(snapshots.models[:step])
        saved = EpmVGForVisualGrounding.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert _equal(saved, average) and not _equal(saved, snapshots.models[step - 1])
        logged = next(log for log in trainer.state.log_history if log["step"] == step and "eval_loss" in log)
        plain = EpmVGTrainer(average, EpmVGTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, bf16=bf16, disable_tqdm=True, dataloader_pin_memory=False
        ), eval_dataset=dataset, processing_class=processor)  # fmt: skip
        for name, value in plain.evaluate().items():
            if name.startswith("eval_loss") or name == "eval_mean_iou":
                assert logged[name] == pytest.approx(value, rel=1e-5), name
    # Training itself is the same as without an average.
    assert _equal(trainer.model, average)
    trainer.save_model()
    assert _equal(EpmVGForVisualGrounding.from_pretrained(tmp_path), average)
    assert not (tmp_path / TRAINED_WEIGHTS).exists()


def test_averaging_does_not_change_training(tmp_path, processor, dataset):
    trainer, with_average = _trainer(tmp_path / "a", processor, dataset)
    trainer.train()
    trainer, without = _trainer(tmp_path / "b", processor, dataset, ema_decay=None)
    trainer.train()
    assert all(map(_equal, with_average.models, without.models))
    assert _equal(trainer.model, without.models[-1])


def test_resumed_training_keeps_both_weights(tmp_path, processor, dataset):
    arguments = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    straight, _ = _trainer(tmp_path / "a", processor, dataset, **arguments)
    straight.train()
    # Two processes of a run: the second begins at the end of the first's epoch, with other weights in memory.
    resumed, snapshots = _trainer(tmp_path / "b", processor, dataset, seed=1, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert len(snapshots.models) == 2
    assert _equal(resumed.model, straight.model)
    for name in ("model.safetensors", TRAINED_WEIGHTS):
        first, second = (tmp_path / run / "checkpoint-4" / name for run in "ab")
        assert first.read_bytes() == second.read_bytes()

    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "without")
    for name in (TRAINED_WEIGHTS, CHECKSUMS):
        (tmp_path / "without" / name).unlink()
    trainer, _ = _trainer(tmp_path / "c", processor, dataset)
    with pytest.raises(ValueError, match="cannot be resumed with ema_decay: it has no average"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "without"))


def test_the_best_average_is_loaded_at_the_end(tmp_path, processor, dataset):
    trainer, _ = _trainer(
        tmp_path, processor, dataset, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="mean_iou", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = EpmVGForVisualGrounding.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step < 4 and _equal(trainer.model, best)
    assert trainer.evaluate()["eval_mean_iou"] == pytest.approx(trainer.state.best_metric)


def _losses(log_history) -> dict[int, dict]:
    """The lines of a log with a loss of training, by their steps, none of which comes twice."""
    lines = [line for line in log_history if "loss" in line]
    by_step = {line["step"]: line for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def test_a_run_that_is_shorter_than_logging_steps_shows_its_loss(tmp_path, processor, dataset):
    arguments = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer, _ = _trainer(tmp_path, processor, dataset, logging_steps=10, **arguments)
    trainer.train()
    (line,) = _losses(trainer.state.log_history).values()
    single, _ = _trainer(tmp_path / "single", processor, dataset)
    single.train()
    steps = _losses(single.state.log_history).values()
    for name in ("loss", "loss_bbox", "loss_giou", "loss_map"):
        assert line[name] == pytest.approx(sum(step[name] for step in steps) / 4, rel=1e-5), name
    # It stands before the evaluation, and in the last checkpoint.
    assert trainer.state.log_history[0] is line and "eval_loss" in trainer.state.log_history[1]
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert _losses(saved["log_history"]) == {4: line}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"logging_steps": 2, "max_steps": 5}, [2, 4, 5]),
        ({"logging_steps": 2, "max_steps": 4}, [2, 4]),
        ({"logging_steps": 10, "max_steps": -1, "num_train_epochs": 2}, [8]),
        ({"logging_strategy": "epoch", "max_steps": 6}, [4, 6]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_the_last_step_is_logged_once(tmp_path, processor, dataset, arguments, expected):
    trainer, _ = _trainer(tmp_path, processor, dataset, **arguments)
    trainer.train()
    assert list(_losses(trainer.state.log_history)) == expected


def test_an_evaluation_that_stops_the_training_leaves_no_step_out(tmp_path, processor, dataset):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer, _ = _trainer(tmp_path, processor, dataset, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(Stop)
    trainer.train()
    assert list(_losses(trainer.state.log_history)) == [2, 3]
