import pytest
from huggingface_hub import ModelCard

from epmvg_hf import EpmVGConfig
from epmvg_hf.training.model_card import (
    Evaluation,
    find_base_models,
    make_card,
    strip_private_paths,
    training_command,
)


def test_the_hub_can_read_the_metadata():
    card = make_card(
        "my model",
        language="en",
        license="apache-2.0",
        tags=["demo"],
        datasets=["refcoco+"],
        base_models=["facebook/detr-resnet-50", "google-bert/bert-base-uncased"],
        evaluations=[
            Evaluation({"acc@0.5": 0.70128, "acc@0.7": 0.6, "mean_iou": 0.65}, "refcoco+", "testA", 5726, "unc"),
            Evaluation({"acc@0.5": 0.5}, split="test"),
        ],
    )
    read = ModelCard(str(card)).data  # as read from the file
    assert read.pipeline_tag == "zero-shot-object-detection" and read.library_name == "transformers"
    assert read.tags == ["visual-grounding", "referring-expression-comprehension", "epmvg", "demo"]
    assert (read.license, read.language, read.datasets) == ("apache-2.0", "en", ["refcocoplus"])
    assert read.base_model == ["facebook/detr-resnet-50", "google-bert/bert-base-uncased"]
    assert read.metrics == ["accuracy"]
    results = [
        (one.dataset_type, one.dataset_config, one.dataset_split, one.metric_name, one.metric_value)
        for one in read.eval_results
    ]
    assert results == [
        ("refcocoplus", "unc", "testA", "Acc@0.5", 0.7013),
        ("refcocoplus", "unc", "testA", "Acc@0.7", 0.6),
        ("refcocoplus", "unc", "testA", "mean IoU", 0.65),
        ("custom", None, "test", "Acc@0.5", 0.5),
    ]
    assert "| refcoco+ unc | testA | 5,726 | 0.7013 | 0.6000 | 0.6500 |" in card.text
    assert "| custom | test | - | 0.5000 | - | - |" in card.text


def test_the_text_is_the_general_card_with_what_is_known_of_the_training():
    training = {
        "num_parameters": 23_400_000, "num_trained_parameters": 12_345, "started_from": "scratch",
        "data": "8 rows of shapes", "teacher": None, "command": None, "settings": {"learning_rate": 0.1, "seed": 1},
        "history": "", "libraries": {"torch": "2.6", "datasets": "5.2"},
    }  # fmt: skip
    text = make_card("my model", repository="me/mine", training=training, adapter_of="me/base", with_code=True).text
    for part in ("# my model", 'model="me/mine"', '"me/mine", trust_remote_code=True', "## Limits", "own reading"):
        assert part in text
    assert "base model, `me/base`" in text and "only the 12,345 of the adapter" in text
    assert "23.4 million parameters" in text and "was trained from scratch on 8 rows of shapes." in text
    assert "\n\n* `learning_rate`: 0.1\n* `seed`: 1\n\nVersions: torch 2.6, datasets 5.2.\n\n## Limits" in text
    assert "## Evaluation" not in text and "```bash" not in text and "\n\n\n" not in text
    for syntax in ("{{", "{%", "None"):
        assert syntax not in text


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/me/data", "data"),
        ("/home/me/my data/flickr.yaml", "flickr.yaml"),
        ("--data_dir=/home/me/data", "--data_dir=data"),
        ("refcoco=/home/me/data", "refcoco=data"),
        ("~/data", "data"),
        ("local-dir:/home/me/clip", "local-dir:clip"),
        ('{"cache": "/home/me/cache"}', '{"cache": "cache"}'),
        ("outputs/demo", "outputs/demo"),
        ("../shared/data", "../shared/data"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("https://example.org/data/file", "https://example.org/data/file"),
        ("5e-4", "5e-4"),
    ],
)
def test_private_paths_are_stripped(argument, shown):
    assert strip_private_paths(argument) == shown


def test_the_command_keeps_relative_paths_and_no_tokens(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = str(tmp_path / "examples" / "run.py")
    argv = [script, "--hub_token", "hf_a", "--tokenizer_name", "bert", "--hub_token=hf_b", "--lr", "1e-4", "a b"]
    assert training_command(argv, 1) == "python examples/run.py --tokenizer_name bert --lr 1e-4 'a b'"
    assert training_command(argv, 4).startswith("accelerate launch --num_processes 4 examples/run.py")
    assert training_command(["-c"], 1) is None


def test_folders_are_no_base_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    config = EpmVGConfig()
    config.backbone_config.name_or_path = "microsoft/resnet-50"
    config.text_config.name_or_path = str(tmp_path)
    config.name_or_path = "outputs"
    assert find_base_models(config, "me/base") == ["me/base", "microsoft/resnet-50"]
