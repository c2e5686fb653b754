import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BertTokenizer, PreTrainedConfig
from transformers.utils import ModelOutput

from epmvg_hf.model.image_processing_epmvg import EpmVGImageProcessor
from epmvg_hf.model.image_processing_pil_epmvg import EpmVGImageProcessorPil
from epmvg_hf.model.processing_epmvg import EpmVGProcessor, logger
from tests.fixtures.paths import SHARED
from tests.fixtures.transvg_images import ONE_LEVEL, transvg_image

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "dog", "left", "of", "tree"]
BACKENDS = [EpmVGImageProcessor, EpmVGImageProcessorPil]


def make_processor(backend=EpmVGImageProcessor, max_text_length=20, **image_settings):
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return EpmVGProcessor(backend(**{"size": 64, **image_settings}), tokenizer, max_text_length=max_text_length)


def blank(width, height):
    return Image.new("RGB", (width, height), (90, 120, 200))


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def warnings_of_processor(caplog):
    """Captures the warnings of the processor, also those that earlier tests have already made it log once."""
    type(logger).warning_once.cache_clear()
    caplog.set_level(logging.WARNING, logger=logger.name)
    return caplog


# Inputs from images, expressions and boxes


def test_one_of_each(processor):
    inputs = processor(images=blank(64, 32), text="the red dog", boxes=[0, 0, 32, 32])
    assert set(inputs) == {*processor.model_input_names, "labels"}
    assert inputs.pixel_values.shape == (1, 3, 64, 64)
    assert inputs.original_sizes.tolist() == [[32, 64]]
    assert inputs.letterbox.tolist() == [[64, 16, 0, 64]]
    assert inputs.input_ids.tolist() == [[2, 5, 6, 7, 3]]
    assert inputs.attention_mask.tolist() == [[1] * 5]
    assert inputs.image_index.tolist() == [0]
    assert inputs.image_index.dtype == torch.int64
    assert inputs.labels.dtype == torch.float32
    assert inputs.labels.tolist() == [[0.25, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize(
    "sizes, text, image_index",
    [
        ([(64, 32), (9, 9)], ["dog", "red tree"], [0, 1]),
        ((64, 32), ["dog", "red tree", "the dog"], [0, 0, 0]),
        ((64, 32), [["dog", "red tree"]], [0, 0]),
        ([(64, 32)], "dog", [0]),
        ([(64, 32), (9, 9), (8, 20)], [["dog", "red"], [], ["tree"]], [0, 0, 2]),
        ([(64, 32), (9, 9)], (("dog",), ("red",)), [0, 1]),
    ],
)
def test_nesting_of_text(processor, sizes, text, image_index):
    images = [blank(*size) for size in sizes] if isinstance(sizes, list) else blank(*sizes)
    inputs = processor(images=images, text=text)
    assert inputs.image_index.tolist() == image_index
    assert len(inputs.input_ids) == len(inputs.attention_mask) == len(image_index)
    assert "labels" not in inputs


def test_batched_array_of_images(processor):
    inputs = processor(images=np.zeros((2, 30, 40, 3), np.uint8), text=["dog", "tree"])
    assert inputs.image_index.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_kinds_of_boxes(processor, kind):
    image, box = blank(64, 32), [0, 0, 32, 32]
    expected = torch.tensor([[0.25, 0.5, 0.5, 0.5]] * 2)
    assert torch.equal(processor(images=image, text="dog", boxes=kind(box)).labels, expected[:1])
    assert torch.equal(processor(images=image, text=["dog", "red"], boxes=kind([box, box])).labels, expected)
    nested = processor(images=[image, image], text=[["dog", "red"], []], boxes=[kind([box, box]), []])
    assert torch.equal(nested.labels, expected)


def test_text_only_and_images_only(processor):
    assert set(processor(text=["the dog", "red"])) == {"input_ids", "attention_mask"}
    assert set(processor(text="the dog")) == {"input_ids", "attention_mask"}
    assert set(processor(images=blank(9, 9))) == {"pixel_values", "pixel_mask", "original_sizes", "letterbox"}


def test_padding(processor):
    text = ["dog", "the red dog left of the tree"]
    assert processor(text=text).input_ids.shape == (2, 9)
    inputs = processor(text=text, padding="max_length")
    assert inputs.input_ids.shape == (2, 20)
    assert inputs.attention_mask.sum(1).tolist() == [3, 9]


def test_keyword_arguments_reach_both_parts(processor):
    inputs = processor(images=blank(64, 32), text="dog", padding="max_length", max_length=27, size=32, do_rescale=True)
    assert inputs.input_ids.shape == (1, 27)
    assert inputs.pixel_values.shape == (1, 3, 32, 32)
    inputs = processor(
        images=blank(64, 32),
        text="dog",
        text_kwargs={"padding": "max_length", "max_length": 27},
        images_kwargs={"size": {"height": 32, "width": 32}},
    )
    assert inputs.input_ids.shape == (1, 27)
    assert inputs.pixel_values.shape == (1, 3, 32, 32)


def test_return_tensors(processor):
    inputs = processor(images=blank(64, 32), text="dog", boxes=[0, 0, 9, 9], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in inputs.values())
    assert inputs["labels"].dtype == np.float32
    lists = processor(text=["dog", "red dog"], padding=False, return_tensors=None)
    assert lists["input_ids"] == [[2, 7, 3], [2, 6, 7, 3]]


def test_decode(processor):
    inputs = processor(text=["the red dog", "tree"])
    assert processor.batch_decode(inputs.input_ids, skip_special_tokens=True) == ["the red dog", "tree"]
    assert processor.decode(inputs.input_ids[0], skip_special_tokens=True) == "the red dog"


# Truncation


def test_long_expressions_are_cut_with_a_warning(warnings_of_processor):
    processor = make_processor(max_text_length=5)
    inputs = processor(text=["the red dog left of the tree", "the red dog", "dog"])
    assert inputs.input_ids.tolist()[0] == [2, 5, 6, 7, 3]
    assert warnings_of_processor.messages == [
        "Expressions are cut to 5 tokens, but the longest one has 9. To keep all of it, raise `max_text_length` of "
        "the processor and of the model."
    ]


@pytest.mark.parametrize("options", [{}, {"padding": "max_length"}, {"max_length": 5}, {"truncation": False}])
def test_no_warning_where_nothing_is_cut(warnings_of_processor, options):
    processor = make_processor(max_text_length=5)
    processor(text=["the red dog", "dog"], **options)
    assert warnings_of_processor.messages == []


def test_max_length_that_the_tokenizer_remembers_does_not_count(processor, tmp_path):
    processor.tokenizer("dog", max_length=4, truncation=True)
    processor.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.init_kwargs["max_length"] == 4
    fresh = EpmVGProcessor(processor.image_processor, tokenizer)
    assert fresh(text="the red dog").input_ids.shape == (1, 5)


def test_lower_case_is_a_setting(tmp_path):
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, do_lower_case=False)
    image_processor = EpmVGImageProcessor(size=64)
    as_written = EpmVGProcessor(image_processor, tokenizer)
    lowered = EpmVGProcessor(image_processor, tokenizer, do_lower_case=True)
    assert as_written(text="The RED dog").input_ids.tolist() == [[2, 1, 1, 7, 3]]
    assert lowered(text="The RED dog").input_ids.tolist() == [[2, 5, 6, 7, 3]]
    lowered.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["do_lower_case"] is True


# Round trip


@pytest.mark.parametrize("backend", BACKENDS)
def test_transvg_cases(backend):
    path = SHARED / "transvg" / "transform_cases.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    for case in json.loads(path.read_text()):
        processor = make_processor(backend, size=640)
        inputs = processor(images=transvg_image(case), text="dog", boxes=case["box_xyxy"])
        torch.testing.assert_close(inputs.labels[0], torch.tensor(case["label_cxcywh"]), atol=1e-6, rtol=0)
        y, x = torch.tensor(case["positions_yx"]).unbind(1)
        pixels = inputs.pixel_values[0][:, y, x].T
        torch.testing.assert_close(pixels, torch.tensor(case["pixels"]), atol=ONE_LEVEL, rtol=0)
        (found,) = processor.post_process_grounding(ModelOutput(pred_boxes=inputs.labels), inputs)
        torch.testing.assert_close(found["box"], torch.tensor(case["box_xyxy"]).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size, pad_offset", [(64, 0.0), (128, 0.5), (97, 0.31), (640, 0.5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trip(backend, size, pad_offset):
    processor = make_processor(backend, size=size, pad_offset=pad_offset)
    images = [blank(*shape) for shape in [(640, 427), (375, 500), (5, 3), (2000, 30)]]
    text = [["dog", "red dog", "tree"], ["the dog"], ["tree"], ["left", "tree"]]
    boxes = [
        [[0, 0, 640, 427], [10.5, 20.25, 100, 50], [600, 400, 639.5, 427]],
        [[100, 200, 375, 500]],
        [[1, 0.5, 2.5, 3]],
        [[0, 0, 30, 30], [1990, 3, 2000, 29]],
    ]
    inputs = processor(images=images, text=text, boxes=boxes)
    outputs = ModelOutput(pred_boxes=inputs.labels)
    expected = torch.tensor([box for group in boxes for box in group])
    target_sizes = [(images[index].height, images[index].width) for index in inputs.image_index]
    for found in (
        processor.post_process_grounding(outputs, inputs),
        processor.post_process_grounding(outputs, target_sizes=target_sizes),
        processor.post_process_grounding(outputs, target_sizes=torch.tensor(target_sizes)),
    ):
        assert all(item["score"] is None and item["box"].shape == (4,) for item in found)
        assert (torch.stack([item["box"] for item in found]) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 128},
        {"pad_offset": 0.0},
        {"pad_offset": 1.0, "size": 97},
        {"placements": [(32, 0.75, 0.25), (61, 0.1, 0.9)]},
        {"do_resize": False},
    ],
)
@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trip_with_settings_of_one_call(backend, return_tensors, settings):
    processor = make_processor(backend)
    images, text = [blank(40, 20), blank(33, 50)], [["dog", "red dog"], ["tree"]]
    boxes = [[[0, 0, 40, 20], [3.5, 1.25, 39, 11]], [[1, 2, 33, 47.5]]]
    inputs = processor(images=images, text=text, boxes=boxes, return_tensors=return_tensors, padding=True, **settings)
    outputs = ModelOutput(pred_boxes=torch.as_tensor(inputs["labels"]))
    for item, box in zip(processor.post_process_grounding(outputs, inputs), [*boxes[0], *boxes[1]], strict=True):
        torch.testing.assert_close(item["box"], torch.tensor(box).float(), atol=1e-3, rtol=0)


def test_round_trip_of_inputs_in_half_precision(processor):
    """`letterbox` holds whole numbers, so a change of dtype cannot round them as it rounds pixels."""
    inputs = processor(images=blank(641, 427), text="dog", boxes=[1, 2, 641, 427], size=1283, pad_offset=0.3)
    outputs = ModelOutput(pred_boxes=inputs.pop("labels"))
    (found,) = processor.post_process_grounding(outputs, inputs.to(torch.bfloat16))
    torch.testing.assert_close(found["box"], torch.tensor([1.0, 2, 641, 427]), atol=1e-3, rtol=0)


def test_target_sizes_go_by_the_settings_of_the_processor(processor):
    inputs = processor(images=blank(40, 20), text="dog", boxes=[4, 2, 40, 20])
    outputs = ModelOutput(pred_boxes=inputs.labels)
    (found,) = processor.post_process_grounding(outputs, target_sizes=[(20, 40)])
    torch.testing.assert_close(found["box"], torch.tensor([4.0, 2, 40, 20]))


def test_post_process_of_one_expression_per_image(processor):
    inputs = processor(images=[blank(64, 32), blank(32, 64)], text=["dog", "tree"], boxes=[[0, 0, 9, 9]] * 2)
    outputs = ModelOutput(pred_boxes=inputs.pop("labels").to(torch.float64))
    inputs.pop("image_index")
    for item in processor.post_process_grounding(outputs, inputs):
        torch.testing.assert_close(item["box"], torch.tensor([0.0, 0, 9, 9]))


def test_post_process_clips_to_the_image(processor):
    outputs = ModelOutput(pred_boxes=torch.tensor([[0.5, 0.5, 1.2, 1.2]]))
    (found,) = processor.post_process_grounding(outputs, target_sizes=[(100, 300)])
    assert found["box"].tolist() == [0, 0, 300, 100]


def test_labels_follow_placements_and_settings_of_the_call(processor):
    def label(**kwargs):
        return processor(images=blank(40, 20), text="dog", boxes=[0, 0, 40, 20], **kwargs).labels[0].tolist()

    assert label() == [0.5, 0.5, 1, 0.5]
    assert label(pad_offset=0.0) == [0.5, 0.25, 1, 0.5]
    assert label(do_resize=False) == [0.5, 0.5, 40 / 64, 20 / 64]
    assert label(size=128) == [0.5, 0.5, 1, 0.5]
    # 32 x 16 on 64 x 64: 48 rows are free, 36 of them above; 32 columns, 8 of them left
    for make in (list, np.array, torch.tensor, lambda rows: [list(row) for row in rows], tuple):
        assert label(placements=make([(32, 0.75, 0.25)])) == [(8 + 16) / 64, (36 + 8) / 64, 32 / 64, 16 / 64]
    with pytest.raises(ValueError, match=r"three numbers for each image, .* are of shape \(1, 2\)"):
        label(placements=np.zeros((1, 2)))


def test_labels_are_not_clipped(processor):
    labels = processor(images=blank(64, 64), text="dog", boxes=[-0.5, 0, 64.75, 64]).labels
    torch.testing.assert_close(labels, torch.tensor([[32.125 / 64, 0.5, 65.25 / 64, 1]]))


# Errors


@pytest.mark.parametrize(
    "text, boxes, message",
    [
        ("  ", None, "`text` is '  ', expected an expression with words"),
        (["dog", ""], None, r"`text\[1\]` is ''"),
        ([["dog"], ["red", "\n"]], None, r"`text\[1\]\[1\]` is"),
        ([["dog"], [3]], None, r"`text\[1\]\[0\]` is 3"),
        ([["dog"], "red"], None, "must be a string, a list of strings, or a list of lists of strings"),
        (3, None, "must be a string"),
        ([], None, "`text` holds no expression"),
        ([[], []], None, "`text` holds no expression"),
        ("dog", None, r"`text` must match `images`, but it is for 1 image\(s\) and there are 2"),
        (["dog"] * 3, None, r"it is for 3 image\(s\) and there are 2"),
        ([["dog"]], None, r"it is for 1 image\(s\) and there are 2"),
        (["dog", "red"], [[0, 0, 9, 9]], "`boxes` has 1 items and `text` has 2"),
        (["dog", "red"], 3, "`boxes` has no items and `text` has 2"),
        ([["dog"], ["red"]], [[[0, 0, 9, 9]], []], r"`boxes\[1\]` has 0 items and `text\[1\]` has 1"),
        ("a \ud800 dog", None, r"`text` = .* has half of a surrogate pair"),
        (["dog", "\0\u200b"], None, r"the expression .* has no token: the tokenizer removes all of its characters"),
        (["dog", "red"], [[0, 0, 9, 9], [0, 0, 9]], r"`boxes\[1\]` must be four numbers .* but it is \[0, 0, 9\]"),
        (["dog", "red"], [["0", "0", "9", "9"], None], r"`boxes\[0\]` must be four numbers .* but it is \['0', "),
        (["dog", "red"], [None, [True, False, True, True]], r"`boxes\[1\]` must be four numbers .* but it is \[True"),
        (["dog", "red"], [None, [0, 0, 10**400, 9]], r"`boxes\[1\]` must be four numbers"),
        (["dog", "red"], [None, {}], r"`boxes\[1\]` must be four numbers .* but it is {}"),
        (["dog", "red"], [[0, 0, 9, float("nan")], [0, 0, 9, 9]], r"`boxes\[0\]` .* is not finite"),
        ([["dog"], ["red"]], [[None], [[0, 0, float("inf"), 9]]], r"`boxes\[1\]\[0\]` .* is not finite"),
        (["dog", "red"], [[0, 0, 9, 9], [9, 0, 3, 9]], r"`boxes\[1\]` = \[9.0, 0.0, 3.0, 9.0\] is empty or inverted"),
        ([["dog"], ["red"]], [[[0, 0, 9, 9]], [[4, 4, 9, 4]]], r"`boxes\[1\]\[0\]` .* is empty or inverted"),
        (["dog", "red"], [[0, 0, 9, 9], [50, 0, 60, 9]], r"`boxes\[1\]` .* wholly outside .* 20 x 40 pixels"),
        (["dog", "red"], [[0, 0, 9, 9], [-0.9, 0, -0.1, 9]], r"`boxes\[1\]` .* wholly outside"),
        (["dog", "red"], [[0, 0, 9, 9], [30, 0, 41.1, 9]], r"`boxes\[1\]` .* beyond its image by more than 1 pixel"),
        (["dog", "red"], [[0, -1.5, 9, 9], [0, 0, 9, 9]], r"`boxes\[0\]` .* beyond its image by more than 1 pixel"),
    ],
)
def test_errors(processor, text, boxes, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[blank(64, 32), blank(40, 20)], text=text, boxes=boxes)


def test_errors_of_missing_parts(processor):
    with pytest.raises(ValueError, match="Expected `images`, `text` or both, got neither"):
        processor()
    with pytest.raises(ValueError, match="`boxes` need the `images`"):
        processor(text="dog", boxes=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="`boxes` need the `images`"):
        processor(images=blank(9, 9), boxes=[0, 0, 1, 1])


def test_errors_of_post_processing(processor):
    outputs = ModelOutput(pred_boxes=torch.rand(3, 4))
    inputs = processor(images=blank(9, 9), text=["dog", "red"])
    with pytest.raises(ValueError, match="exactly one of `inputs` and `target_sizes`"):
        processor.post_process_grounding(outputs)
    with pytest.raises(ValueError, match="exactly one of `inputs` and `target_sizes`"):
        processor.post_process_grounding(outputs, inputs, target_sizes=[(9, 9)] * 3)
    with pytest.raises(ValueError, match="3 boxes were predicted, but `inputs` has 2 expressions"):
        processor.post_process_grounding(outputs, inputs)
    with pytest.raises(ValueError, match=r"`target_sizes` must be .* each of the 3 predicted boxes, .* \(1, 2\)"):
        processor.post_process_grounding(outputs, target_sizes=[(9, 9)])
    for name in ("letterbox", "original_sizes"):
        without = {key: value for key, value in inputs.items() if key != name}
        with pytest.raises(
            ValueError, match=f"`inputs` has no `{name}`: pass what the processor returned.*target_siz"
        ):
            processor.post_process_grounding(outputs, without)
    inputs = processor(images=blank(9, 9), text=["dog", "red", "tree"])
    with_maps = ModelOutput(**outputs, consistency_map=torch.rand(3, 64), visual_mask=torch.ones(1, 8, 8))
    found = processor.post_process_grounding(with_maps, inputs, return_maps=True)
    assert [item["map"].shape for item in found] == [(8, 8)] * 3
    for arguments in ((outputs, inputs), (with_maps, None, [(9, 9)] * 3)):
        with pytest.raises(ValueError, match="`return_maps` needs `inputs`, and `outputs` with `consistency_map`"):
            processor.post_process_grounding(*arguments, return_maps=True)


# Saving


class DummyConfig(PreTrainedConfig):
    model_type = "epmvg_processor_test"


@pytest.fixture
def registered():
    """`from_pretrained` looks the image processor up among the auto classes."""
    classes = {"torchvision": EpmVGImageProcessor, "pil": EpmVGImageProcessorPil}
    AutoImageProcessor.register(DummyConfig, image_processor_classes=classes, exist_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_save_and_load(registered, backend, tmp_path):
    processor = make_processor(backend, max_text_length=11, pad_offset=0.0)
    arguments = {"images": blank(64, 32), "text": ["dog", "the red dog"], "boxes": [[0, 0, 9, 9]] * 2}
    expected = processor(**arguments, padding="max_length")  # used before saving: the tokenizer remembers this
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["max_text_length"] == 11
    assert saved["image_processor"]["pad_offset"] == 0.0

    loaded = EpmVGProcessor.from_pretrained(tmp_path, backend="torchvision" if backend is BACKENDS[0] else "pil")
    assert isinstance(loaded.image_processor, backend)
    assert loaded.max_text_length == 11 and not loaded.do_lower_case
    assert loaded.to_dict() == processor.to_dict()
    inputs = loaded(**arguments, padding="max_length")
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert loaded(**arguments).input_ids.shape == (2, 5)


@pytest.mark.parametrize("no_box", [None, [float("nan")] * 4])
def test_an_expression_may_have_no_box(processor, no_box):
    image = Image.new("RGB", (40, 30))
    inputs = processor(
        images=[image, image], text=[["dog", "red"], ["man"]], boxes=[[[1, 2, 30, 20], no_box], [no_box]]
    )
    assert inputs["labels"].isnan().all(-1).tolist() == [False, True, True]
    whole = processor(images=image, text=["dog"], boxes=[[1, 2, 30, 20]])
    assert torch.equal(inputs["labels"][0], whole["labels"][0])


def test_rows_of_nan_in_an_array_have_no_box(processor):
    boxes = np.array([[1, 2, 30, 20], [np.nan] * 4], np.float32)
    labels = processor(images=blank(40, 30), text=["dog", "red"], boxes=boxes)["labels"]
    assert labels.isnan().all(-1).tolist() == [False, True]
    nested = processor(images=[blank(40, 30)], text=[["dog", "red"]], boxes=[torch.from_numpy(boxes)])["labels"]
    torch.testing.assert_close(nested, labels, equal_nan=True, atol=0, rtol=0)
