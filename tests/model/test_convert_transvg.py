"""
Converted models against TransVG. Most tests compare with a tiny TransVG that `tests/fixtures/original_transvg.py`
writes again with torchvision, BERT and `nn.MultiheadAttention`; two compare with boxes of the original code.
"""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor, BertConfig
from typer.testing import CliRunner

from epmvg_hf import EpmVGForVisualGrounding, EpmVGImageProcessor, EpmVGProcessor
from epmvg_hf.cli import app
from epmvg_hf.model.convert_transvg import convert_transvg, read_transvg_checkpoint
from tests.fixtures.models import tiny_tokenizer
from tests.fixtures.original_transvg import Original, original
from tests.fixtures.paths import SHARED

TRANSVG = SHARED / "transvg"


def inputs_of(size=128, length=20, batch=3):
    generator = torch.Generator().manual_seed(1)
    padding = torch.zeros(batch, size, size, dtype=torch.bool)
    attention_mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        padding[row, size - 32 * row :] = padding[row, :, : 16 * row] = True
        attention_mask[row, length - 5 * row :] = 0
    pixel_values = torch.randn(batch, 3, size, size, generator=generator) * ~padding[:, None]
    input_ids = torch.randint(5, 19, (batch, length), generator=generator) * attention_mask
    return {
        "pixel_values": pixel_values,
        "padding": padding,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
    }


@torch.no_grad()
def stages_of(model, pixel_values, padding, input_ids, attention_mask):
    """The states of a converted model at each stage of `Original`."""
    stages = {}
    hooks = [
        model.model.vision_model.register_forward_hook(lambda m, a, out: stages.update(backbone=out.feature_maps[-1])),
        model.model.encoder.register_forward_hook(lambda m, a, out: stages.update(encoder=out.last_hidden_state)),
        model.model.text_model.register_forward_hook(lambda m, a, out: stages.update(text=out.last_hidden_state)),
    ]
    outputs = model(pixel_values, input_ids, attention_mask, pixel_mask=(~padding).long())
    for hook in hooks:
        hook.remove()
    return stages | {"fusion": outputs.reg_state, "head": outputs.pred_boxes}


def assert_same_stages(model, reference, inputs):
    """
    Compares the stages. The tolerance is 1e-5, or 1e-5 of the stage's largest value if that is above 1. `pytest -rP`
    shows the differences.
    """
    ours, theirs = stages_of(model, **inputs), reference(**inputs)
    print("stage      largest value   largest difference   relative")
    for stage, expected in theirs.items():
        largest, difference = expected.abs().max().item(), (ours[stage] - expected).abs().max().item()
        print(f"{stage:10} {largest:13.3f} {difference:20.1e} {difference / max(1, largest):10.1e}")
        assert difference <= 1e-5 * max(1, largest), stage


def save(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def convert(checkpoint, output_dir, *options):
    result = CliRunner().invoke(app, ["--debug", "convert", checkpoint, str(output_dir), *options])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return EpmVGForVisualGrounding.from_pretrained(output_dir).eval()


@pytest.fixture(scope="module")
def reference():
    if not TRANSVG.exists():
        pytest.skip("the reference weights of the original TransVG are not here")
    spec = importlib.util.spec_from_file_location("name_keyed_weights", TRANSVG / "name_keyed_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case_number", [0, 1])
def test_boxes_of_the_original(reference, case_number, tmp_path):
    case = json.loads((TRANSVG / "reference_cases.json").read_text())[case_number]
    size, length = case["imsize"], case["max_query_len"]
    tensors = reference.state_dict(TRANSVG / "checkpoint_keys_resnet50.json", size, length)
    if case_number == 0:
        model = convert(save(tmp_path, {"model": tensors}), tmp_path / "out", "--tokenizer", "none")
        shutil.rmtree(tmp_path)  # pytest would keep these files of more than a gigabyte
    else:  # without files, which take most of the time and are tested by the first case
        model, _ = convert_transvg(tensors)
    assert (model.config.image_size, model.config.max_text_length) == (size, length)
    inputs = reference.inputs(case)
    difference = (stages_of(model, **inputs)["head"] - torch.tensor(case["boxes"])).abs().max().item()
    print(f"largest difference to the boxes of the original code: {difference:.1e}")
    assert difference <= 1e-5

    # The original code only gave the boxes. The stages before them are compared with the rewritten TransVG in full
    # size.
    written = Original((3, 4, 6, 3), 64, 256, 8, (6, 6), BertConfig(), size, length)
    written.load_state_dict(tensors)
    assert_same_stages(model, written, inputs)


def test_every_stage_is_that_of_the_original():
    reference = original()
    model, unused = convert_transvg(reference.state_dict(), image_size=128)
    assert_same_stages(model, reference, inputs_of())
    assert list(unused) == ["textmodel.bert.pooler.dense.weight", "textmodel.bert.pooler.dense.bias"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("variant", ["resnet101", "40 tokens", "module", "no wrapper", "training state"])
def test_variants(tmp_path, variant, legacy):
    sizes = {"resnet101": {"depths": (3, 4, 23, 3)}, "40 tokens": {"length": 40, "image_size": 160}}.get(variant, {})
    reference = original(**sizes)
    tensors = reference.state_dict()
    content = {"model": tensors}
    if variant == "module":
        content = {"model": {f"module.{name}": value for name, value in tensors.items()}}
    elif variant == "no wrapper":
        content = tensors
    elif variant == "training state":
        optimizer = torch.optim.AdamW(reference.parameters())
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
        args = argparse.Namespace(imsize=128, max_query_len=20, nheads=8, vl_nheads=8, dilation=False, lr=1e-4)
        state = {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
        content |= {**state, "epoch": 7, "args": args, "val_accu": 0.5}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)

    size, length = sizes.get("image_size", 128), sizes.get("length", 20)
    model = convert(str(path), tmp_path / "out", "--tokenizer", "none")
    assert (model.config.image_size, model.config.max_text_length) == (size, length)
    assert_same_stages(model, reference, inputs_of(size, length))
    assert EpmVGImageProcessor.from_pretrained(tmp_path / "out").size.height == size
    assert not list((tmp_path / "out").glob("*token*"))


def test_saved_arguments_tell_what_tensors_do_not():
    reference = original(heads=4)
    args = {"imsize": 128, "nheads": 4, "vl_nheads": 4}
    assert_same_stages(convert_transvg(reference.state_dict(), args)[0], reference, inputs_of())

    args = {"imsize": 128, "bert_enc_num": 1}
    model, unused = convert_transvg(original().state_dict(), args)
    assert model.config.text_config.num_hidden_layers == 1
    assert sum("layer 1 of BERT" in reason for reason in unused.values()) == 16


def test_the_processor_is_that_of_the_weights(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    checkpoint = save(tmp_path, {"model": original().state_dict()})
    model = convert(checkpoint, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, EpmVGProcessor)
    assert processor.image_processor.pad_offset == 0.5 and processor.max_text_length == 20

    image = Image.new("RGB", (50, 31), (200, 10, 60))
    inputs = processor(images=image, text=["The RED circle " * 9, "[SEP] dog"], boxes=[[5, 6, 30, 20]] * 2)
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    words = tiny_tokenizer().tokenize("the red circle " * 6)
    assert inputs["input_ids"][0].tolist() == tiny_tokenizer().convert_tokens_to_ids(["[CLS]", *words, "[SEP]"])
    # Without lower-casing, "[SEP]" in an expression would become the token that ends it.
    assert (inputs["input_ids"][1] == tiny_tokenizer().sep_token_id).sum() == 1
    with torch.no_grad():
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    outputs.pred_boxes = inputs["labels"]
    for result in processor.post_process_grounding(outputs, inputs):
        torch.testing.assert_close(result["box"], torch.tensor([5.0, 6, 30, 20]), atol=1e-4, rtol=0)


def test_a_vocabulary_file_is_a_tokenizer(tmp_path):
    (tmp_path / "vocab").mkdir()
    vocab = tiny_tokenizer().get_vocab()
    (tmp_path / "vocab" / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)))
    checkpoint = save(tmp_path, {"model": original().state_dict()})
    convert(checkpoint, tmp_path / "out", "--tokenizer", str(tmp_path / "vocab"))
    text = "The RED circle"
    expected = tiny_tokenizer()(text)["input_ids"]
    assert EpmVGProcessor.from_pretrained(tmp_path / "out")(text=text)["input_ids"][0].tolist() == expected


def test_counters_and_constants_are_named_as_unused():
    tensors = original().state_dict()
    extra = {
        "visumodel.backbone.0.body.bn1.num_batches_tracked": torch.tensor(3),
        "visumodel.backbone.0.body.layer1.0.downsample.1.num_batches_tracked": torch.tensor(3),
        "textmodel.bert.embeddings.position_ids": torch.arange(512)[None],
    }
    _, unused = convert_transvg(tensors | extra, image_size=128)
    assert extra.keys() < unused.keys() and all(unused.values())


@pytest.mark.parametrize(
    "name",
    [
        "vl_pos_embed.weight",
        "visumodel.backbone.0.body.layer1.0.conv3.weight",
        "textmodel.bert.embeddings.LayerNorm.bias",
    ],
)
def test_a_renamed_tensor_is_named_twice(name):
    tensors = original().state_dict()
    tensors["renamed.weight"] = tensors.pop(name)
    with pytest.raises(ValueError, match=rf"\(missing: {name}; unexpected: renamed\.weight\)"):
        convert_transvg(tensors)


@pytest.mark.parametrize(
    "extra",
    [
        "visumodel.transformer.decoder.norm.weight",
        "visumodel.transformer.encoder.norm.weight",
        "other.num_batches_tracked",
        "visumodel.backbone.0.body.layer1.0.conv1.bias",
    ],
)
def test_an_extra_tensor_is_named(extra):
    with pytest.raises(ValueError, match=rf"TransVG \(unexpected: {extra}\)"):
        convert_transvg(original().state_dict() | {extra: torch.zeros(4)}, image_size=128)


def test_a_missing_layer_is_named():
    tensors = original().state_dict()
    layer = [name for name in tensors if name.startswith("vl_transformer.encoder.layers.1.")]
    for name in layer:
        del tensors[name]
    with pytest.raises(ValueError, match=rf"missing: {min(layer)}, .* and 8 more; unexpected: vl_transformer"):
        convert_transvg(tensors, image_size=128)


def test_other_files_are_named():
    with pytest.raises(ValueError, match=r"missing: bbox_embed.*and \d+ more; unexpected: a\.weight\)"):
        convert_transvg({"a.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text_proj.weight": torch.zeros(32, 63)},
            r"text_proj.weight has the shape \(32, 63\), not \(32, 64\), as other",
        ),
        ({"reg_token.weight": torch.zeros(32)}, r"reg_token.weight has the shape \(32,\), not \(1, 32\)"),
        (
            {"vl_transformer.encoder.layers.0.self_attn.in_proj_bias": torch.zeros(95)},
            r"in_proj_bias has the shape \(95,\), not \(96,\)",
        ),
        ({"visu_proj.bias": torch.zeros(32, dtype=torch.int64)}, "visu_proj.bias holds torch.int64"),
        ({"vl_pos_embed.weight": torch.zeros(35, 32)}, "35 rows, which leaves 18 tokens .* of 128 pixels, not 20"),
        ({"visumodel.input_proj.weight": torch.zeros(30, 128, 1, 1)}, "sizes of these tensors: .* multiple of"),
    ],
)
def test_wrong_tensors_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        convert_transvg(original().state_dict() | change, {"imsize": 128, "max_query_len": 20})


@pytest.mark.parametrize(
    ("args", "image_size", "message"),
    [
        ({"dilation": True}, 128, "dilated ResNet"),
        ({"bert_enc_num": 0}, 128, "word embeddings alone"),
        ({"nheads": "8"}, 128, "argument nheads is '8', expected a whole number"),
        ({"nheads": 5}, 128, r"d_model \(32\) is not a multiple of encoder_attention_heads \(5\)"),
        ({}, 100, "image_size is 100, not a multiple of 32"),
        ({"imsize": 640}, None, "leaves -364 tokens"),
    ],
)
def test_wrong_settings_are_named(args, image_size, message):
    with pytest.raises(ValueError, match=message):
        convert_transvg(original().state_dict(), args, image_size)


@pytest.mark.parametrize(
    ("rows", "size", "length"), [(421, 640, 20), (441, 640, 40), (481, 640, 80), (121, 320, 20), (141, 320, 40)]
)
def test_image_size_and_text_length(rows, size, length):
    tensors = original().state_dict() | {"vl_pos_embed.weight": torch.zeros(rows, 32)}
    config = convert_transvg(tensors)[0].config
    assert (config.image_size, config.max_text_length) == (size, length)


@pytest.mark.parametrize("rows", [57, 200, 900])
def test_an_image_size_that_is_not_known_is_asked_for(rows):
    tensors = original().state_dict() | {"vl_pos_embed.weight": torch.zeros(rows, 32)}
    with pytest.raises(ValueError, match=f"{rows} rows, which do not tell the image size: give image_size"):
        convert_transvg(tensors)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("entry", ["model", "args", "optimizer"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, entry, legacy):
    content = {"model": original().state_dict(), entry: Malicious(tmp_path / "executed")}
    if entry == "args":
        content["args"] = argparse.Namespace(imsize=content["args"])
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="holds more than tensors, such as code, and is not loaded"):
        convert(str(path), tmp_path / "out", "--tokenizer", "none")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="holds more than tensors, such as code"):
        read_transvg_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list, not a dictionary"),
        ({"model": {"a": 1}}, "entries that are not tensors: a"),
        ({"model": {}, "ema": {}}, "entries that TransVG does not save: ema"),
        ({"model": torch.zeros(1)}, "is not a dictionary of tensors"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_transvg_checkpoint(save(tmp_path, content))


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path):
    bert = BertConfig(vocab_size=18, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=48)
    checkpoint = save(tmp_path, {"model": original(bert=bert).state_dict()})
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="has 19 tokens, but the checkpoint has embeddings for 18 only"):
        convert(checkpoint, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match="there is no tokenizer in"):
        convert(checkpoint, tmp_path / "out", "--tokenizer", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' has no words, only the 5 special tokens \[PAD\]|\[UNK\]"):
        convert(checkpoint, tmp_path / "out", "--tokenizer", str(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    checkpoint = save(tmp_path, {"model": original().state_dict()})
    (tmp_path / "out").mkdir()
    convert(checkpoint, tmp_path / "out", "--tokenizer", "none")
    result = CliRunner().invoke(app, ["convert", checkpoint, str(tmp_path / "out"), "--tokenizer", "none"])
    assert result.exit_code == 2 and "out is not empty: expected a new folder" in " ".join(result.output.split())
