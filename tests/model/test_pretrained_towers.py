import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, CLIPModel, DetrModel, ViTModel
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
from transformers.utils import logging

from epmvg_hf import EpmVGForVisualGrounding, EpmVGModel, EpmVGProcessor
from tests.fixtures.towers import SIZES, STATISTICS, STRIDES, save_clip, save_text_tower, save_vision_tower

DETR_SIZES = {name: value for name, value in SIZES.items() if not name.startswith(("encoder", "d_model"))}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A function that returns the folder of a tower, which it saves at the first call."""
    root, saved = tmp_path_factory.mktemp("towers"), {}

    def folder(kind: str, part: str) -> str:
        if (kind, part) not in saved:
            save = {"vision": save_vision_tower, "text": save_text_tower}[part]
            saved[kind, part] = save(kind, root / f"{part}_{kind}")
        return saved[kind, part]

    return folder


def load(towers, vision="resnet", text="bert", model_class=EpmVGModel, **config):
    sizes = DETR_SIZES if vision.startswith("detr") else SIZES
    return model_class.from_vision_text_pretrained(
        towers(vision, "vision"), towers(text, "text"), **{**sizes, **config}
    )


@torch.no_grad()
def pictures(side: int, height: int | None = None):
    return torch.randn(2, 3, height or side, side, generator=torch.Generator().manual_seed(3))


# Vision towers, bit-equal to the tower run alone
# ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet", "swin", "convnext", "dinov2"])
@torch.no_grad()
def test_a_backbone_gives_the_features_of_the_tower_alone(towers, kind):
    side = 3 * STRIDES[kind]
    model = load(towers, kind, image_size=side)
    alone = AutoBackbone.from_config(model.config.backbone_config)
    alone = type(alone).from_pretrained(towers(kind, "vision")).eval()
    expected = alone(pictures(side)).feature_maps[-1]
    assert expected.shape[-2:] == (3, 3) and model.config.backbone_stride == STRIDES[kind]
    assert torch.equal(model.vision_model(pictures(side)).feature_maps[-1], expected)


@pytest.mark.parametrize(("kind", "model_class"), [("clip", CLIPModel), ("vit", ViTModel)])
@pytest.mark.parametrize("side", [None, 48])
@torch.no_grad()
def test_patches_of_clip_and_vit_are_those_of_the_tower_alone(towers, kind, model_class, side):
    """At the size of the tower, which is the default, and at another one, for which both interpolate positions."""
    model = load(towers, kind, **({} if side is None else {"image_size": side}))
    side = side or 32
    assert (model.config.image_size, model.config.backbone_stride) == (side, 8)
    alone = model_class.from_pretrained(towers(kind, "vision")).eval()
    alone = alone.vision_model if kind == "clip" else alone
    tokens = alone(pictures(side), interpolate_pos_encoding=side != 32).last_hidden_state[:, 1:]
    feature_map = model.vision_model(pictures(side)).feature_maps[-1]
    assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens)
    # Row by row, also where a picture is not square.
    wide = model.vision_model(pictures(48, height=32)).feature_maps[-1]
    tokens = alone(pictures(48, height=32), interpolate_pos_encoding=True).last_hidden_state
    assert wide.shape[-2:] == (4, 6) and torch.equal(wide[:, :, 1, 2], tokens[:, 1 + 1 * 6 + 2])


@pytest.mark.parametrize("kind", ["detr", "detr_timm"])
@torch.no_grad()
def test_detr_gives_backbone_and_encoder(towers, kind):
    side = 3 * STRIDES[kind]
    model = load(towers, kind, image_size=side)
    assert model.config.encoder_layers == 2 and model.vision_model.out_indices[1:] == []
    mask = torch.ones(2, side, side, dtype=torch.long)
    mask[1, :, side - STRIDES[kind] :] = 0
    encoded = []
    model.encoder.register_forward_hook(lambda module, args, output: encoded.append(output.last_hidden_state))
    model(pictures(side), torch.tensor([[2, 5, 3]] * 2), pixel_mask=mask)

    alone = DetrModel.from_pretrained(towers(kind, "vision")).eval()
    torch.testing.assert_close(encoded[0], alone(pictures(side), mask).encoder_last_hidden_state, rtol=0, atol=1e-5)
    # DETR's frozen norms multiply and add in another order than nn.BatchNorm2d, and its convolutions read pixels whose
    # channels stand first. Nothing else differs.
    _swap_norms(alone)
    pixels = pictures(side).to(memory_format=torch.channels_last)
    assert torch.equal(encoded[0], alone(pixels, mask).encoder_last_hidden_state)


def _swap_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, DetrFrozenBatchNorm2d):
            norm = nn.BatchNorm2d(len(child.weight)).eval()
            norm.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, norm)
        _swap_norms(child)


@torch.no_grad()
def test_a_timm_model_gives_the_features_of_the_tower_alone(tmp_path, towers):
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    alone = timm.create_model("test_resnet").eval()
    save_for_hf(alone, tmp_path, safe_serialization=True)
    text = towers("bert", "text")
    model = EpmVGModel.from_vision_text_pretrained(str(tmp_path), text, image_size=96, **SIZES)
    assert model.config.backbone_stride == 32
    expected = alone.forward_features(pictures(96))
    assert torch.equal(model.vision_model(pictures(96)).feature_maps[-1], expected)
    processor = EpmVGProcessor.from_vision_text_pretrained(str(tmp_path), text, model.config)
    assert tuple(processor.image_processor.image_mean) == alone.pretrained_cfg["mean"]

    # It is found again without its folder.
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "config.json").unlink()
    reloaded = EpmVGModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(reloaded.vision_model(pictures(96)).feature_maps[-1], expected)


@torch.no_grad()
def test_named_maps_of_a_timm_model_on_the_grid_of_the_finer_one(tmp_path, towers):
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    alone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    names = alone.feature_info.module_name()[-2:]
    load_model = partial(EpmVGModel.from_vision_text_pretrained, str(tmp_path), towers("bert", "text"), image_size=96)
    model = load_model(out_features=names[::-1], backbone_stride=16, **SIZES)
    assert model.config.backbone_stride == 16
    fine, coarse = alone(pictures(96))[-2:]
    features, _ = model.encode_pixels(pictures(96))
    assert features.shape[2:] == fine.shape[2:] == (6, 6)
    torch.testing.assert_close(features[:, : fine.shape[1]], fine, atol=1e-5, rtol=0)
    assert features.shape[1] == fine.shape[1] + coarse.shape[1]

    with pytest.raises(
        ValueError, match=rf"has the feature maps .*{names[0]}.*, so out_features must not have layer9"
    ):
        load_model(out_features=[names[0], "layer9"], **SIZES)
    with pytest.raises(
        ValueError, match=r"backbone_stride is 8, but the feature maps of .* have cells of 16, 32 pixels"
    ):
        load_model(out_features=names, backbone_stride=8, **SIZES)


@torch.no_grad()
def test_several_levels_are_averaged_to_the_last_grid_and_concatenated(towers):
    """The levels are a setting of the backbone: four layers of CLIP for CLIP-VG, or stages of a ResNet."""
    seen = []

    def joined_maps(model):
        model.input_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.get_image_features(pictures(32))
        return seen[-1]

    model = load(towers, "clip", out_features=["stage1", "stage3"])
    assert torch.equal(joined_maps(model), torch.cat(model.vision_model(pictures(32)).feature_maps, dim=1))

    model = load(towers, "resnet", out_features=["stage1", "stage2"], image_size=32)
    first, last = model.vision_model(pictures(32)).feature_maps
    assert first.shape[-2:] == (8, 8) and last.shape[-2:] == (4, 4)
    joined = joined_maps(model)
    assert torch.equal(joined[:, first.shape[1] :], last)
    torch.testing.assert_close(joined[:, : first.shape[1]], nn.functional.avg_pool2d(first, 2))


# Text towers, bit-equal to the tower run alone
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "clip"])
@torch.no_grad()
def test_token_states_are_those_of_the_tower_alone(towers, kind):
    folder = towers(kind, "text")
    model = load(towers, text=kind, model_class=EpmVGForVisualGrounding, image_size=32)
    processor = EpmVGProcessor.from_vision_text_pretrained(towers("resnet", "vision"), folder, model.config)
    words = ["a dog on the left", "the man"]
    inputs = processor(images=Image.new("RGB", (40, 30), "red"), text=words)
    assert set(inputs) == {
        "pixel_values", "pixel_mask", "original_sizes", "letterbox", "input_ids", "attention_mask", "image_index"
    }  # fmt: skip
    assert not inputs["attention_mask"].all()

    alone = AutoModel.from_pretrained(folder).eval()
    alone = alone.text_model if kind == "clip" else alone
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = alone(**tokens).last_hidden_state
    assert torch.equal(model.model.text_model(**tokens).last_hidden_state, expected)

    # Padding changes nothing: an expression alone gets the same states and the same box.
    whole = model(**inputs)
    alone = processor(images=Image.new("RGB", (40, 30), "red"), text=words[1])
    short = model.model.text_model(input_ids=alone["input_ids"]).last_hidden_state[0]
    torch.testing.assert_close(expected[1, : len(short)], short, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.pred_boxes[1], model(**alone).pred_boxes[0], rtol=0, atol=1e-5)


# Processors, tables, gradients --------------------------------------------------------------------------------------


def test_statistics_and_tokenizer_follow_the_towers(tmp_path, towers):
    vision, text = towers("clip", "vision"), towers("roberta", "text")
    model = load(towers, "clip", "roberta", model_class=EpmVGForVisualGrounding)
    processor = EpmVGProcessor.from_vision_text_pretrained(vision, text, model.config)
    assert list(processor.image_processor.image_mean) == STATISTICS["image_mean"]
    assert list(processor.image_processor.image_std) == STATISTICS["image_std"]
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert type(processor.tokenizer).__name__ == "RobertaTokenizer" and processor.max_text_length == 12

    # Saved and loaded, they are one model.
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    expected = model(**processor(images=image, text="the man")).pred_boxes
    model = EpmVGForVisualGrounding.from_pretrained(tmp_path).eval()
    processor = EpmVGProcessor.from_pretrained(tmp_path)
    assert torch.equal(model(**processor(images=image, text="the man")).pred_boxes, expected)


def test_the_table_says_what_is_loaded_fresh_and_unused(towers, caplog):
    model, rows = load(
        towers, "detr", "roberta", model_class=EpmVGForVisualGrounding, image_size=32, output_loading_info=True
    )
    rows = {row["part"]: row for row in rows}
    assert sum(row["parameters"] for row in rows.values()) == model.num_parameters()
    sources = {part: row["source"] for part, row in rows.items() if row["source"]}
    detr, roberta = towers("detr", "vision"), towers("roberta", "text")
    assert sources == {"vision_model": detr, "input_projection": detr, "encoder": detr, "text_model": roberta}
    assert {"reg_token", "fusion_positions", "fusion", "visual_projection", "box_head"} < set(rows)
    unused = {name.split(".")[0] for name in rows["vision_model"]["unused"]}
    assert unused == {"query_position_embeddings", "decoder", "class_labels_classifier", "bbox_predictor"}
    assert {name.split(".")[0] for name in rows["text_model"]["unused"]} == {"lm_head"}
    table = caplog.messages[-1].splitlines()
    assert len(table) == 2 + len(rows)
    assert any(line.split()[:1] == ["fusion"] and line.endswith("all") for line in table)

    # As a backbone, Swin applies a norm to its feature map that the classifier does not have.
    _, rows = load(towers, "swin", image_size=48, output_loading_info=True)
    assert rows[[row["part"] for row in rows].index("vision_model")]["fresh"] == [
        "hidden_states_norms.stage2.bias",
        "hidden_states_norms.stage2.weight",
    ]


def test_threads_that_load_towers_leave_the_verbosity_alone(towers, caplog):
    """It is one for all threads, and the table says what transformers' own report of each tower would."""
    verbosity = logging.get_verbosity()
    load(towers)  # saves the towers
    caplog.clear()
    start = threading.Barrier(8)
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            for loading in [pool.submit(lambda: (start.wait(), load(towers))) for _ in range(8)]:
                loading.result()
        assert logging.get_verbosity() == verbosity
    assert {record.name for record in caplog.records} == {"epmvg_hf.model.pretrained_towers"}


def test_every_parameter_gets_a_gradient(towers):
    """Pooling layers, CLIP's last norm and DINOv2's mask token would not, so the model must not have them."""
    for vision, text in (("clip", "clip"), ("vit", "distilbert"), ("dinov2", "roberta")):
        model = load(towers, vision, text, model_class=EpmVGForVisualGrounding, image_size=56)
        model.train()
        images, tokens = pictures(56), torch.tensor([[0, 5, 6, 2]] * 2)
        model(images, tokens, labels=torch.full((2, 4), 0.3)).loss.backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == [], vision


# Errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "image_size", "message"),
    [("resnet", 60, "image_size is 60, not a multiple of the 8 pixels .* take 56 or 64"),
     ("dinov2", 64, "the 14 pixels .* take 56 or 70"), ("clip", 30, "the 8 pixels"), ("detr", 20, "the 8 pixels")],
)  # fmt: skip
def test_a_canvas_that_the_cells_do_not_fill_is_refused(towers, kind, image_size, message):
    with pytest.raises(ValueError, match=message):
        load(towers, kind, image_size=image_size)


@pytest.mark.parametrize("text", ["bert", "roberta", "distilbert", "clip"])
def test_more_tokens_than_positions_are_refused(towers, text):
    load(towers, text=text, image_size=32, max_text_length=20)
    with pytest.raises(ValueError, match=r"max_text_length is 21, more tokens than .* has positions for"):
        load(towers, text=text, image_size=32, max_text_length=21)


def test_settings_that_contradict_detr_are_refused(towers):
    with pytest.raises(ValueError, match=r"d_model is 16, but .* was trained with 32"):
        load(towers, "detr", image_size=32, d_model=16)
    with pytest.raises(ValueError, match="out_features must not be"):
        load(towers, "detr", image_size=32, out_features=["stage1"])


def test_towers_in_the_wrong_place_are_refused(towers):
    with pytest.raises(ValueError, match="is a 'bert', not a vision tower: expected a DETR, CLIP, ViT"):
        EpmVGModel.from_vision_text_pretrained(towers("bert", "text"), towers("resnet", "vision"))
    for kind in ("resnet", "detr", "vit"):
        with pytest.raises(ValueError, match="not a text tower"):
            EpmVGModel.from_vision_text_pretrained(towers("resnet", "vision"), towers(kind, "vision"))


def test_missing_and_misshapen_tensors_are_refused(tmp_path, towers):
    for kind, part, name in (("resnet", "vision", "encoder.stages.1"), ("bert", "text", "encoder.layer.2")):
        folder = tmp_path / kind
        shutil.copytree(towers(kind, part), folder)
        weights = load_file(folder / "model.safetensors")
        key = next(key for key in weights if name in key and weights[key].ndim > 1)
        other = {"text": towers("bert", "text"), "vision": towers("resnet", "vision")} | {part: str(folder)}

        save_file({k: v for k, v in weights.items() if k != key}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"does not hold the tensors .*missing: {name}"):
            EpmVGModel.from_vision_text_pretrained(other["vision"], other["text"], **SIZES)
        save_file({**weights, key: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"does not hold the tensors .*of another shape: {name}"):
            EpmVGModel.from_vision_text_pretrained(other["vision"], other["text"], **SIZES)


def test_nothing_in_a_tower_is_executed(tmp_path, towers):
    """Neither pickled code in the weights, nor an attention implementation that the config names."""
    folder = tmp_path / "pickled"
    shutil.copytree(towers("bert", "text"), folder)
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    torch.save({"bert.embeddings.word_embeddings.weight": _Touch(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="eights"):
        EpmVGModel.from_vision_text_pretrained(towers("resnet", "vision"), str(folder), **SIZES)
    assert not mark.exists()

    folder = tmp_path / "kernel"
    shutil.copytree(towers("bert", "text"), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["attn_implementation"] = "kernels-community/none-such"
    (folder / "config.json").write_text(json.dumps(settings))
    model = EpmVGModel.from_vision_text_pretrained(towers("resnet", "vision"), str(folder), image_size=32, **SIZES)
    assert model.text_model.config._attn_implementation == "sdpa"


class _Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_tower_without_image_statistics_is_refused(tmp_path, towers):
    shutil.copytree(towers("resnet", "vision"), tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    model = load(towers, image_size=32)
    with pytest.raises(ValueError, match="no image processor, which would give the mean"):
        EpmVGProcessor.from_vision_text_pretrained(str(tmp_path / "bare"), towers("bert", "text"), model.config)


def test_a_tokenizer_with_more_tokens_than_the_tower_is_refused(tmp_path, towers):
    model = load(towers, image_size=32)
    with pytest.raises(ValueError, match="tokens, but the tower embeds only 40"):
        EpmVGProcessor.from_vision_text_pretrained(
            towers("resnet", "vision"), save_clip(tmp_path / "clip"), model.config
        )


def test_a_vision_tower_of_clip_alone_is_taken(tmp_path, towers):
    whole = CLIPModel.from_pretrained(towers("clip", "vision"))
    whole.vision_model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(towers("clip", "vision")).save_pretrained(tmp_path)
    text = towers("bert", "text")
    model = EpmVGModel.from_vision_text_pretrained(str(tmp_path), text, **SIZES)
    both = load(towers, "clip")
    for name, value in both.vision_model.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value)
