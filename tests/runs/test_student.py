import pytest
import torch

from epmvg_hf.runs.arguments import ModelArguments
from epmvg_hf.runs.student import make_model
from tests.fixtures.models import tiny_model
from tests.fixtures.paths import EXAMPLES
from tests.fixtures.towers import save_text_tower, save_vision_tower


def test_a_saved_model_without_projections_can_be_distilled_into(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    assert make_model(arguments, [], None)[0].config.teacher_projection_dim is None
    model, _ = make_model(arguments, [], 24)
    assert model.model.teacher_image_projection.out_features == 24


def test_towers_and_texts_are_for_new_models_only(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), max_text_length=64)
    with pytest.raises(ValueError, match="a saved model has its own max_text_length"):
        make_model(arguments, [], None)
    with pytest.raises(ValueError, match="must be given together"):
        make_model(ModelArguments(vision_name_or_path=str(tmp_path)), [], None)


def test_a_new_model_takes_towers_and_keeps_the_other_settings(tmp_path):
    vision, text = save_vision_tower("swin", tmp_path / "swin"), save_text_tower("roberta", tmp_path / "roberta")
    arguments = ModelArguments(
        config_name=str(EXAMPLES / "configs" / "tiny.json"),
        vision_name_or_path=vision,
        text_name_or_path=text,
        image_size=48,
        attn_implementation="eager",
    )
    model, processor = make_model(arguments, [], 24)
    config = model.config
    assert (config.backbone_config.model_type, config.text_config.model_type) == ("swin", "roberta")
    assert (config.d_model, config.box_head, config.image_size, config.backbone_stride) == (128, "map", 48, 8)
    assert config._attn_implementation == config.text_config._attn_implementation == "eager"
    assert model.model.teacher_image_projection.out_features == 24
    assert type(processor.tokenizer).__name__ == "RobertaTokenizer" and processor.max_text_length == 20


def test_an_adapter_needs_a_saved_base_model(tmp_path, processor):
    with pytest.raises(ValueError, match="lora_rank needs model_name_or_path"):
        make_model(ModelArguments(lora_rank=2), [], None)
    tiny_model(box_head="map").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), lora_rank=2)
    assert make_model(arguments, [], None)[0].config.teacher_projection_dim is None
    with pytest.raises(ValueError, match=f"fits {tmp_path} without the projections that the relation and feature"):
        make_model(arguments, [], 24)
    arguments.image_size, arguments.box_refinement = 96, True
    with pytest.raises(ValueError, match=f"fits {tmp_path} without box_refinement True, image_size 96"):
        make_model(arguments, [], None)


def test_a_saved_model_gets_another_canvas_and_new_parts(tmp_path, processor):
    saved = tiny_model(box_head="map")
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), image_size=96, box_refinement=True)
    model, resized = make_model(arguments, [], None)
    assert model.config.image_size == 96 and resized.image_processor.size == {"height": 96, "width": 96}
    assert model.box_refinement.correction.weight.abs().sum() == 0
    assert torch.equal(model.box_head[0].weight, saved.box_head[0].weight)
    # A processor that was saved with another canvas than the model's gets the one that is asked for, too.
    resized.save_pretrained(tmp_path)
    arguments.image_size = saved.config.image_size
    model, resized = make_model(arguments, [], None)
    assert model.config.image_size == resized.image_processor.size["height"] == 64


def test_a_model_must_be_named():
    with pytest.raises(ValueError, match="no model is named: give model_name_or_path, or for a new one config_name"):
        make_model(ModelArguments(), [], None)
