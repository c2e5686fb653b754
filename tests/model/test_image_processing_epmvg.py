import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tvf

from epmvg_hf.model.image_processing_epmvg import EpmVGImageProcessor
from epmvg_hf.model.image_processing_pil_epmvg import EpmVGImageProcessorPil
from epmvg_hf.model.rgb_images import as_rgb
from tests.fixtures.paths import SHARED
from tests.fixtures.transvg_images import ONE_LEVEL, transvg_image

BACKENDS = [EpmVGImageProcessor, EpmVGImageProcessorPil]
PLACEMENTS = [None, [(48, 0.25, 0.75)]]


def smooth_image(width, height, seed=0):
    """A random picture as smooth as a photo, on which the two resize methods agree better than on noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BICUBIC)


TOLERANCES = [(EpmVGImageProcessor, ONE_LEVEL), (EpmVGImageProcessorPil, 1e-5)]


@pytest.mark.parametrize("backend, tolerance", TOLERANCES)
def test_transvg_cases(backend, tolerance):
    path = SHARED / "transvg" / "transform_cases.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    for case in json.loads(path.read_text()):
        processor = backend()
        inputs = processor(transvg_image(case), return_tensors="pt")
        y, x = torch.tensor(case["positions_yx"]).unbind(1)
        pixels = inputs.pixel_values[0][:, y, x].T
        torch.testing.assert_close(pixels, torch.tensor(case["pixels"]), atol=tolerance, rtol=0)

        letterbox = processor.letterbox(inputs.original_sizes)
        top, left, height, width = next(letterbox.windows())
        assert [top, left, height, width] == [case[f"valid_{side}"] for side in ("top", "left", "height", "width")]
        mask = torch.zeros(640, 640, dtype=torch.int64)
        mask[top : top + height, left : left + width] = 1
        assert torch.equal(inputs.pixel_mask[0], mask)
        label = letterbox.to_labels(torch.tensor([case["box_xyxy"]], dtype=torch.float64))
        torch.testing.assert_close(label[0], torch.tensor(case["label_cxcywh"]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(50, 33), (501, 333), (97, 64), (64, 64), (130, 90), (3, 200), (201, 2), (13, 7)])
@pytest.mark.parametrize("backend, tolerance", TOLERANCES)
def test_any_shape_is_that_of_transvg(backend, tolerance, size):
    """Compares with TransVG's evaluation transform, made of the same torchvision functions on PIL images."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    width, height = (round(side * 64 / max(size)) for side in size)
    resized = tvf.to_tensor(tvf.resize(image, [height, width]))
    picture = tvf.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    top, left = round((64 - height) / 2.0 - 0.1), round((64 - width) / 2.0 - 0.1)
    expected = torch.zeros(3, 64, 64)
    expected[:, top : top + height, left : left + width] = picture

    inputs = backend(size=64)(image, return_tensors="pt")
    torch.testing.assert_close(inputs.pixel_values[0], expected, atol=tolerance, rtol=0)
    assert inputs.pixel_mask[0].sum() == inputs.pixel_mask[0, top : top + height, left : left + width].sum()
    assert inputs.pixel_mask[0].sum() == height * width


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs(backend):
    images = [smooth_image(*size) for size in [(64, 48), (48, 64), (5, 3), (200, 3)]]
    inputs = backend(size=64)(images, return_tensors="pt")
    assert set(inputs) == set(backend.model_input_names)
    assert inputs.pixel_values.shape == (4, 3, 64, 64)
    assert inputs.pixel_values.dtype == torch.float32
    assert inputs.pixel_mask.shape == (4, 64, 64)
    assert inputs.pixel_mask.dtype == torch.int64
    assert inputs.original_sizes.tolist() == [[48, 64], [64, 48], [3, 5], [3, 200]]
    assert inputs.letterbox.dtype == torch.int64
    assert inputs.letterbox.tolist() == [[64, 8, 0, 64], [64, 0, 8, 64], [64, 13, 0, 64], [64, 31, 0, 64]]
    assert inputs.pixel_mask.sum((1, 2)).tolist() == [64 * 48, 64 * 48, 64 * 38, 64]
    # padding is 0 after normalisation, the picture is not
    assert (inputs.pixel_values * (1 - inputs.pixel_mask[:, None])).abs().sum() == 0
    assert (inputs.pixel_values.abs().sum(1)[inputs.pixel_mask == 1] > 0).float().mean() > 0.99


@pytest.mark.parametrize("size", [128, 320])
def test_backends_agree(size):
    images = [smooth_image(*shape, seed) for seed, shape in enumerate([(500, 375), (333, 500), (60, 80), (5, 3)])]
    placements = [(size, 0.5, 0.5), (size // 2, 0.1, 0.9), (size - 7, 0.0, 1.0), (size // 3, 1.0, 0.0)]
    for chosen in (None, placements):
        a, b = (backend(size=size)(images, placements=chosen, return_tensors="pt") for backend in BACKENDS)
        assert torch.equal(a.pixel_mask, b.pixel_mask)
        assert torch.equal(a.original_sizes, b.original_sizes)
        assert torch.equal(a.letterbox, b.letterbox)
        difference = (a.pixel_values - b.pixel_values).abs()
        assert difference.max() < 0.1
        assert difference.mean() < 5e-3


@pytest.mark.parametrize("placements", PLACEMENTS)
@pytest.mark.parametrize("pad_offset", [0.0, 0.5])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (25, 25), (300, 40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_lie_where_labels_say(backend, size, pad_offset, placements):
    width, height = size
    box = [width // 5, height // 4, width - width // 3, height - height // 5]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    processor = backend(size=64, pad_offset=pad_offset, do_normalize=False)
    canvas = processor(Image.fromarray(pixels), placements=placements, return_tensors="pt").pixel_values[0].mean(0)

    rows, columns = (canvas > 0.5).nonzero().unbind(1)
    seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).double()
    letterbox = processor.letterbox([(height, width)], placements=placements)
    center, extent = (letterbox.to_labels(torch.tensor([box]).double())[0] * 64).split(2)
    label = torch.cat([center - extent / 2, center + extent / 2])
    assert (seen - label).abs().max() < 1.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_of_input(backend):
    image = smooth_image(40, 32)
    array = np.array(image)
    processor = backend(size=64)
    expected = processor(image, return_tensors="pt").pixel_values
    for same in (
        [image],
        array,
        array.transpose(2, 0, 1),
        array[None],
        torch.from_numpy(array),
        [torch.from_numpy(array).permute(2, 0, 1)],
    ):
        assert torch.equal(processor(same, return_tensors="pt").pixel_values, expected)
    assert processor(image, return_tensors="np").pixel_values.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "P", "CMYK"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_modes(backend, mode):
    image = smooth_image(40, 32).convert(mode)
    inputs = backend(size=64)(image, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 64, 64)
    # opaque everywhere: the same picture as its plain conversion
    assert torch.equal(inputs.pixel_values, backend(size=64)(image.convert("RGB"), return_tensors="pt").pixel_values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gray_array(backend):
    gray = smooth_image(40, 32).convert("L")
    processor = backend(size=64)
    inputs = processor(np.array(gray)[None], return_tensors="pt")
    assert torch.equal(inputs.pixel_values, processor(gray, return_tensors="pt").pixel_values)


RAMP = np.arange(0, 256, 2, np.uint8).reshape(8, 16)
COLOURS = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 40)], -1)  # channels last
SCALED = {
    "bool": (COLOURS > 127, np.where(COLOURS > 127, 255, 0)),
    "uint16": (COLOURS.astype(np.uint16) * 257, COLOURS),
    "uint16 of other machines": (COLOURS.astype(">u2") * 257, COLOURS),
    "int16": (COLOURS.astype(np.int16), COLOURS),
    "int32": (COLOURS.astype(np.int32), COLOURS),
    "int64": (COLOURS.astype(np.int64), COLOURS),
    "uint32": (COLOURS.astype(np.uint32), COLOURS),
    "fractions": (COLOURS.astype(np.float32) / 255, COLOURS),
    "fractions, float64": (COLOURS / 255, COLOURS),
    "fractions, float16": ((COLOURS / 255).astype(np.float16), COLOURS),
    "levels": (COLOURS.astype(np.float32), COLOURS),
    "levels, float16": (COLOURS.astype(np.float16), COLOURS),
    "backwards": (np.ascontiguousarray(COLOURS[..., ::-1])[..., ::-1], COLOURS),
    "channels first": (COLOURS.transpose(2, 0, 1) / 255, COLOURS),
    "a batch": (COLOURS[None].astype(np.uint16) * 257, COLOURS),
    "gray": (RAMP, RAMP[..., None]),
    "gray fractions": (RAMP / 255, RAMP[..., None]),
    "gray, channel last": (RAMP[..., None] / 255, RAMP[..., None]),
    "opaque": (np.dstack([COLOURS, np.full_like(RAMP, 255)]), COLOURS),
    "transparent": (np.dstack([COLOURS, np.zeros_like(RAMP)]).astype(np.float32), np.full_like(COLOURS, 255)),
    "opaque, uint16": (np.dstack([COLOURS, np.full_like(RAMP, 255)]).astype(np.uint16) * 257, COLOURS),
}
NO_TENSORS = ("uint16 of other machines", "backwards")


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("kind", "as_tensor"),
    [(kind, False) for kind in SCALED] + [(kind, True) for kind in SCALED if kind not in NO_TENSORS],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_scaled_by_what_their_type_means(backend, kind, as_tensor, as_bytes):
    array, levels = SCALED[kind]
    if as_tensor:
        array = torch.from_numpy(array)
    processor = backend(size=16)
    expected = processor(np.broadcast_to(levels, (8, 16, 3)).astype(np.uint8), return_tensors="pt")
    inputs = processor.from_bytes(processor(array, as_bytes=as_bytes, return_tensors="pt"))
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert inputs["original_sizes"].tolist() == [[8, 16]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (COLOURS / 127.5 - 1, r"has float64 values from -1 to 1, expected levels .* or fractions .*do_rescale=False"),
        (
            COLOURS * 257.0,
            "has float64 values from 0 to 65535, expected levels from 0 to 255 or fractions from 0 to 1",
        ),
        (np.where(COLOURS == 40, np.nan, COLOURS), r"has float64 values that are not numbers \(NaN\)"),
        (np.where(COLOURS == 40, np.inf, COLOURS), "has float64 values from 0 to inf, expected"),
        (COLOURS / 200, r"has float64 values from 0 to 1\.275, which may be fractions beyond 1 or levels"),
        (
            COLOURS.astype(np.int16) - 1,
            "has int16 values from -1 to 254, expected levels from 0 to 255 or the type uint16",
        ),
        (COLOURS.astype(np.int32) * 257, "has int32 values from 0 to 65535, expected"),
        (COLOURS.astype(np.int64) * 2, "has int64 values from 0 to 510, expected"),
        (COLOURS.astype(complex), "has values of the type torch.complex128, expected integers or floats"),
        (COLOURS.astype(str), "has values of the type <U3, expected integers or floats"),
        (COLOURS[..., :2], r"has the shape \(8, 16, 2\), expected \(height, width\), or that with 1, 3 or 4 channels"),
        (RAMP[0], r"has the shape \(16,\), expected"),
        (COLOURS[None, None], r"has the shape \(1, 1, 8, 16, 3\), expected"),
        (Image.fromarray(RAMP.astype(np.float32) - 1), "has float32 values from -1 to 253, expected"),
        (None, "is a value of type NoneType, expected a PIL image, an array, a tensor, or the path"),
        ({"bytes": b"", "path": None}, "is a value of type dict, expected a PIL image"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_image_is_one_sentence(backend, image, message):
    with pytest.raises(ValueError, match=f"^Image 1 {message}") as raised:
        backend(size=16)([COLOURS, image])
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize("options", [{"do_rescale": False}, {"rescale_factor": 1.0}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_the_user_has_scaled_stay(backend, dtype, options):
    processor = backend(size=16, do_normalize=False, **options)
    values = (COLOURS * (1 if dtype == np.uint8 else 3)).astype(dtype)
    values = values - dtype(300.5) if np.issubdtype(dtype, np.floating) else values
    expected = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)
    picture = processor(values, return_tensors="pt").pixel_values[0, :, 4:12]
    torch.testing.assert_close(picture, expected)
    smaller = processor(values, size=8, return_tensors="pt").pixel_values[0, :, 2:6]
    reference = torch.nn.functional.interpolate(expected[None], (4, 8), mode="bilinear", antialias=True)[0]
    # Bytes are rounded after each of the two directions, other numbers never.
    torch.testing.assert_close(smaller, reference, atol=1.01 if dtype == np.uint8 else 1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["I;16", "LA", "La", "RGBa", "F", "RGB with a key", "palette with alphas"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_that_pillow_converts_to_white_or_black(backend, kind):
    """[`as_rgb`] has tests of its own: here its image and the one that it is made of give the same."""
    image = Image.fromarray(np.dstack([COLOURS, RAMP]))
    image = {
        "I;16": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257),
        "LA": lambda: image.convert("LA"),
        "La": lambda: image.convert("LA").convert("La"),
        "RGBa": lambda: image.convert("RGBa"),
        "F": lambda: Image.fromarray(RAMP.astype(np.float32) / 255),
        "RGB with a key": lambda: image.convert("RGB"),
        "palette with alphas": lambda: image.quantize(16),
    }[kind]()
    if kind == "RGB with a key":
        image.info["transparency"] = (0, 255, 40)
    assert not np.array_equal(as_rgb(image), COLOURS)
    inputs, expected = (backend(size=64)(given, return_tensors="pt").pixel_values for given in (image, as_rgb(image)))
    assert torch.equal(inputs, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_conversion_to_rgb(backend):
    processor = backend(size=16, do_convert_rgb=False, do_normalize=False)
    gray = Image.fromarray(RAMP.astype(np.uint16) * 257)
    pixels = processor(gray, return_tensors="pt").pixel_values[0, :, 4:12]
    torch.testing.assert_close(pixels, torch.from_numpy(RAMP)[None] / 255)
    with pytest.raises(ValueError, match="Image 0 has a palette, so its pixels need do_convert_rgb=True"):
        processor(Image.fromarray(COLOURS).quantize(16))


@pytest.fixture
def turned(tmp_path):
    """The path of a photo of 40 x 32 pixels (width x height) that shall be displayed with a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    smooth_image(40, 32).save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path / "turned.jpg"


@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_not_applied(backend, turned, monkeypatch):
    processor = backend(size=64)
    with Image.open(turned) as image:
        expected = processor(image, return_tensors="pt")
    assert expected.original_sizes.tolist() == [[32, 40]]
    encoded = base64.b64encode(turned.read_bytes()).decode()
    page = SimpleNamespace(content=turned.read_bytes())
    monkeypatch.setattr("transformers.image_utils.httpx.get", lambda *_, **__: page)
    for source in (
        turned,
        str(turned),
        [turned],
        (str(turned),),
        [[turned]],
        encoded,
        "https://example.org/turned.jpg",
    ):
        inputs = processor(source, return_tensors="pt")
        assert torch.equal(inputs.pixel_values, expected.pixel_values)
        assert inputs.original_sizes.tolist() == [[32, 40]]
    assert processor([turned, str(turned), COLOURS], return_tensors="pt").original_sizes[:, 1].tolist() == [40, 40, 16]


def test_the_processor_takes_paths(processor, turned):
    text = ["the dog", "a red circle"]
    expected = processor(images=Image.open(turned), text=text)
    for source in (turned, str(turned)):  # one image, with both expressions
        inputs = processor(images=source, text=text)
        assert inputs["image_index"].tolist() == [0, 0]
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    inputs = processor(images=[turned, str(turned)], text=text, boxes=[[0, 0, 40, 32]] * 2)
    assert inputs["image_index"].tolist() == [0, 1]
    assert torch.equal(inputs["labels"][0], inputs["labels"][1])
    assert inputs["original_sizes"].tolist() == [[32, 40]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_cannot_be_read_is_one_sentence(backend, turned):
    turned.with_name("cut.jpg").write_bytes(turned.read_bytes()[:400])
    for name in ("none.jpg", "cut.jpg", "."):
        for source in (turned.parent / name, str(turned.parent / name)):
            with pytest.raises(
                ValueError, match=r"^`image` is '/.*', which cannot be read \(\w+\): expected"
            ) as raised:
                backend()([turned, source])
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("long_side", [1, 2, 63])
@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (4000, 3), (640, 480), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_of_a_single_pixel(backend, size, long_side, as_bytes):
    """torch fails an internal check on some of them, depending on how their bytes lie in memory."""
    width, height = size
    channels = np.full((3, height, width), 200, np.uint8)
    processor = backend(size=64, do_normalize=False)
    options = {"placements": [(long_side, 0.5, 0.5)], "as_bytes": as_bytes, "return_tensors": "pt"}
    for image in (Image.fromarray(channels.transpose(1, 2, 0).copy()), channels, channels.astype(np.float32)):
        first = {} if isinstance(image, Image.Image) else {"input_data_format": "channels_first"}
        inputs = processor.from_bytes(processor(image, **options, **first))
        assert inputs["pixel_mask"].sum() == long_side * max(1, round(min(size) * long_side / max(size)))
        assert (inputs["pixel_values"] * 255).round().unique().tolist() == [0, 200]


@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend):
    image = smooth_image(64, 48)
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    processor = backend(size=64)  # the picture keeps its size
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]

    def picture(**options):
        return processor(image, return_tensors="pt", **options).pixel_values[0, :, 8:56]

    assert torch.equal(picture(do_rescale=False, do_normalize=False), raw)
    torch.testing.assert_close(picture(do_normalize=False), raw / 255)
    torch.testing.assert_close(picture(do_normalize=False, rescale_factor=0.5), raw / 2)
    torch.testing.assert_close(picture(do_rescale=False), (raw - mean) / std)
    torch.testing.assert_close(picture(), (raw / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    plain = picture(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    torch.testing.assert_close(plain, raw / 127.5 - 1, atol=1e-5, rtol=1e-5)
    nearest = processor(image, resample=0, size=32, return_tensors="pt").pixel_values
    assert not torch.equal(nearest, processor(image, size=32, return_tensors="pt").pixel_values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_resize(backend):
    image = smooth_image(20, 10)
    processor = backend(size=32, do_resize=False, do_normalize=False, do_rescale=False)
    pixels = processor(image, return_tensors="pt").pixel_values[0, :, 11:21, 6:26]
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
    with pytest.raises(ValueError, match="fit the canvas of 16 x 16, but image 0 has 10 x 20"):
        processor(image, size=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_padding(backend):
    processor = backend(size=32, do_pad=False)
    assert processor(smooth_image(20, 20), return_tensors="pt").pixel_mask.all()
    with pytest.raises(ValueError, match="fill the canvas of 32 x 32, but that of image 1 has 16 x 32"):
        processor([smooth_image(20, 20), smooth_image(20, 10)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors(backend):
    image = smooth_image(20, 10)
    for size in ({"height": 32, "width": 64}, {"shortest_edge": 32}):
        with pytest.raises(ValueError, match="must be a square canvas"):
            backend(size=size)
        with pytest.raises(ValueError, match="must be a square canvas"):
            backend()(image, size=size)
    with pytest.raises(ValueError, match=r"`pad_offset` must be a share from 0 to 1, but it is 1\.5"):
        backend(pad_offset=1.5)
    with pytest.raises(ValueError, match="Image 1 has no pixels: its size is 5 x 0"):
        backend()([image, np.zeros((5, 0, 3), np.uint8)])
    with pytest.raises(ValueError, match="Image 0 has no pixels: its size is 0 x 7"):
        backend()(Image.new("RGB", (7, 0)))
    with pytest.raises(ValueError, match="`images` is empty"):
        backend()([])
    with pytest.raises(ValueError, match="one item for each image: got 2 for 1"):
        backend()(image, placements=[(8, 0.0, 0.0)] * 2)
    with pytest.raises(ValueError, match=r"differ in their numbers of channels: \[3, 4\]"):
        backend(do_convert_rgb=False)([image, image.convert("RGBA")])


@pytest.mark.parametrize("backend", BACKENDS)
def test_save_and_load(backend, tmp_path):
    processor = backend(size=96, pad_offset=0.0, image_mean=[0.5] * 3)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 96, "width": 96}
    assert saved["pad_offset"] == 0.0
    assert saved["image_processor_type"] == "EpmVGImageProcessor"
    assert "placements" not in saved
    loaded = backend.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert backend.from_pretrained(tmp_path, pad_offset=1).pad_offset == 1
