import base64
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import pipeline

from epmvg_hf import (
    EpmVGForVisualGrounding,
    EpmVGImageProcessorPil,
    EpmVGModel,
    EpmVGProcessor,
    VisualGroundingPipeline,
)
from tests.fixtures.models import tiny_config, tiny_model

RED, GREEN = "the red circle", "the small green star on the left"  # of different lengths
SIZES = [(100, 50), (64, 64), (31, 90)]


@pytest.fixture
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), np.uint8)) for size in SIZES]


@pytest.fixture
def grounder(processor) -> VisualGroundingPipeline:
    return pipeline("visual-grounding", model=tiny_model(box_head="map"), processor=processor, device="cpu")


@pytest.fixture
def folder(tmp_path, processor) -> Path:
    tiny_model(box_head="map").save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def directly(grounder, image, expressions) -> list[list[float]]:
    """Boxes from the processor and the model, without the pipeline."""
    inputs = grounder.processor(images=image, text=expressions, return_tensors="pt")
    with torch.no_grad():
        outputs = grounder.model(**inputs)
    return [result["box"].tolist() for result in grounder.processor.post_process_grounding(outputs, inputs)]


def check(results, expected, expressions, tolerance=1e-5, keys=()):
    """`tolerance` is in parts of the picture; boxes are in pixels of at most 100. `keys` come after the usual ones."""
    assert [result["text"] for result in results] == expressions
    for result, box in zip(results, expected, strict=True):
        assert list(result) == ["score", "box", "text", *keys] and result["score"] is None
        assert list(result["box"]) == ["xmin", "ymin", "xmax", "ymax"]
        assert all(type(value) is float for value in result["box"].values())
        assert list(result["box"].values()) == pytest.approx(box, abs=100 * tolerance)


# One image


def test_results_are_nested_like_the_text(grounder, images):
    expected = directly(grounder, images[0], [RED, GREEN])
    assert not np.allclose(*expected, atol=1e-3)  # else nothing below could tell them apart
    check([grounder(images[0], RED)], expected[:1], [RED])
    check(grounder(images[0], [RED]), expected[:1], [RED])
    check(grounder(images[0], [RED, GREEN]), expected, [RED, GREEN])
    check(grounder(images[0], (RED, GREEN)), expected, [RED, GREEN])
    check(grounder({"image": images[0], "text": [RED, GREEN], "image_id": 7}), expected, [RED, GREEN])
    check([grounder(image=images[0], text=RED)], expected[:1], [RED])


def test_an_image_from_anywhere(grounder, images, tmp_path, monkeypatch):
    images[0].save(tmp_path / "scene.png")
    data = (tmp_path / "scene.png").read_bytes()
    asked = []

    def get(url, timeout, follow_redirects):
        asked.append((url, timeout))
        return SimpleNamespace(content=data)

    monkeypatch.setattr("transformers.image_utils.httpx.get", get)
    expected = directly(grounder, images[0], [RED])
    sources = [
        str(tmp_path / "scene.png"),
        tmp_path / "scene.png",
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "https://example.org/scene.png",
    ]
    check([grounder(source, RED, timeout=5.0) for source in sources], expected * 4, [RED] * 4)
    assert asked == [("https://example.org/scene.png", 5.0)]

    grounder = pipeline("visual-grounding", model=grounder.model, processor=grounder.processor, timeout=3.0)
    grounder("https://example.org/scene.png", RED)
    assert asked[1:] == [("https://example.org/scene.png", 3.0)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_of_image(grounder, images, mode):
    image = images[0].convert(mode)
    check([grounder(image, RED)], directly(grounder, image.convert("RGB"), [RED]), [RED])


def seen(grounder, monkeypatch, image) -> np.ndarray:
    """The pixels of an image as the pipeline gives them to the processor."""
    given = []
    collate = grounder.collate
    monkeypatch.setattr(grounder, "collate", lambda rows: given.extend(rows) or collate(rows))
    grounder(image, RED)
    monkeypatch.undo()
    return np.asarray(given[0]["image"])


@pytest.mark.parametrize("as_path", [False, True])
def test_16_bits_and_transparency(grounder, tmp_path, monkeypatch, as_path):
    ramp = np.arange(0, 256, 2, np.uint8).reshape(8, 16)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "gray.png")
    icon = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (4, 2, 12, 6))
    icon.save(tmp_path / "icon.png")
    gray, on_white = (
        seen(grounder, monkeypatch, path if as_path else Image.open(path))
        for path in (tmp_path / "gray.png", tmp_path / "icon.png")
    )
    assert np.array_equal(gray, np.repeat(ramp[..., None], 3, axis=2))
    expected = np.full((8, 16, 3), 255)
    expected[2:6, 4:12] = 0
    assert np.array_equal(on_white, expected)


def test_values_without_a_known_meaning_are_one_sentence(grounder, tmp_path):
    depths = Image.fromarray(np.full((8, 16), 7000, np.float32))
    depths.save(tmp_path / "depths.tiff")
    for image, name in ((depths, ""), (tmp_path / "depths.tiff", " '/.*depths.tiff'")):
        with pytest.raises(ValueError, match=f"^`image`{name} has float32 values from 7000 to 7000, expected levels"):
            grounder(image, RED)


def test_boxes_are_of_the_upright_picture(grounder, images, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    images[0].save(tmp_path / "turned.png", exif=exif)
    upright = images[0].transpose(Image.Transpose.ROTATE_270)
    assert upright.size == (50, 100)
    check([grounder(tmp_path / "turned.png", RED)], directly(grounder, upright, [RED]), [RED])


# Many images


def test_a_list_of_images(grounder, images):
    both = [directly(grounder, image, [RED, GREEN]) for image in images]
    texts = [[RED], GREEN, [GREEN, RED]]

    first, second, third = grounder(images, texts)
    check(first, both[0][:1], [RED])
    check([second], both[1][1:], [GREEN])
    check(third, both[2][::-1], [GREEN, RED])

    check(grounder(images, RED), [boxes[0] for boxes in both], [RED] * 3)  # one for all
    rows = [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]
    assert grounder(rows) == grounder(tuple(rows)) == [first, second, third]
    assert grounder([images[0]], [[RED]]) == [first]
    assert grounder([], []) == grounder([]) == []


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_a_batch_equals_one_by_one(grounder, images, batch_size):
    texts = [[RED], GREEN, [GREEN, RED]]
    single = [grounder(image, text) for image, text in zip(images, texts, strict=True)]
    first, second, third = grounder(images, texts, batch_size=batch_size)
    for results, expected in ((first, single[0]), ([second], [single[1]]), (third, single[2])):
        boxes = [list(result["box"].values()) for result in expected]
        check(results, boxes, [result["text"] for result in expected])


def test_each_image_is_encoded_once(grounder, images):
    encoded = []
    grounder.model.model.vision_model.register_forward_pre_hook(lambda _, arguments: encoded.append(len(arguments[0])))
    grounder(images[0], [RED, GREEN] * 5)
    assert encoded == [1]
    encoded.clear()
    grounder(images, [[RED, GREEN], [GREEN], [RED] * 4])
    assert encoded == [1, 1, 1]
    encoded.clear()
    grounder(images, [[RED, GREEN], [GREEN], [RED] * 4], batch_size=2)
    assert encoded == [2, 1]
    encoded.clear()
    by_default = pipeline("visual-grounding", model=grounder.model, processor=grounder.processor, batch_size=3)
    by_default(images, RED)
    assert encoded == [3]


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generators_and_datasets_are_read_as_needed(grounder, images, batch_size):
    from datasets import Dataset as HubDataset

    rows = [{"image": image, "text": [RED, GREEN]} for image in images]
    expected = grounder(rows)
    read = []

    def generate():
        for row in rows:
            read.append(row)
            yield row

    results = iter(grounder(generate(), batch_size=batch_size))
    first = next(results)
    assert len(read) <= batch_size + 1  # Pipeline looks at the first
    found = {"generator": [first, *results]}
    found["torch"] = grounder(Rows(rows), batch_size=batch_size)
    found["datasets"] = list(grounder(HubDataset.from_list(rows), batch_size=batch_size))
    found["worker"] = list(grounder(Rows(rows), batch_size=batch_size, num_workers=1))
    assert len(found["torch"]) == 3 and len(list(found["torch"])) == len(list(found["torch"])) == 3

    boxes = [[list(result["box"].values()) for result in results] for results in expected]
    for results in found.values():
        for image_results, image_boxes in zip(results, boxes, strict=True):
            check(image_results, image_boxes, [RED, GREEN])


# Maps


def slow_map(grounder, image, expression) -> np.ndarray:
    """The map of an expression, cell by cell: where it lies on the canvas, and what its four neighbours there say."""
    inputs = grounder.processor(images=image, text=expression)
    with torch.no_grad():
        outputs = grounder.model(**inputs)
    mask = outputs.visual_mask[0].bool().numpy()
    weights = np.exp(outputs.consistency_map[0].numpy().reshape(mask.shape)) * mask
    weights /= weights.sum()
    side, top, left, canvas = inputs["letterbox"][0].tolist()
    sizes = [max(1, round(pixels * side / max(image.size))) for pixels in image.size[::-1]]
    rows, columns = (max(1, round(size * len(mask) / canvas)) for size in sizes)
    found = np.zeros((rows, columns))
    for row, column in np.ndindex(rows, columns):
        y = (top + (row + 0.5) / rows * sizes[0]) / canvas * len(mask) - 0.5
        x = (left + (column + 0.5) / columns * sizes[1]) / canvas * len(mask) - 0.5
        y = np.clip(y, np.flatnonzero(mask.any(1)).min(), np.flatnonzero(mask.any(1)).max())
        x = np.clip(x, np.flatnonzero(mask.any(0)).min(), np.flatnonzero(mask.any(0)).max())
        for cell in np.argwhere(mask):
            found[row, column] += weights[tuple(cell)] * max(0, 1 - abs(cell[0] - y)) * max(0, 1 - abs(cell[1] - x))
    return found / found.sum()


def test_maps_are_those_of_the_model(grounder, images):
    plain = grounder(images, [[RED, GREEN]] * 3)
    for batch_size in (1, 2):
        results = grounder(images, [[RED, GREEN]] * 3, return_maps=True, batch_size=batch_size)
        for image, of_image, without in zip(images, results, plain, strict=True):
            check(of_image, [list(result["box"].values()) for result in without], [RED, GREEN], keys=["map"])
            for result in of_image:
                expected = slow_map(grounder, image, result["text"])
                assert expected.max() > 1.01 * expected.min()
                np.testing.assert_allclose(result["map"], expected, rtol=1e-4)
                assert result["map"].dtype == np.float32 and result["map"].sum() == pytest.approx(1)
    assert [result[0]["map"].shape for result in results] == [(4, 8), (8, 8), (8, 3)]


@pytest.mark.parametrize("place", [(70, 20), (12, 44), (99, 1)])
def test_a_map_is_highest_where_the_model_points_to(grounder, images, monkeypatch, place):
    # The picture of 100 x 50 pixels has the rows 16 to 48 of a canvas of 64 x 64, and cells of 8 x 8 canvas pixels.
    x, y = place[0] * 0.64, place[1] * 0.64 + 16
    rows, columns = np.mgrid[4:64:8, 4:64:8]
    forward = grounder.model.forward

    def point(**inputs):
        outputs = forward(**inputs)
        outputs.consistency_map = torch.tensor(-((rows - y) ** 2) - (columns - x) ** 2).reshape(1, -1) / 20
        return outputs

    monkeypatch.setattr(grounder.model, "forward", point)
    found = grounder(images[0], RED, return_maps=True)["map"]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert (row, column) == (place[1] // 12.5, place[0] // 12.5)


def test_maps_are_of_the_upright_picture(grounder, images, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    images[0].save(tmp_path / "turned.png", exif=exif)
    result = grounder(tmp_path / "turned.png", RED, return_maps=True)
    upright = grounder(images[0].transpose(Image.Transpose.ROTATE_270), RED, return_maps=True)
    assert result["map"].shape == (8, 4) and np.array_equal(result["map"], upright["map"])


def test_maps_by_default(grounder, images):
    always = pipeline("visual-grounding", model=grounder.model, processor=grounder.processor, return_maps=True)
    rows = ({"image": image, "text": RED} for image in images)
    assert ["map" in result for result in always(rows, batch_size=2)] == [True] * 3
    assert "map" not in always(images[0], RED, return_maps=False) and "map" not in grounder(images[0], RED)


def test_maps_of_a_model_whose_box_does_not_come_from_one(processor, images):
    message = r'`return_maps` needs a model with config.box_head="map", but that of this one is "reg"\.'
    grounder = pipeline("visual-grounding", model=tiny_model(), processor=processor)
    with pytest.raises(ValueError, match=message):
        grounder(images[0], RED, return_maps=True)
    with pytest.raises(ValueError, match=message):
        pipeline("visual-grounding", model=tiny_model(), processor=processor, return_maps=True)
    assert "map" not in grounder(images[0], RED, return_maps=False)


# Models


@pytest.mark.parametrize("as_path", [False, True])
def test_a_saved_folder_by_its_name(grounder, folder, images, as_path):
    loaded = pipeline("visual-grounding", model=folder if as_path else str(folder), device="cpu")
    assert type(loaded) is VisualGroundingPipeline and type(loaded.model) is EpmVGForVisualGrounding
    assert type(loaded.processor) is EpmVGProcessor and loaded.device.type == "cpu"
    assert loaded(images[0], [RED, GREEN]) == grounder(images[0], [RED, GREEN])


def test_a_saved_pipeline_is_a_folder_of_model_and_processor(grounder, images, tmp_path):
    grounder.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "custom_pipelines" not in (tmp_path / "config.json").read_text()
    loaded = pipeline("visual-grounding", model=str(tmp_path))
    assert loaded.processor.max_text_length == 12
    assert loaded(images[0], RED) == grounder(images[0], RED)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype(grounder, folder, images, dtype):
    loaded = pipeline("visual-grounding", model=str(folder), dtype=dtype, device="cpu")
    assert loaded.dtype in (torch.bfloat16, torch.float16) and loaded.model.dtype == loaded.dtype
    check(loaded(images[0], [RED, GREEN]), directly(loaded, images[0], [RED, GREEN]), [RED, GREEN])
    boxes = [list(result["box"].values()) for result in grounder(images[0], [RED, GREEN])]
    check(loaded(images[0], [RED, GREEN]), boxes, [RED, GREEN], tolerance=0.02)


def test_the_pil_backend(grounder, folder, images):
    processor = EpmVGProcessor.from_pretrained(folder, backend="pil")
    assert isinstance(processor.image_processor, EpmVGImageProcessorPil)
    pil = pipeline("visual-grounding", model=str(folder), processor=processor)
    check(pil(images[0], [RED, GREEN]), directly(pil, images[0], [RED, GREEN]), [RED, GREEN])
    assert len(pil(images, RED, batch_size=2)) == 3


def test_a_model_just_trained_does_not_drop_out(images, processor):
    model = tiny_model(dropout=0.5).train()
    grounder = pipeline("visual-grounding", model=model, processor=processor)
    assert grounder(images[0], RED) == grounder(images[0], RED)


def test_a_compiled_model(grounder, images):
    compiled = torch.compile(grounder.model, backend="eager")
    around = pipeline("visual-grounding", model=compiled, processor=grounder.processor, device="cpu")
    assert around.model is compiled
    check(around(images[0], [RED, GREEN]), directly(grounder, images[0], [RED, GREEN]), [RED, GREEN])


def test_a_model_with_adapters(grounder, images):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(box_head="map"), peft.LoraConfig(target_modules=["query", "value"]))
    around = pipeline("visual-grounding", model=adapted, processor=grounder.processor, device="cpu")
    assert around.model is adapted
    # Adapters start as zero.
    check(around(images[0], [RED, GREEN]), directly(grounder, images[0], [RED, GREEN]), [RED, GREEN])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(grounder, folder, images):
    on_gpu = pipeline("visual-grounding", model=str(folder), device="cuda:0")
    assert on_gpu.model.device.type == "cuda"
    texts = [[RED], GREEN, [GREEN, RED]]
    expected = grounder(images, texts)
    results = on_gpu(images, texts, batch_size=2)
    for found, wanted in zip(results, expected, strict=True):
        found, wanted = (item if isinstance(item, list) else [item] for item in (found, wanted))
        boxes = [list(result["box"].values()) for result in wanted]
        check(found, boxes, [result["text"] for result in wanted], tolerance=2e-3)  # TF32 convolutions


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda image: (image,), "`text` is missing: expected what to look for in `image`, which is a value of type"),
        (lambda image: ("scene.png",), "`text` is missing"),
        (
            lambda image: ([image, image],),
            "Expected `text` beside `image`, or rows .*, but there is a value",
        ),
        (lambda image: ({"image": image, "expression": RED},), r"there is the keys \['expression', 'image'\]"),
        (lambda image: (image, ""), "`text` of an image is '', expected an expression with words"),
        (lambda image: (image, []), r"`text` of an image is \[\], expected"),
        (lambda image: (image, [RED, " "]), "expected an expression with words or a list of at least one"),
        (lambda image: (image, [[RED]]), "expected an expression with words or a list of at least one"),
        (lambda image: (image, 3), "`text` of an image is 3, expected"),
        (
            lambda image: ([image, image], [[RED]]),
            "For 2 images `text` must be .*, but there are 1; to look",
        ),
        (lambda image: ([image], {RED}), "but there are a value of type set"),
        (lambda image: ("no/such.png", RED), r"`image` is 'no/such.png', which cannot be read \(ValueError\)"),
        (lambda image: (Path("no/such.png"), RED), r"`image` is 'no/such.png', which cannot be read \(FileNotFound"),
        (lambda image: (np.zeros((4, 4, 3)), RED), "`image` is a value of type ndarray, which cannot be read"),
        (lambda image: ({"image": image, "text": RED}, RED), "`image` is a value of type dict, which cannot be read"),
    ],
)
def test_wrong_input_is_one_sentence(grounder, images, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        grounder(*arguments(images[0]))
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_a_page_that_is_no_image(grounder, monkeypatch):
    monkeypatch.setattr(
        "transformers.image_utils.httpx.get", lambda *_, **__: SimpleNamespace(content=b"<html>404</html>")
    )
    with pytest.raises(ValueError, match=r"`image` is 'http://a.org/b.png', which cannot be read \(Unidentified"):
        grounder("http://a.org/b.png", RED)


def test_an_unknown_argument(grounder, images):
    with pytest.raises(TypeError, match="top_k"):
        grounder(images[0], RED, top_k=5)


def test_a_model_or_processor_that_grounds_nothing(processor):
    with pytest.raises(ValueError, match=r"but the model is a EpmVGModel and the processor a EpmVGProcessor\."):
        pipeline("visual-grounding", model=EpmVGModel(tiny_config()), processor=processor)
    with pytest.raises(ValueError, match="the processor a NoneType"):
        VisualGroundingPipeline(model=tiny_model())
    with pytest.raises(ValueError, match="the processor a BertTokenizer"):
        VisualGroundingPipeline(model=tiny_model(), processor=processor.tokenizer)
    with pytest.raises(ValueError, match="but the model is a str and"):
        VisualGroundingPipeline(model="outputs/demo", processor=processor)


def test_detection_without_scores_says_what_to_use(processor, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    detector = pipeline("zero-shot-object-detection", model=str(tmp_path))
    with pytest.raises(ValueError, match=r'need a score .*use pipeline\("visual-grounding"\)'):
        detector(Image.new("RGB", (40, 30)), candidate_labels=["a dog", "a man"])


@pytest.fixture
def scoring(processor, tmp_path) -> str:
    """The folder of a model with a score head."""
    tiny_model(score_head=True).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def test_scores_and_threshold(scoring, images):
    grounder, image = pipeline("visual-grounding", model=scoring), images[0]
    results = grounder(image, ["a dog", "a man"])
    inputs = grounder.processor(images=image, text=["a dog", "a man"])
    with torch.no_grad():
        expected = grounder.model(**inputs).scores
    torch.testing.assert_close(torch.tensor([result["score"] for result in results]), expected)
    high, low = max(expected.tolist()), min(expected.tolist())
    between = (high + low) / 2
    for result, found in zip(results, grounder(image, ["a dog", "a man"], threshold=between), strict=True):
        assert found == (result if result["score"] >= between else {**result, "box": None})
    of_map = pipeline("visual-grounding", model=tiny_model(score_head=True, box_head="map"), processor=scoring)
    absent = of_map(image, "a dog", threshold=1.0, return_maps=True)
    assert absent["box"] is None and absent["map"].shape == (4, 8)  # what was not found has a map
    always_strict = pipeline("visual-grounding", model=scoring, threshold=1.0)
    assert [result["box"] for result in always_strict(image, ["a dog", "a man"])] == [None, None]


def test_threshold_needs_scores(grounder, images):
    with pytest.raises(ValueError, match="`threshold` needs scores, and this model has no score head"):
        grounder(images[0], "a dog", threshold=0.5)


def test_zero_shot_object_detection(scoring, images):
    """The pipeline of transformers gives the boxes of this package's own pipeline, cut to whole pixels."""
    labels, image = ["a dog", "a man", "a circle"], images[0]
    detector, grounder = (pipeline(task, model=scoring) for task in ("zero-shot-object-detection", "visual-grounding"))
    found = {result["label"]: result for result in detector(image, candidate_labels=labels, threshold=0.0)}
    assert list(found) == sorted(found, key=lambda label: -found[label]["score"]) and set(found) == set(labels)
    for result in grounder(image, labels):
        assert found[result["text"]]["score"] == pytest.approx(result["score"], abs=1e-5)
        for side, value in result["box"].items():
            assert found[result["text"]]["box"][side] == pytest.approx(value, abs=1.001)
    assert detector(image, candidate_labels=labels, threshold=1.0) == []
    assert len(detector(image, candidate_labels=labels, threshold=0.0, top_k=1)) == 1
