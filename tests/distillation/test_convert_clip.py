"""CLIP models of transformers as teachers, compared with what transformers itself computes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
)

from epmvg_hf.distillation.clip_teacher import ClipTeacher
from tests.fixtures.models import assert_random_numbers_are_left_alone
from tests.fixtures.teachers import Malicious, change_json, save_to_hub_cache, unit, write_code

open_clip = pytest.importorskip("open_clip")

EXPRESSIONS = ["the red dog", "It's a  small DOG, on the left!", "the red dog", "man", "the " * 30]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
MERGES = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("d", "o"), ("do", "g</w>")]
EOS = "<|endoftext|>"
KINDS = [(act, eos) for act in ("quick_gelu", "gelu") for eos in ("legacy", "first")]


def tiny_tokenizer(eos: str = "legacy") -> CLIPTokenizer:
    """A tokenizer of bytes and a few words. Its end token has the highest id, as OpenAI's has, only for "legacy"."""
    letters = [*open_clip.tokenizer.bytes_to_unicode().values()]
    letters += [f"{letter}</w>" for letter in letters]
    words, special = ["".join(pair) for pair in MERGES], ["<|startoftext|>", EOS]
    tokens = letters + (words + special if eos == "legacy" else special + words)
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=MERGES)


def tiny_config(act: str = "quick_gelu", eos: str = "legacy", text=None, vision=None) -> CLIPConfig:
    tokenizer = tiny_tokenizer(eos)
    both = {"hidden_act": act, "num_hidden_layers": 2}
    text_config = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 4}
    text_config |= {"max_position_embeddings": 14, "eos_token_id": 2 if eos == "legacy" else tokenizer.eos_token_id}
    vision_config = {"hidden_size": 24, "intermediate_size": 72, "num_attention_heads": 3, "image_size": 32}
    vision_config |= {"patch_size": 8, "num_hidden_layers": 3}
    return CLIPConfig(
        text_config={**both, **text_config, **(text or {})},
        vision_config={**both, **vision_config, **(vision or {})},
        projection_dim=20,
    )


def save_folder(folder: Path, config: CLIPConfig, eos: str = "legacy", **preprocess) -> Path:
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Ones and zeros in norms and biases, and almost linear activations, would hide mistakes.
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(eos).save_pretrained(folder)
    CLIPImageProcessor(**{"image_mean": MEAN, "image_std": STD, **preprocess}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("clips")
    return {(act, eos): save_folder(root / f"{act}-{eos}", tiny_config(act, eos), eos) for act, eos in KINDS}


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders["quick_gelu", "first"]


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def load(folder: Path) -> ClipTeacher:
    return ClipTeacher.from_pretrained(f"transformers:{folder}")


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def assert_like_transformers(teacher: ClipTeacher, folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(EXPRESSIONS, padding=True, truncation=True, max_length=14)
    tokens = tokens.convert_to_tensors("pt")
    pixels = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    seen = teacher._preprocess(pixels)
    output = teacher(pixels, EXPRESSIONS)

    expected = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(output.text_embeds, unit(expected), rtol=0, atol=1e-5)
    assert (output.text_embeds[0] - output.text_embeds[1]).abs().max() > 1e-2
    expected = model.get_image_features(pixel_values=seen)
    torch.testing.assert_close(output.image_embeds, unit(expected.pooler_output), rtol=0, atol=1e-5)
    image_embeds, _ = teacher.encode_images(pixels, output_patches=False)
    torch.testing.assert_close(image_embeds, output.image_embeds, rtol=0, atol=1e-5)

    before_last = model.vision_model(seen, output_hidden_states=True).hidden_states[-2]
    layer = model.vision_model.encoder.layers[-1]
    values = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(before_last)))
    patches = model.visual_projection(model.vision_model.post_layernorm(values))[:, 1:]
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    assert output.patch_embeds.shape == (2, side, side, 20)
    torch.testing.assert_close(output.patch_embeds.flatten(1, 2), unit(patches), rtol=0, atol=1e-5)


# Embeddings


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_same_embeddings(folders, kind):
    teacher = load(folders[kind])
    assert_like_transformers(teacher, folders[kind])
    assert teacher.embed_dim == 20
    assert teacher.image_size == 32
    assert teacher.has_patches
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.model_config["quick_gelu"] == (kind[0] == "quick_gelu")
    assert teacher.model_config["text_cfg"]["pool_type"] == {"legacy": "argmax", "first": "eos"}[kind[1]]


def test_activation_and_pooling_matter(folders):
    """If they did not matter, equal embeddings would prove nothing about them."""
    pixels = torch.rand(1, 3, 32, 32)
    first, second = (load(folders[act, "first"]).encode_images(pixels)[0] for act in ("quick_gelu", "gelu"))
    assert (first - second).abs().max() > 1e-3
    teacher = load(folders["gelu", "first"])
    tokens = teacher.tokenizer(EXPRESSIONS[:1])
    eos = tokens.tolist()[0].index(teacher.tokenizer.tokenizer.eos_token_id)
    assert tokens.argmax() != eos


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        # In floating point 49 * (101 / 49) is less than 101.
        ({}, {"hidden_size": 49, "num_attention_heads": 7, "intermediate_size": 101}),
        ({"hidden_size": 49, "num_attention_heads": 7, "intermediate_size": 101}, {}),
        ({"max_position_embeddings": 20}, {"image_size": 36, "num_hidden_layers": 2}),
    ],
    ids=["rounded mlp ratio", "rounded mlp ratio of the text", "a grid that does not fit"],
)
def test_other_sizes(tmp_path, text, vision):
    folder = save_folder(tmp_path / "model", tiny_config(text=text, vision=vision))
    teacher = load(folder)
    if not text.get("max_position_embeddings"):
        return assert_like_transformers(teacher, folder)
    assert teacher.tokenizer(EXPRESSIONS).shape == (5, 20)
    assert teacher.encode_images(torch.rand(1, 3, 36, 36))[1].shape == (1, 4, 4, 20)


def test_preprocessing(tmp_path):
    folder = save_folder(tmp_path / "model", tiny_config(), resample=2)
    teacher = load(folder)
    assert teacher.interpolation == "bilinear"
    assert teacher.image_mean == tuple(MEAN)
    assert teacher.image_std == tuple(STD)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor.from_pretrained(folder, size=size, crop_size=size)
    # Away from 0 and 255, where overshooting is clamped; bytes are rounded to after resizing.
    pixels = torch.randint(80, 176, (1, 3, 50, 50), dtype=torch.uint8)
    expected = processor(pixels[0], return_tensors="pt").pixel_values
    assert (teacher._preprocess(pixels / 255) - expected).abs().max() < 2 / 255 / min(STD)
    assert load(save_folder(tmp_path / "other", tiny_config())).interpolation == "bicubic"


def test_a_saved_processor(own, folder):
    """Where the image processor's settings are in one file with the tokenizer's."""
    CLIPProcessor(CLIPImageProcessor.from_pretrained(own), CLIPTokenizer.from_pretrained(own)).save_pretrained(own)
    (own / "preprocessor_config.json").unlink()
    assert (own / "processor_config.json").is_file()
    assert load(own).fingerprint == load(folder).fingerprint


def test_tokens(folder):
    """open_clip cleans texts first; ordinary ones become the same tokens as without."""
    tokenize, alone = load(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    texts = [*EXPRESSIONS, "", " the\tman's\n2nd dog-house; (left) of 3 / 4 'red' \"dogs\"?", "naïve é"]
    tokens = tokenize(texts)
    expected = alone(texts, padding="max_length", truncation=True, max_length=14, return_tensors="pt").input_ids
    assert tokens.dtype == torch.long
    assert torch.equal(tokens, expected)


def test_a_hub_repository(folder, tmp_path):
    save_to_hub_cache(folder, tmp_path, "someone/clip")
    teacher = ClipTeacher.from_pretrained("transformers:someone/clip", cache_dir=str(tmp_path))
    assert teacher.name == "transformers:someone/clip"
    assert teacher.fingerprint == load(folder).fingerprint


def test_older_files(own, folder):
    """A pickled state dict, in half precision, with the positions' numbers."""
    tensors = {name: tensor.half() for name, tensor in load_file(own / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(14)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (own / "model.safetensors").unlink()
    torch.save(tensors, own / "pytorch_model.bin")
    teacher = load(own)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    expected = load(folder).encode_texts(EXPRESSIONS)
    torch.testing.assert_close(teacher.encode_texts(EXPRESSIONS), expected, rtol=0, atol=1e-2)


def test_the_configuration_does_not_round_the_weights(own, folder):
    change_json(own / "config.json", dtype="float16")
    assert load(own).fingerprint == load(folder).fingerprint


def test_loading_leaves_the_random_numbers_alone(folder):
    assert_random_numbers_are_left_alone(lambda: load(folder))


def test_fingerprint(folders, folder, own):
    first = load(folder).fingerprint
    assert load(own).fingerprint == first
    change_tensors(own, lambda tensors: tensors["visual_projection.weight"][3, 4].add_(1e-3))
    known = {first, load(own).fingerprint, *(load(other).fingerprint for other in folders.values())}
    assert len(known) == 1 + len(folders)


# Never random, never code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("visual_projection.weight"), r"\(missing: visual_projection.weight\)"),
        (
            lambda tensors: tensors.pop("text_model.encoder.layers.1.self_attn.k_proj.bias"),
            r"\(missing: text_model.encoder.layers.1.self_attn.k_proj.bias\)",
        ),
        (lambda tensors: tensors.update(more=torch.zeros(2)), r"\(unexpected: more\)"),
        (
            lambda tensors: tensors.update({"text_projection.weight": torch.zeros(20, 17)}),
            r"\(of another shape: text_projection.weight\)",
        ),
        (lambda tensors: [tensors.clear(), tensors.update(more=torch.zeros(2))], r"\(missing: .* \.\.\.\)"),
    ],
    ids=["missing", "missing part", "extra", "another shape", "all"],
)
def test_the_tensors_must_be_those_of_the_model(own, change, message):
    change_tensors(own, change)
    with pytest.raises(ValueError, match=rf"^transformers:\S+ does not hold the tensors of its model {message}\.$"):
        load(own)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["config.json"], OSError, r"^there is no config.json in .*model\.$"),
        (["model.safetensors"], OSError, "^the weights of transformers:.* could not be loaded: .*model.safetensors"),
        (["tokenizer.json"], ValueError, r"^the tokenizer of transformers:.* has no words: .* lacks a tokenizer.json"),
        (["tokenizer.json", "tokenizer_config.json"], ValueError, "^the tokenizer of .* has no words: "),
        (["preprocessor_config.json"], OSError, "^the preprocessing of transformers:.* could not be loaded: "),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_missing_files(own, files, error, message):
    for file in files:
        (own / file).unlink()
    with pytest.raises(error, match=message) as raised:
        load(own)
    assert "\n" not in str(raised.value)


def test_a_missing_folder_and_weights_besides_its_own(folder):
    with pytest.raises(OSError, match=r"^the configuration of transformers:/no/such could not be loaded: ") as raised:
        ClipTeacher.from_pretrained("transformers:/no/such")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="has its own weights, so pretrained must be None, not 'openai'"):
        ClipTeacher.from_pretrained(f"transformers:{folder}", "openai")


def test_another_model_type(own):
    SiglipConfig().save_pretrained(own)
    with pytest.raises(ValueError, match=r'^transformers:.* must have the model_type "clip", not \'siglip\'\.$'):
        load(own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act of the text tower must be .*, not 'relu'"),
        ({"vision_config": {"hidden_act": "gelu_new"}}, "hidden_act of the vision tower must be .*, not 'gelu_new'"),
        (
            {"text_config": {"hidden_act": "gelu"}},
            "the same for both towers, .*'gelu' for text and 'quick_gelu' for vision",
        ),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps of the vision tower must be 1e-05, .*not 1e-06"),
        ({"text_config": {"eos_token_id": [1, 2]}}, r"eos_token_id of the text tower must be one token, not \[1, 2\]"),
        ({"text_config": {"eos_token_id": 7}}, "the tokenizer of .* does not end a text with the token 7"),
        ({"quantization_config": {"quant_method": "x"}}, "quantized weights cannot be converted"),
        ({"projection_dim": "x"}, "the configuration of transformers:.* could not be loaded: "),
    ],
)
def test_models_that_open_clip_does_not_have(own, changes, message):
    change_json(own / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        load(own)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"resample": 0}, r"resample of the image processor must be 2 \(bilinear\) or 3 \(bicubic\), not 0"),
        ({"do_normalize": False}, "must normalise pixels, by do_normalize"),
        ({"do_rescale": False}, r"must scale pixels to \[0, 1\]"),
        ({"rescale_factor": 1 / 127.5}, r"must scale pixels to \[0, 1\]"),
    ],
)
def test_preprocessing_that_a_teacher_does_not_have(own, preprocess, message):
    CLIPImageProcessor(**preprocess).save_pretrained(own)
    with pytest.raises(ValueError, match=message):
        load(own)


def test_code_in_weights_does_not_run(own, tmp_path, monkeypatch):
    # With this, torch.load without weights_only runs what it finds.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "executed"
    tensors = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    torch.save({**tensors, "more": Malicious(trap)}, own / "pytorch_model.bin")
    message = "^the weights of transformers:.* hold more than tensors, such as code, and are not loaded.$"
    with pytest.raises(ValueError, match=message):
        load(own)
    assert not trap.exists()


def test_code_beside_the_weights_does_not_run(own, folder):
    """And the attention kernel that the configuration names is not downloaded."""
    trap = write_code(own / "own.py")
    classes = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        change_json(own / name, auto_map={**classes, "AutoImageProcessor": "own.Own"})
    change_json(own / "config.json", attn_implementation="someone/kernel")
    assert load(own).fingerprint == load(folder).fingerprint
    assert not trap.exists()
