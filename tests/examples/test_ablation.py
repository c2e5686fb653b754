import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")

import ablation
from open_clip.model import CLIP

from epmvg_hf import ClipTeacher, load_grounding_dataset

TEXT = {"context_length": 16, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2, "pool_type": "eos", "eos_id": 3}
VISION = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 256}


@pytest.fixture
def teacher(tokenizer) -> ClipTeacher:
    torch.manual_seed(0)
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    clip = CLIP(**config)
    from open_clip import set_model_preprocess_cfg
    from open_clip.tokenizer import HFTokenizer

    preprocess = {"size": 64, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    set_model_preprocess_cfg(clip, preprocess)
    wrapped = HFTokenizer.__new__(HFTokenizer)
    wrapped.tokenizer = tokenizer
    return ClipTeacher(clip, wrapped, config)


def test_the_rival_computes_what_the_teachers_towers_compute(teacher):
    model, processor = ablation.make_teacher_towers(teacher, map_weight=1.0)
    model.eval()
    pixels, input_ids = torch.randn(2, 3, 64, 64), torch.randint(5, 19, (3, 7))
    visual, clip = teacher.clip.visual, teacher.clip
    with torch.no_grad():
        features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        # Not equal bit for bit: the teacher's weights are channels_last.
        torch.testing.assert_close(model.model.vision_model(pixels).feature_maps[-1], features, rtol=1e-4, atol=1e-8)
        # The teacher pads to its context. Its attention is causal, so that does not change the first tokens.
        padded = torch.nn.functional.pad(input_ids, (0, 9))
        states = clip.ln_final(
            clip.transformer(clip.token_embedding(padded) + clip.positional_embedding, attn_mask=clip.attn_mask)
        )
        torch.testing.assert_close(model.model.text_model(input_ids=input_ids).last_hidden_state, states[:, :7])
    assert processor.tokenizer is teacher.tokenizer.tokenizer


def test_captioned_images_are_others_and_have_no_box(monkeypatch):
    few = load_grounding_dataset("shapes", split="train", num_images=30)
    monkeypatch.setattr(ablation, "load_split", lambda split: few)
    train, captioned, test = ablation.load_data(Namespace(eval_rows=10), labelled=12, seed=0)
    assert len(train) == 12 and len(test) == 10
    assert not set(train["image_id"]) & set(captioned["image_id"]) and "box" not in captioned.column_names
    images = len(set(train["image_id"]))
    assert len(set(captioned["image_id"])) == min(10 * images, 30 - images)
    again, _, _ = ablation.load_data(Namespace(eval_rows=10), labelled=12, seed=0)
    other, _, _ = ablation.load_data(Namespace(eval_rows=10), labelled=12, seed=1)
    assert list(again["image_id"]) == list(train["image_id"]) != list(other["image_id"])


def _arguments(folder: Path, **changes) -> Namespace:
    defaults = {
        "output_dir": folder,
        "results": None,
        "settings": ["none", "all"],
        "labelled": [500],
        "seeds": [0, 1, 2],
    }
    defaults |= {"teacher": "t", "steps": 5, "eval_rows": 7}
    return Namespace(**{**defaults, **changes})


def test_results_of_another_study_are_refused(tmp_path):
    ablation.check_study(_arguments(tmp_path))
    ablation.check_study(_arguments(tmp_path, seeds=[4]))
    with pytest.raises(ValueError, match="give another --output_dir"):
        ablation.check_study(_arguments(tmp_path, steps=6))


def test_report_has_means_deviations_and_gaps(tmp_path):
    arguments = _arguments(tmp_path)
    gap = {"tokens": {"gap": 1.0, "alignment": 0.25, "mismatch": 0.0, "probe": 1.0}}
    for seed, accuracy in enumerate((0.1, 0.2, 0.3)):
        kinds = dict.fromkeys(("attribute", "size", "extreme", "ordinal", "relation"), accuracy)
        result = {"acc@0.5": accuracy, "acc@0.5_by_kind": kinds, "gap_before": gap, "gap_after": gap}
        result |= {"seed": seed, "seconds": 60 + seed}
        ablation.result_file(arguments, "none", 500, seed).write_text(json.dumps(result))
    ablation.write_report(arguments)
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert "| no distillation, no map loss | 0.200 ± 0.100 (3) |" in lines
    assert "| no distillation, no map loss | 0: 0.100 (60 s), 1: 0.200 (61 s), 2: 0.300 (62 s) |" in lines
    assert any(line.startswith("| no distillation, no map loss | tokens | 1.00 -> 1.00 | 0.25") for line in lines)
    assert (tmp_path / "ablation.png").stat().st_size > 5_000
