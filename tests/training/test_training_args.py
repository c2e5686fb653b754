import pytest
import torch
from transformers.trainer_pt_utils import AcceleratorConfig

from epmvg_hf import EpmVGTrainingArguments


def test_raw_columns_must_stay(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        EpmVGTrainingArguments(output_dir=tmp_path, remove_unused_columns=True)


def test_freezing_needs_unused_parameters(tmp_path):
    assert EpmVGTrainingArguments(output_dir=tmp_path, freeze_backbone_epochs=1).ddp_find_unused_parameters
    with pytest.raises(ValueError, match="freeze_backbone_epochs needs ddp_find_unused_parameters"):
        EpmVGTrainingArguments(output_dir=tmp_path, freeze_backbone_epochs=1, ddp_find_unused_parameters=False)


def test_plain_python_on_many_gpus_does_not_split_the_batch(tmp_path, monkeypatch):
    arguments = EpmVGTrainingArguments(output_dir=tmp_path, per_device_train_batch_size=3, use_cpu=True)
    # What transformers finds on a machine with four GPUs, started without a launcher.
    monkeypatch.setattr(arguments, "_n_gpu", 4)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 3 and arguments.eval_batch_size == arguments.per_device_eval_batch_size


def test_streamed_rows_are_collated_where_they_are_used(tmp_path):
    arguments = EpmVGTrainingArguments(output_dir=tmp_path, use_cpu=True)
    assert arguments.accelerator_config.dispatch_batches is False
    own = EpmVGTrainingArguments(output_dir=tmp_path, use_cpu=True, accelerator_config={"even_batches": True})
    assert own.accelerator_config.dispatch_batches is False
    (tmp_path / "accelerator.json").write_text('{"even_batches": true}')
    for form in (AcceleratorConfig(), str(tmp_path / "accelerator.json")):
        own = EpmVGTrainingArguments(output_dir=tmp_path, use_cpu=True, accelerator_config=form)
        assert own.accelerator_config.dispatch_batches is False
    with pytest.raises(ValueError, match="dispatch_batches must not be True"):
        EpmVGTrainingArguments(use_cpu=True, accelerator_config={"dispatch_batches": True})
    assert arguments.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("caption_ratio", 0.0),
        ("relation_loss_coefficient", -1.0),
        ("map_temperature", 0.0),
        ("teacher_temperature", -1),
    ],
)
def test_impossible_distillation_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must"):
        EpmVGTrainingArguments(use_cpu=True, **{argument: value})


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_impossible_averages_are_refused(decay):
    with pytest.raises(ValueError, match="ema_decay must lie between 0 and 1"):
        EpmVGTrainingArguments(use_cpu=True, ema_decay=decay)


@pytest.mark.parametrize("epochs", [[0], [2, 3]])
def test_learning_rates_drop_within_the_epochs(epochs):
    with pytest.raises(ValueError, match="lr_drop_epochs must lie within the 3 epochs"):
        EpmVGTrainingArguments(use_cpu=True, num_train_epochs=3, lr_drop_epochs=epochs)
