import base64
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from epmvg_hf.model.rgb_images import as_rgb, open_image, to_levels

RAMP = np.arange(0, 256, 2, np.uint8).reshape(8, 16)  # even levels from black to almost white
COLOURS = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 40)], -1)


def levels(image: Image.Image) -> np.ndarray:
    """The levels (height, width) of an RGB image that is grey."""
    pixels = np.asarray(as_rgb(image))
    assert pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def test_an_rgb_image_is_given_back_as_it_is():
    image = Image.fromarray(COLOURS)
    assert as_rgb(image) is image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP.astype(np.uint16) * 257),
        Image.frombytes("I;16B", (16, 8), (RAMP.astype(">u2") * 257).tobytes()),
        Image.fromarray(RAMP.astype(np.int32) * 257),
        Image.fromarray(RAMP.astype(np.int32)),
        Image.fromarray(RAMP.astype(np.float32)),
        Image.fromarray(RAMP.astype(np.float32) / 255),
        Image.fromarray(RAMP),
    ],
    ids=["I;16", "I;16B", "I of 16 bits", "I of 8 bits", "F levels", "F fractions", "L"],
)
def test_gray_images_are_scaled_by_what_their_type_means(image):
    np.testing.assert_array_equal(levels(image), RAMP)


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_gray_files_of_16_bits(tmp_path, kind):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"gray.{kind}")
    np.testing.assert_array_equal(levels(open_image(tmp_path / f"gray.{kind}")), RAMP)


def test_16_bits_are_rounded():
    values = np.array([[0, 128, 129, 65535 - 128, 65535 - 129, 65535]], np.uint16)
    assert levels(Image.fromarray(values)).tolist() == [[0, 0, 1, 255, 254, 255]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.float32) * 257, r"float32 values from 0 to 65278, expected levels from 0 to 255 or fractions"),
        (RAMP.astype(np.float32) - 1, r"float32 values from -1 to 253, expected"),
        (np.where(RAMP == 0, np.nan, RAMP).astype(np.float32), r"float32 values that are not numbers \(NaN\)"),
        (
            RAMP.astype(np.float32) / 200,
            r"float32 values from 0 to 1\.27, which may be fractions beyond 1 or levels of an almost",
        ),
        (RAMP.astype(np.int32) * 259, r"int32 values from 0 to 65786, expected levels from 0 to 255"),
        (RAMP.astype(np.int32) - 1, r"int32 values from -1 to 253, expected levels"),
    ],
)
def test_what_cannot_be_known_is_one_sentence(values, message):
    with pytest.raises(ValueError, match=f"^Picture 7 has {message}") as raised:
        as_rgb(Image.fromarray(values), "Picture 7")
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def black_icon() -> Image.Image:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6, 3] = 255
    return Image.fromarray(pixels)


def with_key(image: Image.Image, key: object) -> Image.Image:
    image.info["transparency"] = key
    return image


def paletted(key: object) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0] * 768)
    image.paste(0, (2, 2, 6, 6))
    return with_key(image, key)


def with_alpha_beside_palette() -> Image.Image:
    image = Image.new("PA", (8, 8))
    image.putpalette([0] * 768)
    image.putalpha(black_icon().getchannel("A"))
    return image


def keyed(mode: str, ground: object) -> Image.Image:
    image = Image.new(mode, (8, 8), ground)
    image.paste(Image.new(mode, (4, 4), 0), (2, 2))
    return with_key(image, ground)


@pytest.mark.parametrize(
    "image",
    [
        black_icon(),
        black_icon().convert("RGBa"),
        black_icon().convert("LA"),
        black_icon().convert("LA").convert("La"),
        black_icon().quantize(),
        with_alpha_beside_palette(),
        paletted(1),
        paletted(b"\xff\0" + b"\xff" * 254),
        keyed("L", 7),
        keyed("RGB", (7, 7, 7)),
        keyed("I;16", 700),
        keyed("I", 700),
        keyed("1", 255),
    ],
    ids=[
        "RGBA",
        "RGBa",
        "LA",
        "La",
        "alphas in the palette",
        "PA",
        "P key",
        "P alphas",
        "L key",
        "RGB key",
        "I;16 key",
        "I key",
        "1 key",
    ],
)
def test_a_black_icon_on_transparent_ground_is_black_on_white(image):
    expected = np.full((8, 8), 255)
    expected[2:6, 2:6] = 0
    np.testing.assert_array_equal(levels(image), expected)
    assert "transparency" not in as_rgb(image).info  # else what is drawn later in that colour would vanish


def test_half_transparent_is_blended():
    pixels = np.dstack([COLOURS, np.full_like(RAMP, 64)])
    expected = (COLOURS * 64.0 + 255 * (255 - 64)) / 255
    assert np.abs(np.asarray(as_rgb(Image.fromarray(pixels))) - expected).max() <= 0.5


@pytest.mark.parametrize(("mode", "tolerance"), [("CMYK", 0), ("RGBX", 0), ("YCbCr", 3), ("HSV", 6)])
def test_colour_spaces(mode, tolerance):
    converted = np.asarray(as_rgb(Image.fromarray(COLOURS).convert(mode))).astype(int)
    assert np.abs(converted - COLOURS).max() <= tolerance


def test_lab():
    cms = pytest.importorskip("PIL.ImageCms")
    profiles = cms.createProfile("sRGB"), cms.createProfile("LAB")
    lab = cms.profileToProfile(Image.fromarray(COLOURS), *profiles, outputMode="LAB")
    assert np.abs(np.asarray(as_rgb(lab)).astype(int) - COLOURS).mean() < 3


def test_two_colours():
    image = Image.fromarray(RAMP > 127)
    assert image.mode == "1"
    np.testing.assert_array_equal(levels(image), np.where(RAMP > 127, 255, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fractions_and_levels_of_every_precision(dtype):
    values = torch.from_numpy(RAMP)
    assert torch.equal(to_levels(values.to(dtype)), values)
    coarse = 2 if dtype == torch.bfloat16 else 0
    assert (to_levels(values.to(dtype) / 255).int() - values.int()).abs().max() <= coarse


def test_what_rounding_leaves_is_no_fault():
    assert to_levels(torch.tensor([-1e-6, 0.5, 1 + 1e-6])).tolist() == [0, 128, 255]


# Where images are read from


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_image_from_text(tmp_path):
    image = Image.fromarray(COLOURS)
    encoded = base64.b64encode(png(image)).decode()
    (tmp_path / "scene.png").write_bytes(png(image))
    lines = base64.encodebytes(png(image)).decode()
    for source in (
        encoded,
        lines,
        f"data:image/png;base64,{encoded}",
        tmp_path / "scene.png",
        str(tmp_path / "scene.png"),
    ):
        assert np.array_equal(open_image(source), COLOURS)


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes(png(Image.effect_noise((50, 50), 80))[:300])
    sources = [tmp_path / "none.png", str(tmp_path / "none.png"), tmp_path, str(tmp_path), "", "a" * 9999, "a\0b"]
    for source in (*sources, tmp_path / "text.jpg", tmp_path / "cut.png", 3, None):
        with pytest.raises(ValueError, match=r"^`image` is .*, which cannot be read \(\w+\): expected") as raised:
            open_image(source)
        assert "\n" not in str(raised.value) and str(raised.value).endswith(".") and len(str(raised.value)) < 400


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    (tmp_path / "bomb.png").write_bytes(png(Image.fromarray(COLOURS)))
    with pytest.raises(ValueError, match=r"bomb.png'.* cannot be read \(DecompressionBombError\)"):
        open_image(tmp_path / "bomb.png")


def test_an_image_of_floats(tmp_path):
    (tmp_path / "map.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0, 1))
    assert levels(open_image(tmp_path / "map.pfm")).tolist() == [[0, 255]]
