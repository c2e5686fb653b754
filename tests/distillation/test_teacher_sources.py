"""Where a teacher's weights, configuration and tokenizer come from, and that nothing there can execute code."""

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
    Malicious,
    assert_like_open_clip,
    change_json,
    load,
    model_config,
    save_bert_folder,
    save_folder,
    save_to_hub_cache,
    write_code,
)

open_clip = pytest.importorskip("open_clip")

DEFAULT = open_clip.transform.PreprocessCfg()


@pytest.fixture(scope="module")
def folder(clip_folders) -> Path:
    return clip_folders["vit"]


@pytest.fixture(scope="module")
def weights(folder) -> str:
    return str(folder / "open_clip_model.safetensors")


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def tiny_architecture(monkeypatch) -> str:
    """An architecture that open_clip knows by its name."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", model_config())
    return "tiny"


@pytest.fixture
def bert_folder(tmp_path, tokenizer) -> Path:
    return save_bert_folder(tmp_path / "bert", tokenizer)


@pytest.fixture
def no_question(monkeypatch):
    """transformers may not ask the user anything."""

    def ask(question):
        pytest.fail(f"the user was asked: {question}")

    monkeypatch.setattr("builtins.input", ask)


def change_text_config(folder: Path, **changes) -> None:
    path = folder / "open_clip_config.json"
    text = json.loads(path.read_text())["model_cfg"]["text_cfg"]
    change_json(path, model_cfg={"text_cfg": text | changes})


# Loading


def test_an_architecture_with_a_file(tiny_architecture, folder, weights, pixel_values):
    teacher = ClipTeacher.from_pretrained(tiny_architecture, weights)
    assert_like_open_clip(teacher, folder, pixel_values, DEFAULT.mean, DEFAULT.std)


@pytest.mark.parametrize(("suffix", "new_format"), [(".pt", True), (".pth", False), (".bin", True)])
def test_a_pickled_state_dict(folder, weights, tmp_path, suffix, new_format):
    path = tmp_path / f"weights{suffix}"
    content = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in load_file(weights).items()}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    same = ClipTeacher.from_pretrained(str(folder / "open_clip_config.json"), str(path))
    assert same.fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_tag(tiny_architecture, own, weights, pixel_values, monkeypatch, quick_gelu):
    """A tag brings its own mean, standard deviation and activation."""
    tag = {"file": weights, "mean": MEAN, "std": STD, "quick_gelu": quick_gelu}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"mine": tag})
    teacher = ClipTeacher.from_pretrained(tiny_architecture, "mine")
    assert teacher.name == "tiny mine"
    change_json(own / "open_clip_config.json", model_cfg=model_config(quick_gelu=quick_gelu))
    assert_like_open_clip(teacher, own, pixel_values)
    assert teacher.fingerprint == load(own).fingerprint
    assert open_clip.get_model_config("tiny") == model_config()


def test_a_configuration_file(folder, weights, pixel_values, tmp_path):
    known = open_clip.list_models()
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(model_config()))
    teacher = ClipTeacher.from_pretrained(str(bare), weights)
    assert_like_open_clip(teacher, folder, pixel_values, DEFAULT.mean, DEFAULT.std)
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
        {"custom_text": True, "init_logit_bias": -10.0},
        {"text_cfg": {**TEXT, "pool_type": "last", "proj_bias": True}},
        {
            "custom_text": True,
            "vision_cfg": {**VISION["attentional pool"], "output_tokens": True},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
    ],
    ids=["custom text, logit bias", "last token", "CoCa"],
)
def test_every_model_class(tmp_path, pixel_values, changes):
    folder = save_folder(tmp_path / "model", model_config(**changes))
    assert_like_open_clip(load(folder), folder, pixel_values)


def test_a_folder_with_its_own_tokenizer(bert_folder, pixel_values):
    assert_like_open_clip(load(bert_folder), bert_folder, pixel_values)


def test_a_configuration_file_with_a_tokenizer(bert_folder, tmp_path):
    expected = load(bert_folder).encode_texts(EXPRESSIONS)
    change_text_config(bert_folder, hf_tokenizer_name=str(bert_folder))
    config = shutil.move(bert_folder / "open_clip_config.json", tmp_path / "config.json")
    teacher = ClipTeacher.from_pretrained(str(config), str(bert_folder / "open_clip_model.safetensors"))
    torch.testing.assert_close(teacher.encode_texts(EXPRESSIONS), expected, rtol=0, atol=0)


def test_a_hugging_face_text_tower(tmp_path, tokenizer, pixel_values, no_question):
    """Only its configuration is there: all weights come from the one file. And it may not bring code."""
    tower = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    config = tmp_path / "tower" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(tower))
    text = {"hf_model_name": str(tmp_path / "tower"), "hf_tokenizer_name": "bert", "context_length": 12}
    text |= {"hf_proj_type": "linear", "hf_model_pretrained": False}
    folder = save_folder(tmp_path / "model", model_config(text_cfg=text))
    tokenizer.save_pretrained(folder)
    teacher = load(folder)
    assert_like_open_clip(teacher, folder, pixel_values)

    # The folder's own configuration of the tower replaces the one that is named, which is on the Hub.
    shutil.copy(config, folder)
    change_text_config(folder, hf_model_name="an/encoder")
    assert torch.equal(load(folder).encode_texts(EXPRESSIONS), teacher.encode_texts(EXPRESSIONS))
    (folder / "config.json").unlink()
    change_text_config(folder, hf_model_name=str(config.parent))

    trap = write_code(config.parent / "own.py")
    own_code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    for changes, by in ((own_code, "auto_map"), ({"attn_implementation": "a/kernel"}, "attn_implementation")):
        config.write_text(json.dumps(tower | changes))
        with pytest.raises(ValueError, match=f"its text tower .*tower asks for code by {by}, which is not run"):
            load(folder)
    assert not trap.exists()


def test_loading_leaves_the_random_numbers_alone(folder):
    assert_random_numbers_are_left_alone(lambda: load(folder))


def test_the_name_is_what_it_was_loaded_from_without_folders(folder, tiny_architecture, weights, monkeypatch):
    assert load(folder).name == "local-dir:vit"
    assert ClipTeacher.from_pretrained(tiny_architecture, weights).name == "tiny open_clip_model.safetensors"
    teacher = ClipTeacher.from_pretrained(str(folder / "open_clip_config.json"), weights)
    assert teacher.name == "open_clip_config.json open_clip_model.safetensors"
    monkeypatch.chdir(folder)
    assert ClipTeacher.from_pretrained("local-dir:.").name == "local-dir:vit"


# Never random


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("ViT-B-32",), ValueError, r"^ViT-B-32 needs pretrained, a file of weights or a tag \(openai, .*, not None"),
        (("ViT-B-32", "none"), ValueError, r"^ViT-B-32 needs pretrained, .* a tag \(openai, .*\), not 'none'\.$"),
        (
            ("ViT-B-33", "openai"),
            ValueError,
            r"^ViT-B-33 is neither an open_clip architecture nor the path of a .json",
        ),
        (("/no/folder", "{weights}"), ValueError, "/no/folder is neither an open_clip architecture"),
        (("local-dir:/no/folder",), FileNotFoundError, "there is no file /no/folder/open_clip_config.json"),
        (("local-dir:{tmp_path}",), FileNotFoundError, "the folder .* has no weights, such as open_clip_model"),
        (("/no/config.json", "{weights}"), FileNotFoundError, "there is no file /no/config.json"),
        (("{config}",), ValueError, "open_clip_config.json has no weights of its own: pretrained must be"),
        (("{config}", "/no.safetensors"), FileNotFoundError, "there is no file of weights /no.safetensors"),
        (("local-dir:{tmp_path}", "openai"), ValueError, "its own weights, so pretrained must be None, not 'openai'"),
        (("hf-hub:someone/clip", "{weights}"), ValueError, "has its own weights, so pretrained must be None"),
        (("ViT-B-32", "openai"), OSError, "the weights openai of ViT-B-32 could not be downloaded"),
        (("hf-hub:someone/clip",), OSError, "the configuration of hf-hub:someone/clip could not be downloaded"),
    ],
)
def test_weights_that_are_not_there(folder, weights, tmp_path, arguments, error, message):
    config = shutil.copy(folder / "open_clip_config.json", tmp_path)
    arguments = [text.format(weights=weights, tmp_path=tmp_path, config=config) for text in arguments]
    with pytest.raises(error, match=message) as raised:
        ClipTeacher.from_pretrained(*arguments, cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not an open_clip model configuration: JSONDecodeError"),
        ("[]", "is not an open_clip model configuration"),
        (json.dumps({"embed_dim": 24}), "it lacks vision_cfg, text_cfg"),
        (json.dumps(model_config(vision_cfg={**VIT, "no_such_key": 1})), "open_clip cannot build .*no_such_key"),
        (json.dumps(model_config(text_cfg={**TEXT, "tokenizer_kwargs": {"no_such": 1}})), "the tokenizer .*no_such"),
        (json.dumps(model_config(vision_cfg={**VIT, "image_size": [32, 40]})), "must take square images.*32 x 40"),
    ],
)
def test_a_wrong_configuration(text, message, weights, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        ClipTeacher.from_pretrained(str(path), weights)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("visual.proj"), "Missing.*visual.proj"),
        (lambda tensors: tensors.update({"visual.more": torch.zeros(2)}), "Unexpected.*visual.more"),
        (lambda tensors: tensors.update({"visual.proj": torch.zeros(16, 25)}), "size mismatch"),
        (lambda tensors: [tensors.clear(), tensors.update(weight=torch.zeros(2))], "Error"),
    ],
    ids=["missing", "unexpected", "another shape", "all"],
)
def test_the_tensors_must_be_those_of_the_model(own, change, message):
    path = own / "open_clip_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"^open_clip cannot build local-dir:.*safetensors: .*{message}") as raised:
        load(own)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 800


def test_the_tokenizer_must_fit_the_text_tower(bert_folder):
    change_text_config(bert_folder, eos_id=30)
    with pytest.raises(ValueError, match=r"the tokenizer of local-dir:.*bert does not end a text with the token 30"):
        load(bert_folder)


# Never code


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
def test_code_in_weights_does_not_run(tiny_architecture, own, tmp_path, monkeypatch, how, where):
    # With this, torch.load without weights_only runs what it finds.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "executed"
    (own / "open_clip_model.safetensors").unlink()
    path = own / "open_clip_pytorch_model.bin"
    content = {"state_dict": {"visual.proj": Malicious(trap)}}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "old torch.save")
        torch.load(path, weights_only=False)
        trap.unlink()
    if how == "renamed":
        path = path.rename(path.with_name("open_clip_model.safetensors"))
    name = tiny_architecture if where == "file" else f"local-dir:{own}"
    with pytest.raises(ValueError, match=r"is not loaded|SafetensorError") as raised:
        ClipTeacher.from_pretrained(name, str(path) if where == "file" else None)
    assert "\n" not in str(raised.value)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
def test_other_files_of_weights_are_refused(tiny_architecture, tmp_path):
    script, damaged, numpy = tmp_path / "script.pt", tmp_path / "damaged.pt", tmp_path / "weights.npz"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), script)
    damaged.write_bytes(b"not much")
    numpy.touch()
    for path in (script, damaged):
        with pytest.raises(ValueError, match=f"{path} is damaged or holds more than a state dict of tensors"):
            ClipTeacher.from_pretrained(tiny_architecture, str(path))
    with pytest.raises(ValueError, match=r"weights must be a file .safetensors, .pt, .pth or .bin, not .*weights.npz"):
        ClipTeacher.from_pretrained(tiny_architecture, str(numpy))


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {}])
def test_code_of_a_tokenizer_does_not_run(bert_folder, no_question, options):
    """open_clip passes the options in a downloaded configuration on to AutoTokenizer."""
    trap = write_code(bert_folder / "own.py")
    auto_map = {"AutoTokenizer": ["own.Own", None]}
    change_json(bert_folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Own")
    change_text_config(bert_folder, tokenizer_kwargs=options)
    with pytest.raises(ValueError, match=r"the tokenizer of local-dir:.* could not be loaded"):
        load(bert_folder)
    assert not trap.exists()
