import io

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage

from epmvg_hf import ImageGroups
from epmvg_hf.data.captioned_groups import CaptionedGroups
from epmvg_hf.data.image_groups import merge_groups
from epmvg_hf.data.streamed_rows import group_rows, number_rows
from epmvg_hf.model.rgb_images import as_rgb
from tests.fixtures.rows import coloured_rows

IMAGES = ["a", "bb", "a", "ccc", "bb", "a"]


def test_every_row_is_in_one_group():
    groups = ImageGroups(coloured_rows(IMAGES))
    assert len(groups) == 3
    assert [groups[index].row_indices for index in range(3)] == [[0, 2, 5], [1, 4], [3]]
    assert groups[0].boxes[:, 0].tolist() == [0, 2, 5] and groups[0].boxes.dtype == np.float32
    assert groups[1].expressions == ["the dog left", "the dog left"] and groups[1].image.size == (42, 30)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="lacks the column\\(s\\) expression; it has image, image_id, box"):
        ImageGroups(coloured_rows(["a"]).remove_columns("expression"))


def test_some_of_the_expressions():
    group = ImageGroups(coloured_rows(IMAGES))[0].select([2, 0])
    assert group.row_indices == [5, 0] and group.boxes[:, 0].tolist() == [5, 0]
    assert group.expressions == ["the dog left left", "the dog"] and len(group) == 2


def _row_of(image: PILImage.Image, box: list[float] | None, **saving) -> Dataset:
    file = io.BytesIO()
    image.save(file, **saving)
    columns = {"image": [{"bytes": file.getvalue(), "path": None}], "image_id": ["a"], "expression": ["it"]}
    return Dataset.from_dict({**columns, "box": [box]}).cast_column("image", Image())


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "size, side, reduced",
    [
        ((400, 300), 200, (200, 150)),
        ((403, 301), 100, (101, 76)),
        ((300, 400), 51, (75, 100)),
        ((1601, 9), 200, (201, 2)),
        ((400, 300), 201, (400, 300)),
        ((40, 30), 100, (40, 30)),
    ],
)
def test_boxes_follow_the_size_at_which_a_jpeg_is_decoded(size, side, reduced, mode):
    image = PILImage.new(mode, size)
    box = [size[0] // 4, size[1] // 4, size[0] // 2, size[1]]
    image.paste("white", tuple(box))
    dataset = _row_of(image, box, format="JPEG", quality=95)
    group = ImageGroups(dataset, decoded_side=side)[0]
    assert group.image.size == reduced and group.image.mode == mode and group.boxes.dtype == np.float32
    rows, columns = (np.array(group.image.convert("L")) > 127).nonzero()
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(group.boxes[0], seen, atol=1)
    assert ImageGroups(dataset)[0].image.size == size
    assert ImageGroups(dataset)[0].boxes.tolist() == [box]


def test_what_is_no_upright_jpeg_on_this_machine_is_decoded_as_ever():
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    png, turned = _row_of(noise, [1, 2, 3, 4], format="PNG"), _row_of(noise, None, format="JPEG", exif=exif)
    missing = Dataset.from_dict({**png.remove_columns("image")[:], "image": [None]}).cast_column("image", Image())
    for dataset, size in ((png, (40, 30)), (turned, (30, 40)), (missing, None)):
        expected, group = ImageGroups(dataset)[0], ImageGroups(dataset, decoded_side=10)[0]
        assert group.image == expected.image
        assert size is None or group.image.size == size
        np.testing.assert_array_equal(group.boxes, expected.boxes)


def test_a_jpeg_file_is_decoded_to_the_mode_of_the_column(tmp_path):
    path = tmp_path / "large.jpg"
    PILImage.new("L", (400, 300), 99).save(path)
    columns = {"image": [str(path)], "image_id": ["a"], "expression": ["it"]}
    dataset = Dataset.from_dict(columns).cast_column("image", Image(mode="RGB"))
    image = ImageGroups(dataset, decoded_side=100)[0].image
    assert image.mode == "RGB" and image.size == (100, 75) and image.getpixel((0, 0)) == (99, 99, 99)
    path.unlink()
    with pytest.raises(ValueError, match=r"row 0 \(image_id 'a'\): the image cannot be read \(.*large\.jpg"):
        ImageGroups(dataset, decoded_side=100)[0]


def test_pictures_stay_apart_whatever_their_ids_say():
    red, blue = (PILImage.new("RGB", size, colour) for size, colour in (((100, 80), "red"), ((40, 160), "blue")))
    rows = {"expression": ["red circle", "blue star"], "image": [red, blue], "box": [[0, 0, 9, 9]] * 2}
    for ids in (["1", "1"], [None, None], [1, 1], None):
        columns = rows if ids is None else {**rows, "image_id": ids}
        dataset = Dataset.from_dict(columns).cast_column("image", Image())
        groups = ImageGroups(dataset)
        assert [(group.image.size, group.expressions) for group in (groups[0], groups[1])] == [
            ((100, 80), ["red circle"]),
            ((40, 160), ["blue star"]),
        ]


def test_changed_pictures_are_other_pictures():
    dataset = coloured_rows(IMAGES)
    brighter = dataset.map(lambda row: {"image": row["image"].point(lambda level: level + 100)})
    groups = ImageGroups(concatenate_datasets([brighter, dataset]))
    assert [group.image.getpixel((0, 0))[0] for group in groups] == [120, 140, 160, 20, 40, 60]
    assert [group.row_indices for group in groups] == [[0, 2, 5], [1, 4], [3], [6, 8, 11], [7, 10], [9]]


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow", "undecoded", "paths", "shuffled"])
def test_forms_of_a_dataset_give_the_same_images(form, tmp_path):
    dataset = changed = coloured_rows(IMAGES)
    if form == "undecoded":
        changed = dataset.cast_column("image", Image(decode=False))
    elif form == "paths":
        for row in dataset:
            row["image"].save(tmp_path / f"{row['image_id']}.png")
        paths = [str(tmp_path / f"{image_id}.png") for image_id in IMAGES]
        changed = dataset.remove_columns("image").add_column("image", paths)
    elif form == "shuffled":
        changed = dataset.select([5, 4, 3, 2, 1, 0]).select([5, 4, 3, 2, 1, 0])
    else:
        changed = dataset.with_format(form)
    expected, groups = ImageGroups(dataset), ImageGroups(changed)
    for one, another in zip(groups, expected, strict=True):
        assert (one.image_id, one.expressions, one.row_indices) == (
            another.image_id,
            another.expressions,
            another.row_indices,
        )
        assert one.image.tobytes() == another.image.tobytes()
        np.testing.assert_array_equal(one.boxes, another.boxes)
    assert ImageGroups(changed, decoded_side=10)[2].image.size == (43, 30)


def _flip(batch: dict) -> dict:
    flipped = {**batch, "image": [image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) for image in batch["image"]]}
    flipped["box"] = [
        np.array([image.width - x1, y0, image.width - x0, y1])
        for image, (x0, y0, x1, y1) in zip(batch["image"], batch["box"], strict=True)
    ]
    return flipped


def test_rows_with_a_transform_are_read_as_the_dataset_gives_them():
    dataset = coloured_rows(IMAGES)
    groups = ImageGroups(dataset.with_transform(_flip))
    assert len(groups) == 6  # a transform may make another picture of the same file each time
    for row in range(6):
        x0, _, x1, _ = dataset[row]["box"]
        width = dataset[row]["image"].width
        group = groups[row]
        assert group.boxes.tolist() == [[width - x1, 2, width - x0, 12]] and group.boxes.dtype == np.float32
        assert group.expressions == [dataset[row]["expression"]] and group.row_indices == [row]
    renamed = dataset.rename_column("expression", "words")
    renamed = renamed.with_transform(lambda batch: {"image": batch["image"], "expression": batch["words"]})
    group = ImageGroups(renamed)[3]
    assert (group.expressions, group.boxes, group.image_id) == (["the dog"], None, None)
    with pytest.raises(ValueError, match="lacks the column\\(s\\) image, expression; it has words"):
        ImageGroups(renamed.with_transform(lambda batch: {"words": batch["words"]}).select_columns(["words"]))


BAD_ROWS = [
    ({"box": [1.0, 2.0, 254.0, 12.0]}, "the box [1, 2, 254, 12] is not within the 43 x 30 pixels of its image."),
    (
        {"box": [9.0, 2.0, 9.0, 12.0]},
        "the box [9, 2, 9, 12] is empty or inverted, expected xmin < xmax and ymin < ymax.",
    ),
    ({"box": [-9.0, 2.0, 9.0, 12.0]}, "the box [-9, 2, 9, 12] starts outside the image."),
    ({"box": [1.0, 2.0, 3.0]}, "the box is [1.0, 2.0, 3.0], expected 4 finite numbers."),
    ({"box": [1.0, 2.0, 3.0, float("inf")]}, "the box is [1.0, 2.0, 3.0, inf], expected 4 finite numbers."),
    ({"expression": " "}, "the expression is ' ', expected words."),
    ({"expression": None}, "the expression is None, expected words."),
]


@pytest.mark.parametrize("change, message", BAD_ROWS)
@pytest.mark.parametrize("transformed", [False, True])
def test_a_bad_row_is_named_when_it_is_read_and_before(change, message, transformed):
    rows = coloured_rows(IMAGES).cast_column("image", Image(decode=False)).to_list()
    rows[3] |= change
    features = {"image": Image(), "image_id": Value("string"), "expression": Value("string")}
    dataset = Dataset.from_list(rows, Features({**features, "box": List(Value("float64"))}))
    groups = ImageGroups(dataset.with_transform(lambda batch: batch) if transformed else dataset)
    with pytest.raises(ValueError) as error:
        groups[3 if transformed else 2]
    assert str(error.value) == f"row 3 (image_id 'ccc'): {message}"
    if not transformed:
        with pytest.raises(ValueError) as error:
            groups.check_rows("train_dataset")
        assert str(error.value) == f"train_dataset, row 3 (image_id 'ccc'): {message}"


@pytest.mark.parametrize("content", [b"no image", None])
def test_a_damaged_image_is_named(content):
    dataset = coloured_rows(IMAGES).cast_column("image", Image(decode=False))
    rows = dataset.to_list()
    rows[3]["image"]["bytes"] = content or rows[3]["image"]["bytes"][:-40]
    groups = ImageGroups(Dataset.from_list(rows, dataset.features))
    with pytest.raises(ValueError, match=r"^row 3 \(image_id 'ccc'\): the image cannot be read \("):
        groups[2]
    with pytest.raises(ValueError, match=r"^eval_dataset, row 3 \(image_id 'ccc'\): the image "):
        groups.check_rows("eval_dataset")


def test_good_rows_pass_the_check():
    dataset = coloured_rows(IMAGES)
    for boxes in (
        [[0, 0, 1, 1], None, [float("nan")] * 4, [39.5, 0, 42, 31], [-1, -1, 43, 31], None],
        [None] * 6,
        [[0.0, 0.0, 1.0, 1.0]] * 6,
    ):
        columns = {**dataset.with_format("arrow")[:].drop_columns("box").to_pydict(), "box": boxes}
        ImageGroups(Dataset.from_dict(columns).cast_column("image", Image())).check_rows("train_dataset")
    ImageGroups(dataset.remove_columns("box")).check_rows("caption_dataset")
    with pytest.raises(ValueError, match="no row of train_dataset has a box, and without a teacher nothing else can"):
        ImageGroups(dataset.remove_columns("box")).check_rows("train_dataset", needs_boxes=True)


def _with_absent(absent: list[bool | None]) -> Dataset:
    """Rows of three images, without a box where they are absent, and a caption without a box."""
    dataset = coloured_rows(IMAGES)
    rows = dataset.cast_column("image", Image(decode=False)).to_list()
    for row, gone in zip(rows, absent, strict=True):
        row |= {"absent": gone, "box": None if gone else row["box"]}
    rows[4]["box"] = None
    return Dataset.from_list(rows, Features({**dataset.features, "absent": Value("bool")}))


ABSENT = [False, None, True, True, False, True]


def test_an_absent_expression_has_a_box_of_zeros_and_a_caption_has_nan():
    dataset = _with_absent(ABSENT)
    groups = ImageGroups(dataset)
    groups.check_rows("train_dataset", needs_boxes=True)
    assert groups[0].boxes.tolist() == [[0, 2, 5, 12], [0] * 4, [0] * 4]
    assert groups[1].boxes[0].tolist() == [1, 2, 6, 12] and np.isnan(groups[1].boxes[1]).all()
    assert groups.group(2, with_image=False).boxes.tolist() == [[0] * 4]
    assert ImageGroups(dataset.remove_columns("box"))[2].boxes is None


def test_absent_expressions_are_read_alike_in_every_way():
    dataset = _with_absent(ABSENT)
    expected = list(ImageGroups(dataset))
    streamed = group_rows(number_rows(dataset.to_iterable_dataset(), 0, 1))
    as_numpy = [{**row, "absent": np.bool_(row["absent"]), "row_index": i} for i, row in enumerate(dataset)]
    transformed = merge_groups(ImageGroups(dataset.with_transform(lambda batch: batch)))
    for groups in (streamed, group_rows(as_numpy), transformed):
        for one, other in zip(groups, expected, strict=True):
            assert one.row_indices == other.row_indices
            np.testing.assert_array_equal(one.boxes, other.boxes)
    drawn_twice = merge_groups([expected[0].select([0, 1]), expected[1], expected[0].select([2, 1])])
    assert drawn_twice[0].boxes.tolist() == [[0, 2, 5, 12], [0] * 4, [0] * 4, [0] * 4]


def test_absent_expressions_stay_so_where_a_jpeg_is_decoded_smaller():
    dataset = _row_of(PILImage.new("RGB", (400, 300)), [100, 60, 200, 300], format="JPEG")
    absent = _row_of(PILImage.new("RGB", (400, 300)), None, format="JPEG").cast(dataset.features)
    dataset = concatenate_datasets([dataset, absent]).add_column("absent", [False, True])
    group = ImageGroups(dataset, decoded_side=200)[0]
    assert group.image.size == (200, 150) and group.boxes.tolist() == [[50, 30, 100, 150], [0] * 4]


def test_labelled_images_keep_their_absent_expressions_beside_captions():
    dataset = _with_absent(ABSENT)
    captions = dataset.remove_columns(["box", "absent"])
    mixed = CaptionedGroups(ImageGroups(dataset), ImageGroups(captions), ratio=1, seed=0)
    assert (mixed[2].boxes == 0).all() and all(np.isnan(mixed[index].boxes).all() for index in (3, 4, 5))


def test_an_absent_expression_with_a_box_is_named():
    dataset = _with_absent([False] * 6)
    flagged = dataset.remove_columns("absent").add_column("absent", [False] * 3 + [True] + [False] * 2)
    message = "row 3 (image_id 'ccc'): absent is true, so the box must be None, but it is [3, 2, 8, 12]."
    groups = ImageGroups(flagged)
    for read in (lambda: groups[2], lambda: group_rows(list(flagged.select([3]))), lambda: groups.check_rows("rows")):
        with pytest.raises(ValueError) as error:
            read()
        assert str(error.value).endswith(message.removeprefix("row 3"))
    with pytest.raises(ValueError, match=r"^a row \(image_id 'a'\): absent is 'no', expected true or false\.$"):
        group_rows([{**dataset[0], "absent": "no"}])


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("expression", [["a dog"]], "the column 'expression' is List.*expected text; as_grounding_dataset brings"),
        ("box", ["1 2 3 4"], "the column 'box' is .*expected lists of four numbers"),
        ("image_id", [[1]], "the column 'image_id' is .*expected text or numbers"),
        ("absent", ["no"], r"the column 'absent' is Value\('string'\), expected true or false"),
        ("absent", [1], r"the column 'absent' is Value\('int64'\), expected true or false"),
        ("image", [3], "the column 'image' is .*expected images, their bytes or their paths"),
    ],
)
def test_columns_of_another_type_are_named(column, values, message):
    dataset = coloured_rows(["a"])
    with pytest.raises(ValueError, match=message):
        ImageGroups(dataset.select_columns(set(dataset.column_names) - {column}).add_column(column, values))


@pytest.mark.parametrize("mode, value", [("RGB", (127, 127, 127)), ("L", 127), (None, 32_639)])
def test_sixteen_bits_are_not_cut_off_where_the_column_asks_for_a_mode(mode, value):
    gray = PILImage.fromarray(np.full((20, 30), 32_639, np.uint16))
    dataset = _row_of(gray, [1, 2, 3, 4], format="PNG").cast_column("image", Image(mode=mode))
    assert ImageGroups(dataset)[0].image.getpixel((0, 0)) == value
    if mode != "L":  # of a stream, `datasets` makes what the column asks for, and only RGB is made here
        (group,) = group_rows(number_rows(dataset.to_iterable_dataset(), 0, 1))
        image = group.image if mode is None else as_rgb(group.image)
        assert image.getpixel((0, 0)) == value
