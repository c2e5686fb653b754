import pytest
from transformers import AutoConfig, BertConfig, ResNetConfig

from epmvg_hf import EpmVGConfig
from tests.fixtures.models import tiny_config


def test_default_is_transvg():
    config = EpmVGConfig()
    assert list(config.backbone_config.depths) == [3, 4, 6, 3]  # ResNet-50
    assert config.backbone_config.out_features == ["stage4"]
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (12, 768)  # BERT-base
    assert (config.encoder_layers, config.fusion_layers, config.d_model) == (6, 6, 256)
    assert (config.image_size, config.max_text_length, config.box_head) == (640, 20, "reg")


def test_saved_configuration_loads_with_its_towers(tmp_path):
    config = tiny_config(box_head="map", teacher_projection_dim=8)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, EpmVGConfig)
    assert isinstance(loaded.backbone_config, ResNetConfig) and isinstance(loaded.text_config, BertConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_head": "centre"}, 'box_head is \'centre\', expected "reg" or "map"'),
        ({"d_model": 18}, "d_model \\(18\\) is not a multiple of 4"),
        ({"fusion_attention_heads": 3}, "d_model \\(16\\) is not a multiple of fusion_attention_heads \\(3\\)"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**change)
