"""Tiny, offline, deterministic: every test builds what it needs, nothing is downloaded."""

import os
import sys
from pathlib import Path

# Before transformers and datasets are imported: no test may look at the Hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(1, str(Path(__file__).parents[1] / "examples" / "study"))
sys.path.insert(2, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import pytest
import torch
from huggingface_hub import HfApi
from hypothesis import HealthCheck, settings
from transformers import BertTokenizer

from epmvg_hf import EpmVGProcessor
from tests.fixtures.hub import FakeHub
from tests.fixtures.models import tiny_processor, tiny_tokenizer

# The same cases each time. `--hypothesis-profile long` looks for new ones.
settings.register_profile(
    "quick", max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("quick"), derandomize=False, max_examples=5_000)
settings.load_profile("quick")

# transformers' own tests, which `make conformance` runs in a process of their own.
collect_ignore = ["conformance"]


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


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Images for tiny teachers, in [0, 1]."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory) -> dict[str, Path]:
    """A model of open_clip for each kind of vision tower."""
    from tests.fixtures.teachers import VISION, model_config, save_folder  # needs open_clip

    root = tmp_path_factory.mktemp("teachers")
    return {name: save_folder(root / name, model_config(name)) for name in VISION}


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> FakeHub:
    hub = FakeHub(tmp_path_factory.mktemp("hub"))
    for name in ("create_repo", "create_commit", "upload_folder", "file_exists"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, name=name, **kwargs: getattr(hub, name)(*args, **kwargs))
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", hub.download)
    return hub
