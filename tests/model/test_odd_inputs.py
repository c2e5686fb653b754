"""Whatever a user gives: a box within the picture, or an error that says what is wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from epmvg_hf import EpmVGConfig, EpmVGProcessor, VisualGroundingPipeline
from tests.fixtures.models import tiny_config, tiny_model, tiny_processor
from tests.fixtures.mutations import VALUES

MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F", "HSV"]
DTYPES = ["uint8", "uint16", "int16", "int64", "float16", "float32", "float64", "bool", "complex64"]
TEXTS = st.text(st.characters(codec=None), max_size=30) | st.sampled_from(["left dog", "\ud800", "\0", "a" * 5_000])


@st.composite
def pictures(draw) -> Image.Image:
    width, height = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    mode = draw(st.sampled_from(MODES))
    has_one_band = len(Image.new(mode, (1, 1)).getbands()) == 1
    return Image.new(mode, (width, height), draw(st.integers(0, 255)) if has_one_band else None)


@st.composite
def arrays(draw) -> np.ndarray:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 17, 40]), max_size=4))
    value = draw(st.sampled_from([0, 1, 0.5, 255, 256, -1, 70_000, float("nan"), float("inf")]))
    with np.errstate(all="ignore"):
        return np.full(shape, value, "float64").astype(draw(st.sampled_from(DTYPES)))


@pytest.fixture(scope="module")
def pipeline() -> VisualGroundingPipeline:
    return VisualGroundingPipeline(tiny_model(box_head="map", score_head=True), processor=tiny_processor())


@given(image=pictures() | arrays() | VALUES, text=TEXTS | VALUES)
def test_pipeline(pipeline, image, text):
    try:
        outputs = pipeline(image, text=text)
    except (ValueError, OSError) as error:  # OSError: a path or an address that leads nowhere
        assert str(error)
        return
    size = image.size if isinstance(image, Image.Image) else None
    for output in outputs if isinstance(outputs, list) else [outputs]:
        x0, y0, x1, y1 = (output["box"][name] for name in ("xmin", "ymin", "xmax", "ymax"))
        assert 0 <= x0 <= x1 and 0 <= y0 <= y1 and np.isfinite([x1, y1, output["score"]]).all()
        assert size is None or (x1 <= size[0] and y1 <= size[1])


@pytest.fixture(scope="module")
def shared_processor() -> EpmVGProcessor:
    return tiny_processor()


NUMBERS = st.floats() | st.integers(-5, 70) | st.sampled_from([10**400, None, "3", True, 1j])
BOXES = st.lists(NUMBERS, max_size=5) | st.none() | st.lists(st.integers(0, 60), min_size=4, max_size=4)


@given(image=pictures(), boxes=BOXES | st.lists(BOXES, max_size=3) | VALUES)
def test_boxes_become_labels_on_the_canvas(shared_processor, image, boxes):
    nested = isinstance(boxes, list) and boxes and isinstance(boxes[0], list)
    try:
        inputs = shared_processor(images=image, text=["dog"] * len(boxes) if nested else "dog", boxes=boxes)
    except ValueError as error:
        assert str(error)
        return
    if boxes is None:
        return
    for box, label in zip(boxes if nested else [boxes], inputs["labels"], strict=True):
        if box is None or np.isnan(box).all():
            assert label.isnan().all()
        else:
            # A box may stick out by a pixel of the image, which a tiny image enlarges to much of the canvas.
            beyond = 2 / max(image.size)
            assert (label >= -beyond).all() and (label <= 1 + beyond).all() and (label[2:] > 0).all()


# What transformers does with its own fields is left to it.
OWN_FIELDS = sorted(name for name in EpmVGConfig.__annotations__ if name in tiny_config().to_dict())


@given(name=st.sampled_from(OWN_FIELDS), value=VALUES)
def test_configurations(tmp_path_factory, name, value):
    folder = tmp_path_factory.mktemp("config")
    try:
        config = EpmVGConfig.from_dict({**tiny_config().to_dict(), name: value})
        config.save_pretrained(folder)
    except Exception as error:  # huggingface_hub's checks of types are no ValueErrors
        assert isinstance(error, ValueError) or "validation error" in str(error).lower(), repr(error)
        return
    EpmVGConfig.from_pretrained(folder)
