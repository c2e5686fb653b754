"""Tiny, offline, deterministic: every test builds what it needs, nothing is downloaded."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before transformers and datasets are imported: no test may look at the Hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import pytest
import torch
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import BertTokenizer

from epmvg_hf import (
    ClipTeacher,
    EpmVGConfig,
    EpmVGForVisualGrounding,
    EpmVGImageProcessor,
    EpmVGProcessor,
    load_grounding_dataset,
)

# transformers' own tests, which `make conformance` runs in a process of their own.
collect_ignore = ["conformance"]

# Arguments of a quiet optimizer step on the CPU.
ONE_STEP = {
    "use_cpu": True,
    "max_steps": 1,
    "logging_steps": 1,
    "augment": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}

WORDS = ["the", "a", "red", "green", "blue", "left", "right", "small", "large", "circle", "star", "man", "dog", "on"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Prepared datasets go to the test session's folder, not to the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)


@pytest.fixture
def tokenizer() -> BertTokenizer:
    return tiny_tokenizer()


@pytest.fixture
def processor() -> EpmVGProcessor:
    return tiny_processor()


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory) -> dict[str, Path]:
    """A model of open_clip for each kind of vision tower."""
    from tiny_teachers import VISION, model_config, save_folder  # needs open_clip

    root = tmp_path_factory.mktemp("teachers")
    return {name: save_folder(root / name, model_config(name)) for name in VISION}


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """What tiny teachers see."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny_tokenizer() -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def tiny_processor() -> EpmVGProcessor:
    image_processor = EpmVGImageProcessor(size={"height": 64, "width": 64})
    return EpmVGProcessor(image_processor, tiny_tokenizer(), max_text_length=12)


def tiny_config(**changes) -> EpmVGConfig:
    settings = {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "out_features": ["stage2"],
        },
        "backbone_stride": 8,
        "text_config": {
            "model_type": "bert",
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "fusion_layers": 2,
        "fusion_attention_heads": 2,
        "fusion_ffn_dim": 32,
        "dropout": 0.0,
        "image_size": 64,
        "max_text_length": 12,
        "frozen_batch_norm": False,
    }
    return EpmVGConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes) -> EpmVGForVisualGrounding:
    torch.manual_seed(seed)
    return EpmVGForVisualGrounding(tiny_config(**changes)).eval()


def uneven_shapes(counts: list[int]) -> Dataset:
    """Training images of `shapes` that have so many expressions each, of their 8."""
    dataset = load_grounding_dataset("shapes", split="train", num_images=len(counts))
    return dataset.select([row for row, image in enumerate(dataset["image_id"]) if row % 8 < counts[int(image[-6:])]])


def assert_random_numbers_are_left_alone(action: Callable[[], object]) -> None:
    """The random numbers after the action are those that would have come without it."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    action()
    assert torch.equal(torch.rand(3), expected)


class TinyTeacher(ClipTeacher):
    """A teacher of random weights that needs no open_clip; equal inputs get equal outputs."""

    def __init__(self, embed_dim: int = 24, seed: int = 0):
        torch.nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(seed)
        self.embed_dim, self.image_size, self.seed, self.calls = embed_dim, 64, seed, 0
        self.name = "tiny colours"
        self.projection = torch.nn.Parameter(torch.randn(3, embed_dim, generator=generator), requires_grad=False)
        self.eval()

    has_patches = True
    fingerprint = property(lambda self: f"tiny {self.embed_dim} {self.seed}")

    @torch.no_grad()
    def encode_images(self, pixel_values, output_patches=True):
        self.calls += 1
        assert pixel_values.min() + 1e-4 >= 0 and pixel_values.max() <= 1 + 1e-4
        colours = torch.nn.functional.adaptive_avg_pool2d(pixel_values.float(), 4).permute(0, 2, 3, 1) - 0.5
        patches = torch.nn.functional.normalize(colours @ self.projection, dim=-1)
        pooled = torch.nn.functional.normalize(patches.mean(dim=(1, 2)), dim=-1)
        return pooled, patches if output_patches else None

    @torch.no_grad()
    def encode_texts(self, expressions):
        sums = [[sum(map(ord, text[start::3])) for start in range(3)] for text in expressions]
        return torch.nn.functional.normalize(torch.tensor(sums).sin() @ self.projection, dim=-1)


class FakeHub:
    """Stands in for the Hub where `huggingface_hub` would send a request. `files` is by repository, then by path."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.fails = folder, {}, False

    def create_repo(self, repo_id, **kwargs):
        self._answer()
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.files.setdefault(repo_id, {})
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        self._answer()
        for operation in operations:
            with operation.as_file() as file:
                self.files[repo_id][operation.path_in_repo] = file.read()
        return self._commit(repo_id)

    def upload_folder(self, repo_id, folder_path, ignore_patterns, **kwargs):
        self._answer()
        paths = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, ignore_patterns=ignore_patterns):
            self.files[repo_id][path] = Path(folder_path, path).read_bytes()
        return self._commit(repo_id)

    def file_exists(self, repo_id, filename, **kwargs):
        return filename in self.files[repo_id]

    def download(self, repo_id, filename, **kwargs):
        if filename not in self.files[repo_id]:
            raise EntryNotFoundError(filename)
        path = self.folder / filename
        path.write_bytes(self.files[repo_id][filename])
        return str(path)

    def card(self, repo_id) -> str:
        return self.files[repo_id]["README.md"].decode()

    def _commit(self, repo_id) -> CommitInfo:
        url = f"https://huggingface.co/{repo_id}/commit/0"
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid="0")

    def _answer(self):
        if self.fails:
            raise ConnectionError("the Hub does not answer")


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> FakeHub:
    hub = FakeHub(tmp_path_factory.mktemp("hub"))
    for name in ("create_repo", "create_commit", "upload_folder", "file_exists"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, name=name, **kwargs: getattr(hub, name)(*args, **kwargs))
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", hub.download)
    return hub
