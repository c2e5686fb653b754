import inspect
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from epmvg_hf import EpmVGForVisualGrounding, EpmVGModel
from epmvg_hf.model.modeling_epmvg import MODEL_INPUTS
from tests.fixtures.models import tiny_config, tiny_model

# The students that differ in how they fuse and how they find the box.
students = pytest.mark.parametrize(
    "student",
    [
        {"box_head": "reg"},
        {"box_head": "map"},
        {"box_head": "map", "fusion_type": "decoder"},
        {"box_head": "map", "fusion_type": "decoder", "box_refinement": True},
    ],
    ids=["reg", "map", "decoder", "refinement"],
)


def _inputs(images: int = 3, expressions: int = 5, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs: texts of various lengths, and pictures in the middle of a canvas that they do not fill."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(images, 3, 64, 64, generator=generator)
    pixel_mask = torch.ones(images, 64, 64, dtype=torch.long)
    for image in range(images):
        pixel_mask[image, : 8 * image] = pixel_mask[image, 64 - 8 * image :] = 0
    attention_mask = torch.ones(expressions, length, dtype=torch.long)
    for expression in range(expressions):
        attention_mask[expression, length - expression % 3 :] = 0
    return {
        "pixel_values": pixel_values * pixel_mask[:, None],
        "pixel_mask": pixel_mask,
        "input_ids": torch.randint(1, 40, (expressions, length), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "image_index": torch.arange(expressions) % images,
    }


def _row(inputs: dict[str, torch.Tensor], expression: int) -> dict[str, torch.Tensor]:
    """A batch of one expression, without its padding, and its image."""
    image = inputs["image_index"][expression]
    tokens = int(inputs["attention_mask"][expression].sum())
    return {
        "pixel_values": inputs["pixel_values"][image][None],
        "pixel_mask": inputs["pixel_mask"][image][None],
        "input_ids": inputs["input_ids"][expression, :tokens][None],
        "attention_mask": inputs["attention_mask"][expression, :tokens][None],
    }


def test_model_inputs_are_the_arguments_that_a_batch_provides():
    arguments = set(inspect.signature(EpmVGForVisualGrounding.forward).parameters)
    unread = {"original_sizes", "letterbox", "skip_fusion"}
    instead = {"inputs_embeds", "visual_tokens"}  # arguments that replace entries of a batch
    assert set(MODEL_INPUTS) == arguments - unread - instead - {"self", "kwargs"}


def test_what_only_post_processing_needs_changes_nothing():
    model, inputs = tiny_model(), _inputs()
    extra = {"original_sizes": torch.full((3, 2), 40), "letterbox": torch.full((3, 4), 64)}
    assert torch.equal(model(**inputs, **extra).pred_boxes, model(**inputs).pred_boxes)


@students
@torch.no_grad()
def test_padding_and_other_rows_never_change_a_box(student):
    model, inputs = tiny_model(**student), _inputs()
    boxes = model(**inputs).pred_boxes
    alone = torch.cat([model(**_row(inputs, expression)).pred_boxes for expression in range(5)])
    torch.testing.assert_close(boxes, alone, atol=1e-5, rtol=0)

    longest = torch.nn.functional.pad(inputs["input_ids"], (0, 5))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5))
    padded = model(**{**inputs, "input_ids": longest, "attention_mask": mask}).pred_boxes
    torch.testing.assert_close(boxes, padded, atol=1e-5, rtol=0)


@students
@torch.no_grad()
def test_many_expressions_per_image_equal_pairs(student):
    model, inputs = tiny_model(**student), _inputs(images=2, expressions=8)
    pairs = {
        **inputs,
        "pixel_values": inputs["pixel_values"][inputs["image_index"]],
        "pixel_mask": inputs["pixel_mask"][inputs["image_index"]],
    }
    del pairs["image_index"]
    torch.testing.assert_close(model(**inputs).pred_boxes, model(**pairs).pred_boxes, atol=1e-5, rtol=0)


@torch.no_grad()
def test_expressions_and_pictures_matter():
    model, inputs = tiny_model(box_head="map"), _inputs(images=1, expressions=1)
    box = model(**inputs).pred_boxes
    other_text = model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)}).pred_boxes
    other_image = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(3)}).pred_boxes
    assert (box - other_text).abs().max() > 1e-5 and (box - other_image).abs().max() > 1e-5


@students
@torch.no_grad()
def test_what_lies_on_masked_tokens_is_not_seen_by_the_transformers(student):
    """The masks reach both transformers: changing the backbone's map on padding changes no box."""
    model, inputs = tiny_model(**student), _inputs(images=1, expressions=1)
    inputs["pixel_mask"][:, :, 48:] = 0
    boxes = model(**inputs).pred_boxes

    def spoil(module, args, output):
        feature_map = output.feature_maps[-1].clone()
        feature_map[..., 6:] += 100
        return type(output)(feature_maps=(feature_map,))

    handle = model.model.vision_model.register_forward_hook(spoil)
    spoiled = model(**inputs).pred_boxes
    handle.remove()
    torch.testing.assert_close(boxes, spoiled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_picture_thinner_than_the_stride_has_finite_boxes():
    model, inputs = tiny_model(box_head="map"), _inputs(images=1, expressions=1)
    inputs["pixel_mask"].zero_()
    inputs["pixel_mask"][:, 33:35] = 1  # nearest sampling looks at rows 0, 8, 16, ...
    outputs = model(**inputs)
    assert outputs.visual_mask[0].any(1).tolist() == [False] * 4 + [True] + [False] * 3
    assert outputs.pred_boxes.isfinite().all()


@students
def test_output_shapes(student):
    config = tiny_config(**student, teacher_projection_dim=10)
    outputs = EpmVGModel(config)(**_inputs())
    assert outputs.reg_state.shape == (5, 16)
    assert outputs.visual_tokens.shape == (3, 64, 16) and outputs.visual_mask.shape == (3, 8, 8)
    assert outputs.text_tokens.shape == (5, 7, 16) and outputs.consistency_map.shape == (5, 64)
    assert outputs.image_embeds.shape == (3, 10) and outputs.text_embeds.shape == (5, 10)
    torch.testing.assert_close(outputs.image_embeds.norm(dim=-1), torch.ones(3))
    assert tiny_model(**student)(**_inputs()).image_embeds is None


@students
def test_loss_is_the_weighted_mean_over_expressions(student):
    weights = {"bbox_loss_coefficient": 2, "giou_loss_coefficient": 3, "map_loss_coefficient": 0.5}
    model, inputs = tiny_model(**student, **weights), _inputs()
    labels = torch.tensor([[0.5, 0.5, 0.2, 0.3]]).repeat(5, 1)
    outputs = model(**inputs, labels=labels)
    assert set(outputs.loss_dict) == {"loss_bbox", "loss_giou"} | (
        {"loss_map"} if student["box_head"] == "map" else set()
    )
    total = 2 * outputs.loss_dict["loss_bbox"] + 3 * outputs.loss_dict["loss_giou"]
    total = total + 0.5 * outputs.loss_dict.get("loss_map", 0)
    torch.testing.assert_close(outputs.loss, total)
    singles = [model(**_row(inputs, e), labels=labels[e : e + 1]).loss for e in range(5)]
    torch.testing.assert_close(outputs.loss, torch.stack(singles).mean(), atol=1e-5, rtol=0)


@students
def test_every_parameter_gets_a_gradient(student):
    model = tiny_model(**student).train()
    model(**_inputs(), labels=torch.full((5, 4), 0.4)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@students
def test_gradients_equal_float64(student):
    """The float32 gradients agree with those of the same model in float64."""
    inputs, labels = _inputs(), torch.full((5, 4), 0.4)
    single, double = tiny_model(**student), tiny_model(**student).double()
    single(**inputs, labels=labels).loss.backward()
    double(**{**inputs, "pixel_values": inputs["pixel_values"].double()}, labels=labels.double()).loss.backward()
    for (name, p), q in zip(single.named_parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_save_and_load_are_bit_equal_and_safetensors_only(tmp_path):
    model, inputs = tiny_model(box_head="map", teacher_projection_dim=10), _inputs()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())

    loaded = EpmVGForVisualGrounding.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).pred_boxes, loaded(**inputs).pred_boxes)


def test_bare_model_loads_from_the_same_folder_without_a_trust_flag(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert isinstance(bare, EpmVGModel)
    assert all(torch.equal(value, model.model.state_dict()[name]) for name, value in bare.state_dict().items())


@students
@torch.no_grad()
def test_eager_and_sdpa_attention_agree(student):
    model, inputs = tiny_model(**student), _inputs()
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(**inputs).pred_boxes
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(sdpa, outputs.pred_boxes, atol=1e-5, rtol=0)
    if "fusion_type" in student:  # [REG] and 7 tokens of text attend to themselves and to 64 visual tokens
        assert [a.shape for a in outputs.cross_attentions] == [(5, 2, 8, 64)] * 2
    length = 8 if "fusion_type" in student else 72
    assert [a.shape for a in outputs.attentions] == [(5, 2, length, length)] * 2
    assert [h.shape for h in outputs.hidden_states] == [(5, length, 16)] * 3


@students
@torch.no_grad()
def test_kept_visual_tokens_give_the_same_boxes(student):
    """The image is encoded once; its expressions come later, one by one or together."""
    model, inputs = tiny_model(**student, teacher_projection_dim=10), _inputs()
    outputs = model(**inputs)
    features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("pixel_mask"))
    torch.testing.assert_close(features.pooler_output, outputs.image_embeds)
    seen = {"visual_tokens": features.last_hidden_state, "visual_mask": features.visual_mask}
    assert torch.equal(model(**inputs, **seen).pred_boxes, outputs.pred_boxes)
    for expression in range(5):
        one = {name: value[expression : expression + 1] for name, value in inputs.items()}
        box = model(**one, **seen).pred_boxes
        torch.testing.assert_close(box, outputs.pred_boxes[expression : expression + 1], atol=1e-5, rtol=0)


@students
@torch.no_grad()
def test_kept_outputs_of_the_towers_give_the_same_outputs(student):
    model, inputs = tiny_model(**student, teacher_projection_dim=10), _inputs()
    expected = model(**inputs)
    text = model.get_text_features(inputs.pop("input_ids"), inputs["attention_mask"])
    features, mask = model.model.encode_pixels(inputs.pop("pixel_values"), inputs.pop("pixel_mask"))
    assert features.shape == (3, 16, 8, 8)
    outputs = model(**inputs, backbone_features=features, visual_mask=mask, text_hidden_states=text.last_hidden_state)
    for name in ("pred_boxes", "image_embeds", "text_embeds", "similarity_map", "visual_mask"):
        assert torch.equal(outputs[name], expected[name]), name


@pytest.mark.parametrize(
    ("frozen", "is_tower"),
    [(r"vision_model\.", True), (r"text_model\.", True), (r"vision_model\.(embedder|encoder\.stages\.0)\.", False)],
    ids=["vision backbone", "text tower", "first stages"],
)
def test_autograd_records_nothing_that_is_frozen(frozen, is_tower):
    """And a tower of which nothing is trained stays in evaluation mode, so that it is a fixed function."""
    model = tiny_model(box_head="map")
    for name, parameter in model.named_parameters():
        if re.search(frozen, name):
            parameter.requires_grad_(False)
    model.train()
    modules = [module for name, module in model.named_modules() if re.search(frozen, f"{name}.")]
    assert model.model.fusion.training and not (is_tower and any(module.training for module in modules))

    recorded = []

    def note(module, inputs, output):
        values = output.values() if isinstance(output, dict) else [output]
        recorded.extend(value.grad_fn for value in values if isinstance(value, torch.Tensor))

    for module in modules:
        module.register_forward_hook(note)
    model(**_inputs(), labels=torch.full((5, 4), 0.4)).loss.backward()
    assert recorded and set(recorded) == {None}
    assert model.model.input_projection.weight.grad is not None and model.model.text_projection.weight.grad is not None


@torch.no_grad()
def test_the_parts_give_what_the_model_is_made_of():
    model, inputs = tiny_model(teacher_projection_dim=10), _inputs()
    outputs = model.model(**inputs)
    image = model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"], output_hidden_states=[-1])
    assert torch.equal(image.last_hidden_state, outputs.visual_tokens)
    # The visual encoder has one layer, the fusion transformer two: -1 is counted in the former.
    assert len(image.hidden_states) == 2 and image.hidden_states[0] is None
    assert torch.equal(model.model.visual_projection(image.hidden_states[-1]), image.last_hidden_state)

    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(model.model.text_projection(text.last_hidden_state), outputs.text_tokens)
    assert torch.equal(text.pooler_output, outputs.text_embeds)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.model(**inputs, inputs_embeds=embedded).text_embeds, outputs.text_embeds)


def test_an_attention_implementation_is_for_the_parts_that_know_it(tmp_path):
    """A ResNet has no attention and refuses any name but "eager"; a Swin knows no "flex_attention"."""
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1], "num_heads": [1], "window_size": 4, "image_size": 64}
    for number, changes in enumerate(({}, {"backbone_config": swin, "backbone_stride": 4})):
        model = tiny_model(**changes)
        model.save_pretrained(tmp_path / str(number))
        known = ("eager", "sdpa") if changes else ("eager",)
        for name in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(name)
            loaded = EpmVGForVisualGrounding.from_pretrained(tmp_path / str(number), attn_implementation=name)
            for config in (model.config, loaded.config):
                assert config._attn_implementation == config.text_config._attn_implementation == name
                assert config.backbone_config._attn_implementation == (name if name in known else known[-1])
    with pytest.raises(ValueError, match='"nonsense"` is not supported'):
        model.set_attn_implementation("nonsense")


@torch.no_grad()
def test_another_canvas_interpolates_the_visual_positions():
    model = tiny_model(box_head="map")
    inputs = {**_inputs(images=1, expressions=1), "pixel_values": torch.randn(1, 3, 96, 64)}
    inputs["pixel_mask"] = torch.ones(1, 96, 64, dtype=torch.long)
    outputs = model(**inputs)
    assert outputs.visual_mask.shape == (1, 12, 8) and outputs.pred_boxes.isfinite().all()

    # A table that grows with the row and falls with the column still does on the finer grid, between the same ends.
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    bare = model.model
    bare.fusion_positions[13:] = (row - 10 * column).flatten()[:, None]
    table = bare._fusion_positions(5, (16, 8))[0]
    assert torch.equal(table[:6], bare.fusion_positions[:6])
    grid = table[6:, 0].view(16, 8)
    assert (grid.diff(dim=0) > 0).all() and (grid.diff(dim=1) < 0).all()
    torch.testing.assert_close(grid.mean(0), (row - 10 * column).mean(0), atol=1e-3, rtol=0)


@students
@torch.no_grad()
def test_mixed_and_half_precision_keep_the_box(student):
    """Boxes are float32 under autocast: bfloat16 has steps of 2.5 pixels at the far end of a 640 pixel canvas."""
    model, inputs = tiny_model(**student), _inputs()
    boxes = model(**inputs).pred_boxes
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**inputs).pred_boxes
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, boxes, atol=0.02, rtol=0)
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float16, 0.002)):
        half = tiny_model(**student).to(dtype)(**inputs).pred_boxes
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, boxes, atol=tolerance, rtol=0)


@torch.no_grad()
def test_autocast_does_not_round_the_soft_argmax():
    model, inputs = tiny_model(box_head="map"), _inputs()
    outputs = model.model(**inputs)
    visual_mask = outputs.visual_mask[inputs["image_index"]].bool()
    boxes, _ = model._boxes_from_map(outputs, visual_mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = model._boxes_from_map(outputs, visual_mask)
    torch.testing.assert_close(mixed[:, :2], boxes[:, :2], atol=1e-5, rtol=0)  # no offset yet: the centre is all map


@students
def test_gradient_checkpointing_gives_the_same_gradients(student):
    inputs, labels = _inputs(), torch.full((5, 4), 0.4)
    plain, checkpointed = tiny_model(**student).train(), tiny_model(**student).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(**inputs, labels=labels).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=0, msg=name)


@students
@torch.no_grad()
def test_without_fusion_the_outputs_before_it_are_the_same(student):
    model, inputs = tiny_model(**student, teacher_projection_dim=10), _inputs()
    expected, outputs = model(**inputs), model(**inputs, skip_fusion=True)
    assert set(outputs) == {"similarity_map", "visual_mask", "image_embeds", "text_embeds"}
    assert all(torch.equal(value, expected[name]) for name, value in outputs.items())


@torch.no_grad()
def test_another_canvas_is_read_alike_before_and_after_the_table_is_resized(tmp_path):
    model, inputs = tiny_model(box_head="map", fusion_type="decoder"), _inputs()
    inputs["pixel_values"], inputs["pixel_mask"] = torch.randn(3, 3, 96, 96), torch.ones(3, 96, 96, dtype=torch.long)
    expected = model(**inputs).pred_boxes
    assert model.resize_canvas(96) is model and model.config.image_size == 96
    torch.testing.assert_close(model(**inputs).pred_boxes, expected)
    assert model.model.fusion_positions.shape == (1 + 12 + 12 * 12, 16) and model.model.fusion_positions.requires_grad
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(EpmVGForVisualGrounding.from_pretrained(tmp_path)(**inputs).pred_boxes, expected)
    with pytest.raises(ValueError, match="image_size is 5, expected at least one cell of 8 pixels"):
        model.resize_canvas(5)


def test_missing_weights_start_as_in_a_new_model(tmp_path):
    """If a checkpoint lacks weights, these are initialised as in a new model, and the others are kept."""
    saved = tiny_model(box_head="map")
    weights = {n: v for n, v in saved.state_dict().items() if not n.endswith(("fusion_positions", "map_sharpness"))}
    saved.save_pretrained(tmp_path, state_dict=weights)
    loaded = EpmVGForVisualGrounding.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in weights.items())
    assert loaded.log_map_sharpness.exp().item() == pytest.approx(2)
    # The rows of the grid are sine positions, which are not random.
    assert torch.equal(loaded.model.fusion_positions[13:], saved.model.fusion_positions[13:])
    assert 0.05 < loaded.model.fusion_positions[:13].std() < 0.2


@torch.no_grad()
def test_the_visual_tokens_of_one_picture_are_not_repeated_for_its_expressions():
    """A decoder's keys and values of one picture, seen by the attention function, are views without memory."""
    model, inputs = tiny_model(box_head="map", fusion_type="decoder"), _inputs(images=1, expressions=5)
    seen = []

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape[0], key.stride(0), value.stride(0)))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recorded", record)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    model.model.fusion.config._attn_implementation = "recorded"
    model(**inputs)
    cross = [strides for count, *strides in seen if strides[0] == 0]
    assert seen[-1][0] == 5 and len(cross) == model.config.fusion_layers and all(s == [0, 0] for s in cross)


@pytest.mark.parametrize(
    "backbone",
    [
        tiny_config().backbone_config,
        {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [2]},
    ],
    ids=["resnet", "timm"],
)
@torch.no_grad()
def test_a_model_optimized_for_inference_gives_the_same_boxes_and_survives_saving(backbone, tmp_path):
    model, inputs = tiny_model(box_head="map", backbone_config=backbone), _inputs()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # a new norm does nothing
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    names, before = model.state_dict().keys(), model(**inputs)

    assert model.optimize_for_inference() is model
    assert norms and not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = EpmVGForVisualGrounding.from_pretrained(tmp_path)
    assert model.state_dict().keys() == names == loaded.state_dict().keys()
    for after in (model(**inputs), loaded(**inputs), model.optimize_for_inference()(**inputs)):
        torch.testing.assert_close(after.pred_boxes, before.pred_boxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(after.consistency_map, before.consistency_map, atol=1e-4, rtol=1e-4)


def test_tuples_instead_of_outputs():
    model, inputs = tiny_model(), _inputs()
    boxes = model(**inputs).pred_boxes
    assert torch.equal(model(**inputs, return_dict=False)[0], boxes)
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[0], boxes)


@pytest.mark.parametrize(
    ("vision", "text", "stride"),
    [
        ({"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4,
          "image_size": 64, "out_features": ["stage2"]}, {"model_type": "roberta", "vocab_size": 40, "hidden_size": 16,
          "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}, 8),
        ({"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14, "out_features": ["stage1"]}, {"model_type": "distilbert",
          "vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, 14),
        ({"model_type": "convnext", "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
          "out_features": ["stage4"]}, {"model_type": "clip_text_model", "vocab_size": 40, "hidden_size": 16,
          "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "eos_token_id": 39}, 32),
    ],
    ids=["swin+roberta", "dinov2+distilbert", "convnext+clip"],
)  # fmt: skip
def test_any_backbone_and_text_tower(vision, text, stride):
    model = tiny_model(backbone_config=vision, text_config=text, backbone_stride=stride, box_head="map").train()
    outputs = model(**_inputs(), labels=torch.full((5, 4), 0.4))
    outputs.loss.backward()
    assert outputs.pred_boxes.isfinite().all()
    assert model.model.text_projection.weight.grad.abs().sum() > 0


def test_frozen_batch_norm_stays_as_loaded(tmp_path):
    tiny_model(frozen_batch_norm=True).save_pretrained(tmp_path)
    model = EpmVGForVisualGrounding.from_pretrained(tmp_path).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "normalization" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**_inputs(), labels=torch.full((5, 4), 0.4)).loss.backward()
    optimizer.step()
    assert before and all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.ones(5, 13, dtype=torch.long)}, "13 tokens per expression, but .*max_text_length is 12"),
        ({"input_ids": None}, "expected one of input_ids, inputs_embeds, text_hidden_states, got none of them"),
        (
            {"visual_tokens": torch.zeros(3, 64, 16)},
            "expected one of pixel_values, backbone_features, visual_tokens, got pixel_values and visual_tokens",
        ),
        ({"visual_mask": torch.ones(3, 8, 8)}, "visual_mask comes together with backbone_features or visual_tokens"),
        (
            {
                "pixel_values": None,
                "backbone_features": torch.zeros(3, 16, 8, 8),
                "visual_mask": torch.ones(3, 8, 7),
            },
            r"backbone_features have shape \(3, 16, 8, 8\) and visual_mask \(3, 8, 7\), expected \(B, C, grid_height",
        ),
        (
            {"pixel_values": None, "visual_tokens": torch.zeros(3, 64, 16), "visual_mask": torch.ones(3, 8, 7)},
            r"visual_tokens have shape \(3, 64, 16\) and visual_mask \(3, 8, 7\), expected \(B, grid_height",
        ),
        ({"image_index": None}, "5 expressions for 3 images: pass image_index"),
        ({"image_index": torch.zeros(4, dtype=torch.long)}, "image_index has shape \\(4,\\), expected \\(5,\\)"),
    ],
)
def test_bad_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**_inputs(), **change})


def test_wrong_stride_is_named():
    with pytest.raises(ValueError, match=r"maps 64 x 64 pixels to 8 x 8 cells, but config\.backbone_stride is 16"):
        tiny_model(backbone_stride=16)(**_inputs())


@pytest.mark.parametrize("stride", [4, 8])
@torch.no_grad()
def test_maps_of_several_strides_share_the_grid_of_one(stride):
    """Cells of 8 pixels are interpolated to those of 4, and cells of 4 pixels averaged to those of 8."""
    backbone = tiny_config().backbone_config
    backbone.out_features = ["stage1", "stage2"]
    model = tiny_model(backbone_config=backbone, backbone_stride=stride)
    pixels = torch.randn(2, 3, 64, 48)
    fine, coarse = model.model.vision_model(pixels).feature_maps
    assert fine.shape[2:] == (16, 12) and coarse.shape[2:] == (8, 6)
    features, mask = model.model.encode_pixels(pixels)
    assert mask.shape[1:] == features.shape[2:] == (64 // stride, 48 // stride)
    if stride == 8:
        expected = torch.cat([fine.unflatten(2, (8, 2)).unflatten(4, (6, 2)).mean((3, 5)), coarse], dim=1)
    else:
        # Between the centres of two cells, linear interpolation takes a quarter of the farther one.
        rows = torch.stack([_shifted(coarse, 2, -1), _shifted(coarse, 2, 1)], dim=3).flatten(2, 3)
        expected = torch.cat([fine, torch.stack([_shifted(rows, 3, -1), _shifted(rows, 3, 1)], 4).flatten(3)], dim=1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert model(pixels, torch.tensor([[2, 5, 3]] * 2)).pred_boxes.shape == (2, 4)


def _shifted(cells: torch.Tensor, dim: int, step: int) -> torch.Tensor:
    """Three quarters of each cell and a quarter of the next one, which at the border is the cell itself."""
    last = cells.shape[dim] - 1
    neighbours = cells.index_select(dim, (torch.arange(last + 1) + step).clamp(0, last))
    return 0.75 * cells + 0.25 * neighbours


@torch.no_grad()
def test_projection_norm_makes_the_size_of_the_features_irrelevant():
    model = tiny_model(projection_norm=True)
    tokens = {"input_ids": torch.tensor([[2, 5, 3]]), "visual_mask": torch.ones(1, 8, 8)}
    features = torch.randn(1, 16, 8, 8)
    boxes = [model(backbone_features=scale * features, **tokens).pred_boxes for scale in (1, 50)]
    torch.testing.assert_close(*boxes, atol=1e-3, rtol=0)


@pytest.mark.parametrize("box_head", ["reg", "map"])
def test_scores_judge_boxes_without_changing_them(box_head):
    model, inputs = tiny_model(box_head=box_head, score_head=True), _inputs()
    outputs = model(**inputs)
    assert outputs.scores.shape == (5,) and ((outputs.scores > 0) & (outputs.scores < 1)).all()
    without = tiny_model(box_head=box_head)
    without.load_state_dict(model.state_dict(), strict=False)
    assert without(**inputs).scores is None
    assert torch.equal(without(**inputs).pred_boxes, outputs.pred_boxes)
    outputs.scores.sum().backward()
    assert all(parameter.grad is None for parameter in model.box_head.parameters())
    assert model.score_head[0].weight.grad.abs().sum() > 0


def test_a_score_does_not_depend_on_the_padding_of_its_batch():
    model, inputs = tiny_model(box_head="map", score_head=True), _inputs()
    with torch.no_grad():
        together = model(**inputs).scores
        alone = torch.cat([model(**_row(inputs, expression)).scores for expression in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_scores_in_half_precision(dtype):
    model, inputs = tiny_model(box_head="map", score_head=True), _inputs()
    expected = model(**inputs).scores
    scores = model.to(dtype)(**inputs).scores
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=2e-2, rtol=0)


def test_absent_rows_teach_the_scores_alone():
    model, inputs = tiny_model(box_head="map", score_head=True), _inputs()
    labels = torch.tensor([[0.5, 0.5, 0.2, 0.3]] * 5)
    labels[[1, 3]] = 0
    terms = model(**inputs, labels=labels).loss_dict
    missing = labels.clone()
    missing[[1, 3]] = torch.nan
    without = model(**inputs, labels=missing).loss_dict
    for name in ("loss_bbox", "loss_giou", "loss_map"):
        assert torch.equal(terms[name], without[name])
    assert terms["loss_score"] != without["loss_score"]


def test_rows_without_a_box_take_no_part_in_the_loss():
    model = tiny_model(box_head="map")
    pixel_values, input_ids = torch.randn(2, 3, 64, 64), torch.randint(5, 19, (4, 6))
    image_index = torch.tensor([0, 0, 1, 1])
    labels = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.1, 0.1], [0.2, 0.2, 0.1, 0.3]])
    some = labels.clone()
    some[[1, 2]] = torch.nan
    with_some = model(pixel_values, input_ids, image_index=image_index, labels=some)
    kept = torch.tensor([0, 3])
    alone = model(pixel_values, input_ids[kept], image_index=image_index[kept], labels=labels[kept])
    for name, term in alone.loss_dict.items():
        torch.testing.assert_close(with_some.loss_dict[name], term, msg=name)
    torch.testing.assert_close(with_some.loss, alone.loss)
    nothing = model(pixel_values, input_ids, image_index=image_index, labels=torch.full((4, 4), torch.nan))
    nothing.loss.backward()
    assert nothing.loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
