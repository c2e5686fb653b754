import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_random_numbers_are_left_alone
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import to_pil_image

from epmvg_hf.teacher import ClipTeacher, TeacherOutput

open_clip = pytest.importorskip("open_clip")

EXPRESSIONS = ["the red circle", "a small dog on the left", "the red circle", "man"]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
VIT = {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8}
VISION = {
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "resnet of one head": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 256},
    "vit": VIT,
    "vit with layer scale": {**VIT, "ls_init_value": 0.1},
    "average": {**VIT, "pool_type": "avg"},
    "average, then norm": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
    "attentional pool": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "custom attention": {**VIT, "qk_norm": True},
    "timm": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}
GRIDS = {name: (2, 2) if name.startswith("resnet") else (4, 4) for name in VISION}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def model_config(vision: str = "vit", **changes) -> dict:
    return {"embed_dim": 24, "vision_cfg": VISION[vision], "text_cfg": TEXT, **changes}


def save_folder(folder: Path, config: dict, seed: int = 0, **preprocess) -> Path:
    """A model with random weights as open_clip publishes them, in a new folder."""
    folder.mkdir(parents=True)
    content = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim < 2 and tensor.is_floating_point():
                # Norms and biases are not to be trivial.
                tensor.add_(0.3 * torch.randn_like(tensor))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: save_folder(root / name, model_config(name)) for name in VISION}


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders["vit"]


@pytest.fixture(scope="module")
def weights(folder) -> str:
    return str(folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def teacher(folder) -> ClipTeacher:
    return load(folder)


@pytest.fixture
def tiny_architecture(monkeypatch) -> str:
    """An architecture that open_clip knows by its name."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", model_config())
    return "tiny"


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> ClipTeacher:
    return ClipTeacher.from_pretrained(f"local-dir:{folder}")


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(tensor, dim=-1)


def normalised(pixels: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def assert_like_open_clip(teacher: ClipTeacher, folder: Path, pixels: torch.Tensor, mean=MEAN, std=STD):
    """Same embeddings as open_clip's own loading, tokenizer and towers give at the teacher's resolution."""
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(EXPRESSIONS)
    output = teacher(pixels, EXPRESSIONS, output_patches=False)
    expected = model.encode_image(normalised(pixels, mean, std), normalize=True)
    torch.testing.assert_close(output.image_embeds, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(output.text_embeds, model.encode_text(tokens, normalize=True), rtol=0, atol=2e-6)
    assert (output.text_embeds[0] - output.text_embeds[1]).abs().max() > 1e-3


# Loading


@pytest.mark.parametrize("vision", VISION)
def test_every_tower_gives_what_open_clip_gives(folders, vision):
    teacher = load(folders[vision])
    pixels = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    assert_like_open_clip(teacher, folders[vision], pixels)
    assert teacher.embed_dim == 24


def test_an_architecture_with_a_file(tiny_architecture, folder, weights, pixel_values):
    teacher = ClipTeacher.from_pretrained(tiny_architecture, weights)
    default = open_clip.transform.PreprocessCfg()
    assert_like_open_clip(teacher, folder, pixel_values, default.mean, default.std)


@pytest.mark.parametrize(("suffix", "new_format"), [(".pt", True), (".pth", False), (".bin", True)])
def test_a_pickled_state_dict(folder, weights, teacher, tmp_path, suffix, new_format):
    path = tmp_path / f"weights{suffix}"
    content = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in load_file(weights).items()}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    same = ClipTeacher.from_pretrained(str(folder / "open_clip_config.json"), str(path))
    assert same.fingerprint == teacher.fingerprint


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
    snapshot = tmp_path / "models--someone--clip" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
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


@pytest.fixture
def bert_folder(tmp_path, tokenizer) -> Path:
    """A model whose Hugging Face tokenizer lies beside it; the name in its configuration is not looked at."""
    text = {**TEXT, "vocab_size": 40, "hf_tokenizer_name": "no/such-name", "pool_type": "eos", "eos_id": 3}
    folder = save_folder(tmp_path / "bert", model_config(text_cfg=text))
    tokenizer.save_pretrained(folder)
    return folder


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


def test_a_missing_package(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'^ClipTeacher needs open_clip: pip install "epmvg_hf\[teacher\]"$'):
        load(folder)


def test_open_clip_is_imported_only_when_used():
    code = "import sys, epmvg_hf, epmvg_hf.teacher; print('open_clip' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "False"


# Frozen


def test_a_teacher_stays_frozen(folders, pixel_values):
    teacher = load(folders["resnet"])
    before = teacher.fingerprint
    holder = nn.ModuleList([teacher])
    holder.train()
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

    pixel_values.requires_grad_(True)
    output = teacher.requires_grad_(True)(pixel_values, EXPRESSIONS)
    assert not any(embeds.requires_grad for embeds in output.values())
    # Batch norm would have moved its statistics.
    del teacher.fingerprint
    assert teacher.fingerprint == before


# Outputs


@pytest.mark.parametrize("vision", ["resnet", "vit", "average"])
def test_shapes_and_lengths(folders, vision):
    teacher = load(folders[vision])
    pixels = torch.rand(2, 3, 48, 48)
    output = teacher(pixels, EXPRESSIONS)
    assert isinstance(output, TeacherOutput)
    assert output.image_embeds.shape == (2, 24)
    assert output.text_embeds.shape == (4, 24)
    assert output.patch_embeds.shape == (2, *GRIDS[vision], 24)
    for embeds in output.values():
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(embeds.shape[:-1]))
    image_embeds, nothing = teacher.encode_images(pixels, output_patches=False)
    torch.testing.assert_close(image_embeds, output.image_embeds, rtol=0, atol=1e-6)
    assert nothing is None
    assert teacher(pixels, EXPRESSIONS, output_patches=False).patch_embeds is None


def test_attention_pool(folders):
    """The pooled embedding is the mean of the patches and of the mean feature, weighted by the pool's attention."""
    teacher = load(folders["resnet of one head"])
    pixels = torch.rand(2, 3, 64, 64)
    image_embeds, patch_embeds = teacher.encode_images(pixels)
    with torch.no_grad():
        visual, pool = teacher.clip.visual, teacher.clip.visual.attnpool
        features = visual.forward_intermediates(normalised(pixels), indices=1)["image_intermediates"][0]
        tokens = features.reshape(2, 256, 4).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
        weights = (pool.q_proj(tokens[:, :1]) @ pool.k_proj(tokens).transpose(1, 2) / 16).softmax(-1)
        projected = pool.c_proj(pool.v_proj(tokens))
    assert weights.std() > 1e-3
    torch.testing.assert_close(patch_embeds.flatten(1, 2), unit(projected[:, 1:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(image_embeds, unit((weights @ projected)[:, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["vit", "vit with layer scale"])
def test_value_path(folders, vision):
    """Written out in matrices, from the file of weights."""
    teacher = load(folders[vision])
    pixels = torch.rand(2, 3, 32, 32)
    _, patch_embeds = teacher.encode_images(pixels)
    w = {k.removeprefix("visual."): v for k, v in load_file(folders[vision] / "open_clip_model.safetensors").items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def scaled(x, name):
        return x * w[f"{name}.gamma"] if f"{name}.gamma" in w else x

    patches = normalised(pixels).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 192)
    x = torch.cat([w["class_embedding"].expand(2, 1, 16), patches @ w["conv1.weight"].reshape(16, 192).T], 1)
    x = norm(x + w["positional_embedding"], "ln_pre")
    for block in ("transformer.resblocks.0", "transformer.resblocks.1"):
        q, k, v = (norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T).split(16, -1)
        q_bias, k_bias, v_bias = w[f"{block}.attn.in_proj_bias"].split(16)
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            scores = (q + q_bias)[..., head] @ (k + k_bias)[..., head].transpose(1, 2) / 8**0.5
            heads.append(scores.softmax(-1) @ (v + v_bias)[..., head])
        attended = torch.cat(heads, -1) @ w[f"{block}.attn.out_proj.weight"].T + w[f"{block}.attn.out_proj.bias"]
        x = x + scaled(attended, f"{block}.ls_1")
        hidden = norm(x, f"{block}.ln_2") @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
        hidden = nn.functional.gelu(hidden) @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
        x = x + scaled(hidden, f"{block}.ls_2")
    block = "transformer.resblocks.2"
    values = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"][32:].T + w[f"{block}.attn.in_proj_bias"][32:]
    out = scaled(values @ w[f"{block}.attn.out_proj.weight"].T + w[f"{block}.attn.out_proj.bias"], f"{block}.ls_1")
    expected = unit(norm(out, "ln_post") @ w["proj"])[:, 1:]
    torch.testing.assert_close(patch_embeds, expected.reshape(2, 4, 4, 24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["average", "average, then norm"])
def test_average_pool(folders, vision):
    teacher = load(folders[vision])
    pixels = torch.rand(2, 3, 32, 32)
    image_embeds, patch_embeds = teacher.encode_images(pixels)
    visual = teacher.clip.visual
    with torch.no_grad():
        tokens = visual.transformer(visual._embeds(normalised(pixels)))[:, 1:]
        patches = visual.ln_post(tokens) @ visual.proj
        pooled = visual.ln_post(tokens.mean(1)) @ visual.proj if vision.endswith("norm") else patches.mean(1)
    torch.testing.assert_close(patch_embeds, unit(patches).reshape(2, 4, 4, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(image_embeds, unit(pooled), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["resnet", "vit", "average"])
def test_patches_lie_where_they_are_in_the_image(folders, vision):
    """A change in one cell changes that cell's embedding most."""
    teacher = load(folders[vision])
    rows, columns = GRIDS[vision]
    pixels = 0.5 + 0.02 * torch.rand(1, 3, 64, 64)
    _, before = teacher.encode_images(pixels)
    for row, column in [(0, columns - 1), (rows - 1, 0)]:
        changed = pixels.clone()
        height, width = 64 // rows, 64 // columns
        cell = changed[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
        cell[:, :, 2:-2, 2:-2] = torch.rand(1, 3, height - 4, width - 4)
        _, after = teacher.encode_images(changed)
        change = (after - before).norm(dim=-1)[0]
        assert divmod(int(change.argmax()), columns) == (row, column)


@pytest.mark.parametrize("vision", ["timm", "attentional pool", "custom attention"])
def test_towers_without_patches(folders, vision, pixel_values):
    teacher = load(folders[vision])
    assert teacher(pixel_values, EXPRESSIONS, output_patches=False).image_embeds.shape == (2, 24)
    assert not teacher.has_patches
    tower = "TimmModel" if vision == "timm" else "VisionTransformer"
    with pytest.raises(ValueError, match=f"for the vision tower {tower} and its way of pooling: use output_patches"):
        teacher(pixel_values, EXPRESSIONS)


def test_a_tower_of_one_block_has_no_patches(tmp_path):
    teacher = load(save_folder(tmp_path / "model", model_config(vision_cfg={**VIT, "layers": 1})))
    assert not teacher.has_patches


@pytest.mark.parametrize("vision", ["resnet", "vit", "average"])
def test_towers_with_patches(folders, vision):
    assert load(folders[vision]).has_patches


def test_its_own_mean_std_and_resolution(tmp_path, folder, pixel_values):
    other = save_folder(tmp_path / "other", model_config(), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    assert_like_open_clip(load(other), other, pixel_values, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    larger = save_folder(tmp_path / "larger", model_config(vision_cfg={**VIT, "image_size": 48}))
    teacher = load(larger)
    assert teacher.image_size == 48
    assert teacher.encode_images(pixel_values)[1].shape == (2, 6, 6, 24)
    assert_like_open_clip(teacher, larger, torch.rand(2, 3, 48, 48))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_canvas_of_another_size(tmp_path, interpolation):
    """Resized whole, like open_clip resizes a picture that is a square already."""
    folder = save_folder(tmp_path / "model", model_config(), interpolation=interpolation)
    teacher = load(folder)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    for side in (20, 50, 64):
        # Away from 0 and 255, because Pillow clamps between rows and columns too; it also rounds to bytes there.
        pixels = torch.randint(80, 176, (1, 3, side, side), dtype=torch.uint8)
        expected = transform(to_pil_image(pixels[0]))
        assert (teacher._preprocess(pixels / 255)[0] - expected).abs().max() < 2 / 255 / min(STD)


def test_what_overshoots_is_clamped(teacher):
    """Bicubic resizing of an edge between black and white leaves [0, 1]."""
    pixels = torch.zeros(1, 3, 20, 20)
    pixels[..., 10:] = 1
    seen = teacher._preprocess(pixels)
    assert seen.min() == normalised(torch.zeros(3, 1, 1)).min()
    assert seen.max() == normalised(torch.ones(3, 1, 1)).max()


def test_pixels_that_are_no_canvas(teacher, pixel_values):
    with pytest.raises(ValueError, match=r"pixel_values must have the shape \(B, 3, S, S\), not \(2, 3, 32, 16\)"):
        teacher.encode_images(pixel_values[..., :16])
    for wrong in (normalised(pixel_values), pixel_values * 255, pixel_values * torch.nan):
        with pytest.raises(ValueError, match=r"pixel_values must lie in \[0, 1\], not yet normalised"):
            teacher.encode_images(wrong)


def test_equal_expressions_are_computed_once(teacher, monkeypatch):
    seen = []
    tokenize = teacher.tokenizer
    monkeypatch.setattr(teacher, "tokenizer", lambda texts: seen.append(texts) or tokenize(texts))
    embeds = teacher.encode_texts(EXPRESSIONS)
    assert seen == [[EXPRESSIONS[0], EXPRESSIONS[1], EXPRESSIONS[3]]]
    assert torch.equal(embeds[0], embeds[2])
    for row, expression in enumerate(EXPRESSIONS):
        torch.testing.assert_close(embeds[row], teacher.encode_texts([expression])[0], rtol=0, atol=1e-6)


def test_no_expressions_and_no_list(teacher):
    assert teacher.encode_texts([]).shape == (0, 24)
    with pytest.raises(ValueError, match="expressions must be a list of strings, not the string 'man'"):
        teacher.encode_texts("man")


@pytest.mark.parametrize("vision", ["resnet", "vit", "average"])
def test_bfloat16(folders, vision):
    """Under autocast, and with the weights converted."""
    teacher = load(folders[vision])
    pixels = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    expected = teacher(pixels, EXPRESSIONS)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = teacher(pixels, EXPRESSIONS)
    for output in (autocast, teacher.bfloat16()(pixels, EXPRESSIONS)):
        for key, embeds in output.items():
            assert embeds.dtype == torch.float32
            assert not torch.equal(embeds, expected[key])
            assert (embeds * expected[key]).sum(-1).min() > 0.99
            torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(embeds.shape[:-1]))


# Fingerprint


def test_fingerprint(folder, weights, teacher, tmp_path, bert_folder, tokenizer):
    known = {"first": teacher.fingerprint}
    assert len(known["first"]) == 64
    used = load(folder)
    used.encode_texts(EXPRESSIONS)
    assert used.fingerprint == known["first"]
    config = str(folder / "open_clip_config.json")

    def changed(name: str, **changes) -> str:
        content = json.loads(Path(config).read_text())
        content = {key: {**value, **changes.get(key, {})} for key, value in content.items()}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return ClipTeacher.from_pretrained(str(path), weights).fingerprint

    assert changed("same") == known["first"]
    known["mean"] = changed("mean", preprocess_cfg={"mean": [0.5, 0.4, 0.31]})
    known["std"] = changed("std", preprocess_cfg={"std": [0.2, 0.25, 0.31]})
    known["interpolation"] = changed("interpolation", preprocess_cfg={"interpolation": "bilinear"})
    known["size"] = changed("size", model_cfg={"vision_cfg": {**VIT, "image_size": 40}})
    known["heads"] = changed("heads", model_cfg={"vision_cfg": {**VIT, "head_width": 4}})
    known["activation"] = changed("activation", model_cfg={"quick_gelu": True})

    tensors = load_file(weights)
    tensors["visual.proj"][3, 4] += 1e-3
    shutil.copytree(folder, tmp_path / "weight")
    save_file(tensors, tmp_path / "weight" / "open_clip_model.safetensors")
    known["weight"] = load(tmp_path / "weight").fingerprint

    teacher = load(bert_folder)
    known["bert"] = teacher.fingerprint
    del teacher.fingerprint
    teacher.encode_texts(EXPRESSIONS)
    assert teacher.fingerprint == known["bert"]
    words = [*tokenizer.get_vocab()]
    words[5], words[6] = words[6], words[5]
    type(tokenizer)(vocab={word: index for index, word in enumerate(words)}).save_pretrained(bert_folder)
    known["tokenizer"] = load(bert_folder).fingerprint
    assert len(set(known.values())) == len(known)
