"""Tests of where a teacher's weights, configuration and tokenizer come from, and that nothing there can run code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from epmvg_hf import ClipTeacher
from tests.fixtures.models import assert_random_numbers_are_left_alone
from tests.fixtures.teachers import (
    EXPRESSIONS,
    MEAN,
    STD,
    TEXT,
    VISION,
    VIT,
    assert_like_open_clip,
    load,
    model_config,
    save_bert_folder,
    save_folder,
    save_to_hub_cache,
)

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def folder(clip_folders) -> Path:
    return clip_folders["vit"]


@pytest.fixture(scope="module")
def weights(folder) -> str:
    return str(folder / "open_clip_model.safetensors")


@pytest.fixture
def tiny_architecture(monkeypatch) -> str:
    """An architecture that open_clip knows by its name."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", model_config())
    return "tiny"


@pytest.fixture
def bert_folder(tmp_path, tokenizer) -> Path:
    return save_bert_folder(tmp_path / "bert", tokenizer)


# Loading


def test_an_architecture_with_a_file(tiny_architecture, folder, weights, pixel_values):
    teacher = ClipTeacher.from_pretrained(tiny_architecture, weights)
    default = open_clip.transform.PreprocessCfg()
    assert_like_open_clip(teacher, folder, pixel_values, default.mean, default.std)


@pytest.mark.parametrize(("suffix", "new_format"), [(".pt", True), (".pth", False), (".bin", True)])
def test_a_pickled_state_dict(folder, weights, tmp_path, suffix, new_format):
    path = tmp_path / f"weights{suffix}"
    content = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in load_file(weights).items()}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    same = ClipTeacher.from_pretrained(str(folder / "open_clip_config.json"), str(path))
    assert same.fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_tag(tiny_architecture, folder, weights, pixel_values, monkeypatch, tmp_path, quick_gelu):
    """The tag has its own mean, standard deviation and activation."""
    tag = {"file": weights, "mean": MEAN, "std": STD, "quick_gelu": quick_gelu}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"mine": tag})
    teacher = ClipTeacher.from_pretrained(tiny_architecture, "mine")
    assert teacher.name == "tiny mine"
    like = tmp_path / "like"
    shutil.copytree(folder, like)
    config = {"model_cfg": model_config(quick_gelu=quick_gelu), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (like / "open_clip_config.json").write_text(json.dumps(config))
    assert_like_open_clip(teacher, like, pixel_values)
    assert teacher.fingerprint == load(like).fingerprint
    assert open_clip.get_model_config("tiny") == model_config()


def test_a_configuration_file(folder, weights, pixel_values, tmp_path):
    known = open_clip.list_models()
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(model_config()))
    teacher = ClipTeacher.from_pretrained(str(bare), weights)
    default = open_clip.transform.PreprocessCfg()
    assert_like_open_clip(teacher, folder, pixel_values, default.mean, default.std)
    teacher = ClipTeacher.from_pretrained(str(folder / "open_clip_config.json"), weights)
    assert_like_open_clip(teacher, folder, pixel_values)
    assert open_clip.list_models() == known


def test_a_hub_repository(folder, pixel_values, tmp_path):
    save_to_hub_cache(folder, tmp_path, "someone/clip")
    teacher = ClipTeacher.from_pretrained("hf-hub:someone/clip", cache_dir=str(tmp_path))
    assert teacher.name == "hf-hub:someone/clip"
    assert_like_open_clip(teacher, folder, pixel_values)
    assert teacher.fingerprint == load(folder).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_text": True},
        {"text_cfg": {**TEXT, "pool_type": "last", "proj_bias": True}},
        {"custom_text": True, "init_logit_bias": -10.0},
        {
            "custom_text": True,
            "vision_cfg": {**VISION["attentional pool"], "output_tokens": True},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
    ],
    ids=["custom text", "last token", "logit bias", "CoCa"],
)
def test_every_model_class(tmp_path, pixel_values, changes):
    folder = save_folder(tmp_path / "model", model_config(**changes))
    assert_like_open_clip(load(folder), folder, pixel_values)


def test_a_text_tower_pooled_at_the_end_token(folder, tmp_path, pixel_values):
    """In CLIP's vocabulary the end has the highest id: "eos" and "argmax" are to agree."""
    eos = tmp_path / "eos"
    shutil.copytree(folder, eos)
    config = model_config(text_cfg={**TEXT, "pool_type": "eos", "eos_id": 49407})
    (eos / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    expected = load(folder).encode_texts(EXPRESSIONS)
    torch.testing.assert_close(load(eos).encode_texts(EXPRESSIONS), expected, rtol=0, atol=0)


def test_a_folder_with_its_own_tokenizer(bert_folder, pixel_values):
    assert_like_open_clip(load(bert_folder), bert_folder, pixel_values)


def test_a_configuration_file_with_a_tokenizer(bert_folder, tmp_path):
    content = json.loads((bert_folder / "open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(bert_folder)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(content))
    teacher = ClipTeacher.from_pretrained(str(config), str(bert_folder / "open_clip_model.safetensors"))
    expected = load(bert_folder).encode_texts(EXPRESSIONS)
    torch.testing.assert_close(teacher.encode_texts(EXPRESSIONS), expected, rtol=0, atol=0)


def test_a_hugging_face_text_tower(tmp_path, tokenizer, pixel_values):
    """Only its configuration is there: all weights come from the one file."""
    tower = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(tower))
    text = {"hf_model_name": str(tmp_path / "tower"), "hf_tokenizer_name": "bert", "context_length": 12}
    text |= {"hf_proj_type": "linear", "hf_model_pretrained": False}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "model"
    folder = save_folder(folder, model_config(text_cfg=text))
    tokenizer.save_pretrained(folder)
    assert_like_open_clip(load(folder), folder, pixel_values)


def test_loading_leaves_the_random_numbers_alone(folder):
    assert_random_numbers_are_left_alone(lambda: load(folder))


# Never random, never code


def test_weights_are_never_missing(folder, weights, tmp_path):
    with pytest.raises(ValueError, match=r"^ViT-B-32 needs pretrained: a file of weights, or a tag .*: openai,"):
        ClipTeacher.from_pretrained("ViT-B-32")
    with pytest.raises(ValueError, match=r"^'nonsense' is neither a file nor a tag of ViT-B-32, whose tags .*openai"):
        ClipTeacher.from_pretrained("ViT-B-32", "nonsense")
    with pytest.raises(ValueError, match=r"^ViT-B-33 is neither an open_clip architecture nor the path of a .json"):
        ClipTeacher.from_pretrained("ViT-B-33", "openai")
    with pytest.raises(ValueError, match="/no/such/folder is neither an open_clip architecture"):
        ClipTeacher.from_pretrained("/no/such/folder", weights)
    with pytest.raises(FileNotFoundError, match="there is no folder /no/such/folder"):
        ClipTeacher.from_pretrained("local-dir:/no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"there is no file /no/such/config.json"):
        ClipTeacher.from_pretrained("/no/such/config.json", weights)
    with pytest.raises(ValueError, match=r"open_clip_config.json has no weights of its own: pretrained must be"):
        ClipTeacher.from_pretrained(str(folder / "open_clip_config.json"))
    with pytest.raises(FileNotFoundError, match=r"there is no file of weights /no/such.safetensors"):
        ClipTeacher.from_pretrained(str(folder / "open_clip_config.json"), "/no/such.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*open_clip_config.json"):
        ClipTeacher.from_pretrained(f"local-dir:{tmp_path}")
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no weights, such as open_clip_model.safetensors"):
        ClipTeacher.from_pretrained(f"local-dir:{tmp_path}")


def test_only_one_source_of_weights(folder, weights):
    with pytest.raises(ValueError, match="has its own weights, so pretrained must be None, not 'openai'"):
        ClipTeacher.from_pretrained(f"local-dir:{folder}", "openai")
    with pytest.raises(ValueError, match="has its own weights, so pretrained must be None"):
        ClipTeacher.from_pretrained("hf-hub:someone/clip", weights)


def test_what_cannot_be_downloaded(tmp_path):
    with pytest.raises(OSError, match="the weights openai of ViT-B-32 could not be downloaded"):
        ClipTeacher.from_pretrained("ViT-B-32", "openai", cache_dir=str(tmp_path))
    with pytest.raises(OSError, match="the configuration of hf-hub:someone/clip could not be downloaded"):
        ClipTeacher.from_pretrained("hf-hub:someone/clip", cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "it is no JSON object"),
        (json.dumps({"embed_dim": 24}), "it lacks vision_cfg, text_cfg"),
        (json.dumps(model_config(vision_cfg={**VIT, "no_such_key": 1})), "open_clip cannot build .*no_such_key"),
        (
            json.dumps(model_config(text_cfg={**TEXT, "tokenizer_kwargs": {"no_such": 1}})),
            "the tokenizer .*no_such",
        ),
        (json.dumps(model_config(vision_cfg={**VIT, "image_size": [32, 40]})), "a teacher must see squares.*32 x 40"),
    ],
)
def test_a_wrong_configuration(text, message, weights, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        ClipTeacher.from_pretrained(str(path), weights)
    assert "\n" not in str(raised.value)


def drop(tensors):
    del tensors["visual.proj"]


def add(tensors):
    tensors["visual.more"] = torch.zeros(2)


def reshape(tensors):
    tensors["visual.proj"] = torch.zeros(16, 25)


def replace_all(tensors):
    tensors.clear()
    tensors["weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [(drop, "Missing.*visual.proj"), (add, "Unexpected.*visual.more"), (reshape, "size mismatch"), (replace_all, "")],
)
def test_the_tensors_must_be_those_of_the_model(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "open_clip_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"does not hold the weights of local-dir:.*{message}") as raised:
        load(tmp_path / "model")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 800


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("torch.save", "file"),
        ("torch.save", "folder"),
        ("old torch.save", "file"),
        ("pickle", "file"),
        ("renamed", "folder"),
    ],
)
def test_code_in_weights_does_not_run(tiny_architecture, folder, tmp_path, monkeypatch, how, where):
    # With it, torch.load without weights_only runs what it finds.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "executed"
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    path = tmp_path / "model" / "open_clip_pytorch_model.bin"
    content = {"state_dict": {"visual.proj": Malicious(trap)}}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "old torch.save")
        torch.load(path, weights_only=False)
        trap.unlink()
    if how == "renamed":
        path = path.rename(path.with_name("open_clip_model.safetensors"))
    name = tiny_architecture if where == "file" else f"local-dir:{path.parent}"
    with pytest.raises(ValueError, match=r"is not loaded|does not hold the weights") as raised:
        ClipTeacher.from_pretrained(name, str(path) if where == "file" else None)
    assert "\n" not in str(raised.value)
    assert not trap.exists()


def test_a_torchscript_archive_is_refused(tiny_architecture, tmp_path):
    path = tmp_path / "script.pt"
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(ValueError, match="is a TorchScript archive, which holds code: save its state dict instead"):
        ClipTeacher.from_pretrained(tiny_architecture, str(path))


def test_other_files_of_weights_are_refused(tiny_architecture, tmp_path):
    path = tmp_path / "weights.npz"
    path.touch()
    with pytest.raises(ValueError, match=r"weights must be a file .safetensors, .pt, .pth or .bin, not .*weights.npz"):
        ClipTeacher.from_pretrained(tiny_architecture, str(path))
    damaged = tmp_path / "weights.pt"
    damaged.write_bytes(b"not much")
    with pytest.raises(ValueError, match=r"weights.pt is damaged or holds more than tensors"):
        ClipTeacher.from_pretrained(tiny_architecture, str(damaged))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "is refused because the options of its tokenizer include trust_remote_code"),
        ({}, "the tokenizer of local-dir:.* could not be loaded"),
    ],
)
def test_a_tokenizer_does_not_run_code(bert_folder, tmp_path, options, message):
    """open_clip hands the options in a downloaded configuration on to AutoTokenizer."""
    trap = tmp_path / "executed"
    (bert_folder / "own.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\n")
    path = bert_folder / "tokenizer_config.json"
    auto_map = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | auto_map))
    path = bert_folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = options
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(bert_folder)
    assert not trap.exists()


def test_the_name_is_what_it_was_loaded_by_without_folders(folder, tiny_architecture, weights, tmp_path, monkeypatch):
    assert load(folder).name == "local-dir:vit"
    assert ClipTeacher.from_pretrained(tiny_architecture, weights).name == "tiny open_clip_model.safetensors"
    (tmp_path / "own.json").write_text(json.dumps(model_config()))
    teacher = ClipTeacher.from_pretrained(str(tmp_path / "own.json"), weights)
    assert teacher.name == "own.json open_clip_model.safetensors"
    monkeypatch.chdir(folder)
    assert ClipTeacher.from_pretrained("local-dir:.").name == "local-dir:vit"
