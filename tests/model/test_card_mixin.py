import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from epmvg_hf import EpmVGForVisualGrounding, EpmVGProcessor
from epmvg_hf.model.card_mixin import general_card
from tests.fixtures.models import tiny_model, tiny_processor

OWN = "---\nlicense: mit\nmodel-index:\n- name: run\n  results: []\n---\n\n# run\n\nOf this run, see OWNER/NAME.\n"


@pytest.fixture
def saved(tmp_path):
    """A folder as a training run leaves it: model, processor and its own card."""
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(OWN)
    return tmp_path


def test_a_general_card_claims_nothing_about_the_weights():
    card = general_card("model")
    read = ModelCard(str(card)).data  # as read from the file
    assert read.pipeline_tag == "zero-shot-object-detection" and read.library_name == "transformers"
    assert read.tags == ["visual-grounding", "referring-expression-comprehension", "epmvg"]
    assert read.license is None and read.eval_results is None and read.datasets is None and read.base_model is None
    for part in ("# model", "pip install", "pipeline(", "## Limits", "2312.17648", "own reading"):
        assert part in card.text
    for part in ("## Evaluation", "## Training", "trust_remote_code", "{{", "{%", "More Information Needed"):
        assert part not in card.text


@pytest.mark.parametrize("first", ["model", "processor"])
def test_pushed_parts_of_a_folder_bring_its_card(saved, hub, first):
    model, processor = EpmVGForVisualGrounding.from_pretrained(saved), EpmVGProcessor.from_pretrained(saved)
    for part in (model, processor) if first == "model" else (processor, model):
        part.push_to_hub("grounder", tags=["mine"])
    assert set(hub.files["me/grounder"]) == {
        "README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    card = ModelCard(hub.card("me/grounder"))
    assert "Of this run, see me/grounder." in card.text
    assert card.data.license == "mit" and card.data.tags == ["mine"]
    assert (saved / "README.md").read_text() == OWN


def test_saving_and_pushing_at_once_keeps_the_folder_s_card(saved, hub):
    model = EpmVGForVisualGrounding.from_pretrained(saved)
    model.save_pretrained(saved, push_to_hub=True, repo_id="grounder")
    assert "Of this run, see me/grounder." in hub.card("me/grounder")
    assert "Of this run, see me/grounder." in (saved / "README.md").read_text()


def test_a_model_of_no_folder_gets_a_general_card(hub, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("a project's, of the folder where the process happens to run")
    monkeypatch.chdir(tmp_path)
    tiny_model().push_to_hub("lab/grounder")
    card = ModelCard(hub.card("lab/grounder"))
    assert card.data.pipeline_tag == "zero-shot-object-detection"
    assert 'pipeline("visual-grounding", model="lab/grounder")' in card.text
    assert "More Information Needed" not in card.text


def test_a_card_written_on_the_hub_stays(hub):
    hub.create_repo("me/grounder")
    hub.files["me/grounder"]["README.md"] = b"---\nlicense: mit\n---\n\nWritten with care.\n"
    tiny_model().push_to_hub("grounder")
    tiny_processor().push_to_hub("grounder")
    assert "Written with care." in hub.card("me/grounder")


def test_code_goes_along_and_the_card_says_so(hub, monkeypatch):
    monkeypatch.setattr(EpmVGForVisualGrounding, "_auto_class", "AutoModelForZeroShotObjectDetection")
    tiny_model().push_to_hub("grounder")
    assert "modeling_epmvg.py" in hub.files["me/grounder"]
    assert '"me/grounder", trust_remote_code=True' in hub.card("me/grounder")


def test_a_failed_push_raises_and_the_next_one_succeeds(saved, hub):
    model = EpmVGForVisualGrounding.from_pretrained(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    hub.create_repo("me/grounder")
    hub.fails = True
    with pytest.raises(ConnectionError):
        model.push_to_hub("grounder")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before

    hub.fails = False
    model.push_to_hub("grounder")
    pushed = load(hub.files["me/grounder"]["model.safetensors"])
    assert all((pushed[name] == tensor).all() for name, tensor in model.state_dict().items())
