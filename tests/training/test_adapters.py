"""LoRA of PEFT on text tower, visual encoder and convolutions: trained, saved, loaded, merged."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForZeroShotObjectDetection, TrainerCallback, pipeline

from epmvg_hf import EpmVGForVisualGrounding, EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from epmvg_hf.training.callbacks import TRAINED_WEIGHTS
from tests.fixtures.models import ONE_STEP, tiny_model

# The modules with adapters: BERT's, the visual encoder's and the fusion transformer's, and the ResNet's.
TARGETS = ["query", "value", "q_proj", "v_proj", "convolution"]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


@pytest.fixture(scope="module")
def dataset():
    return load_grounding_dataset("shapes", split="train", num_images=6)


@pytest.fixture
def base(tmp_path, processor) -> Path:
    tiny_model(box_head="map").save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _load(folder) -> EpmVGForVisualGrounding:
    return EpmVGForVisualGrounding.from_pretrained(folder)


def _config(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, **changes})


def _wrapped(base: Path, **changes) -> PeftModel:
    return get_peft_model(_load(base), _config(**changes))


def _own(base: Path, **changes) -> EpmVGForVisualGrounding:
    model = _load(base)
    model.add_adapter(_config(**changes))
    return model


both_ways = pytest.mark.parametrize("with_adapter", [_wrapped, _own], ids=["get_peft_model", "add_adapter"])


def _trainer(folder, processor, dataset, model, callbacks=None, **changes) -> EpmVGTrainer:
    arguments = {**ONE_STEP, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 2, **changes}
    return EpmVGTrainer(
        model, EpmVGTrainingArguments(str(folder), **arguments), train_dataset=dataset, eval_dataset=dataset,
        processing_class=processor, callbacks=callbacks,
    )  # fmt: skip


@torch.no_grad()
def _boxes(model, processor, dataset) -> torch.Tensor:
    rows = dataset.select(range(8))
    return model.eval()(**processor(images=rows["image"][:], text=rows["expression"][:])).pred_boxes


def _weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@both_ways
@pytest.mark.parametrize("modules_to_save", [None, ["box_head"]])
def test_an_adapter_is_saved_alone_and_gives_the_same_boxes(
    tmp_path, processor, dataset, base, with_adapter, modules_to_save
):
    model = with_adapter(base, modules_to_save=modules_to_save)
    before, untrained = _boxes(model, processor, dataset), _weights(model)
    trainer = _trainer(tmp_path / "out", processor, dataset, model)
    trainer.train()
    trainer.save_model()
    boxes = _boxes(model, processor, dataset)
    assert (boxes - before).abs().max() > 1e-3
    # Nothing of the base model changes, not even the statistics of its batch norms, which an adapter could not save.
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, untrained[name])}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    for part in ("vision_model", "encoder", "text_model", "fusion"):
        assert any(f"model.{part}." in name for name in changed), part

    assert not (tmp_path / "out" / "model.safetensors").exists()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all("lora_" in name or "box_head" in name for name in saved)
    assert any("box_head" in name for name in saved) == (modules_to_save is not None)
    adapted = PeftModel.from_pretrained(_load(base), tmp_path / "out")
    loaded = _load(base)
    loaded.load_adapter(str(tmp_path / "out"))
    by_class = _load(tmp_path / "out")
    by_auto_class = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path / "out")
    for again in (adapted, loaded, by_class, by_auto_class):
        torch.testing.assert_close(_boxes(again, processor, dataset), boxes, atol=1e-6, rtol=0)
    merged = adapted.merge_and_unload()
    assert type(merged) is EpmVGForVisualGrounding
    torch.testing.assert_close(_boxes(merged, processor, dataset), boxes, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_boxes(_load(tmp_path / "merged"), processor, dataset), boxes, atol=1e-5, rtol=0)


@both_ways
def test_the_pipeline_takes_a_model_with_adapter_and_its_folder(tmp_path, processor, dataset, base, with_adapter):
    model = with_adapter(base)
    nn.init.normal_(dict(model.named_parameters())[_last_lora(model)])
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    image, expression = dataset[0]["image"], "the red circle"
    found = pipeline("visual-grounding", model=model, processor=processor)(image, expression)
    assert pipeline("visual-grounding", model=str(tmp_path / "out"))(image, expression) == found
    assert pipeline("visual-grounding", model=str(base))(image, expression) != found


def _last_lora(model) -> str:
    return [name for name, _ in model.named_parameters() if "lora_B" in name][-1]


@both_ways
def test_an_adapter_whose_base_moved_says_so(tmp_path, processor, dataset, base, with_adapter, monkeypatch):
    with_adapter(base).save_pretrained(tmp_path / "out")
    base.rename(tmp_path / "moved")
    with pytest.raises(OSError) as caught:
        _load(tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out is an adapter whose base model could not be loaded from {base}, as its adapter_config.json "
        f"names it: correct base_model_name_or_path there, or load the base model from where it is and then call "
        f"its load_adapter({str(tmp_path / 'out')!r})."
    )
    model = _load(tmp_path / "moved")
    model.load_adapter(str(tmp_path / "out"))
    assert _boxes(model, processor, dataset).isfinite().all()
    monkeypatch.setattr("epmvg_hf.model.base_epmvg.is_peft_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
    with pytest.raises(OSError, match=r"out is an adapter, which needs peft: pip install peft\.$"):
        _load(tmp_path / "out")


@both_ways
def test_the_best_adapter_is_loaded_at_the_end(tmp_path, processor, dataset, base, with_adapter):
    model = with_adapter(base)
    trainer = _trainer(
        tmp_path / "out", processor, dataset, model, **EVERY_STEP, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="mean_iou", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert trainer.evaluate()["eval_mean_iou"] == pytest.approx(trainer.state.best_metric)
    best = _load(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(_boxes(best, processor, dataset), _boxes(model, processor, dataset), atol=1e-6, rtol=0)


@both_ways
@pytest.mark.parametrize("ema_decay", [None, 0.7])
def test_resumed_training_is_bit_equal(tmp_path, processor, dataset, base, with_adapter, ema_decay):
    torch.manual_seed(0)
    straight, resumed = with_adapter(base), with_adapter(base)
    arguments = {**EVERY_STEP, "ema_decay": ema_decay}
    _trainer(tmp_path / "a", processor, dataset, straight, **arguments).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    _trainer(tmp_path / "b", processor, dataset, resumed, **arguments).train(resume_from_checkpoint=str(checkpoint))
    again = resumed.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in straight.state_dict().items())
    if ema_decay is not None:
        frozen = {name for name, parameter in straight.named_parameters() if not parameter.requires_grad}
        assert frozen and not frozen & load_file(checkpoint / TRAINED_WEIGHTS).keys()


@both_ways
def test_settings_of_the_trainer_reach_the_adapter(tmp_path, processor, dataset, base, with_adapter):
    model = with_adapter(base)
    trainer = _trainer(
        tmp_path, processor, dataset, model, vision_learning_rate=1e-5, text_learning_rate=2e-5,
        frozen_parameters=[r"^model\.fusion\."],
    )  # fmt: skip
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all("lora_" in name for name in rates) and not any(".fusion." in name for name in rates)
    assert {rate for name, rate in rates.items() if ".text_model." in name} == {2e-5}
    assert {rate for name, rate in rates.items() if ".text_model." not in name} == {1e-5}


@both_ways
def test_adapters_of_the_backbones_wait(tmp_path, processor, dataset, base, with_adapter):
    class Snapshots(TrainerCallback):
        states = ()

        def on_epoch_end(self, args, state, control, model, **kwargs):
            self.states += (_weights(model),)

    model, snapshots = with_adapter(base), Snapshots()
    start = _weights(model)
    _trainer(
        tmp_path, processor, dataset, model, [snapshots], max_steps=-1, num_train_epochs=2, freeze_backbone_epochs=1
    ).train()

    def changed(before, after) -> set[str]:
        parts = {name.removeprefix("base_model.model.").split(".")[1] for name in before if "lora_" in name}
        return {
            part
            for part in parts
            if any(f"model.{part}." in name and not torch.equal(before[name], after[name]) for name in before)
        }

    first, second = snapshots.states
    assert changed(start, first) == {"encoder", "fusion"}
    assert changed(first, second) == {"encoder", "fusion", "vision_model", "text_model"}


@both_ways
def test_the_card_tells_of_the_adapter_and_its_base(tmp_path, processor, dataset, base, with_adapter, hub):
    model = with_adapter(base)
    count = model.num_parameters(only_trainable=True)
    trainer = _trainer(tmp_path / "out", processor, dataset, model, hub_model_id="me/adapter", push_to_hub=True)
    trainer.train()
    trainer.push_to_hub()
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= hub.files["me/adapter"].keys()
    assert "model.safetensors" not in hub.files["me/adapter"]
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text(hub.card("me/adapter"))
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.data.library_name == "peft"
    assert "needs `pip install peft` and its base model, `base`" in card.text
    assert f"of which only the {count:,} of the adapter were trained" in card.text
    assert "was trained from a saved model on" in card.text
    assert str(tmp_path) not in str(card)


def test_a_loaded_adapter_is_not_pushed_with_the_card_of_its_base(tmp_path, base, hub):
    (base / "README.md").write_text("---\ntags: []\n---\n\n# The base\n")
    _own(base).save_pretrained(tmp_path / "out")
    _load(tmp_path / "out").push_to_hub("me/adapter")
    assert "adapter_model.safetensors" in hub.files["me/adapter"] and "The base" not in hub.card("me/adapter")
