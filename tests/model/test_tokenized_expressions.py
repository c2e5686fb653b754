"""Tokens against those of the tokenizer's own call, and of one tokenizer under several threads."""

import copy
import itertools
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from epmvg_hf.model.tokenized_expressions import tokenize
from tests.fixtures.models import WORDS, tiny_model, tiny_processor, tiny_tokenizer

THREADS = 16


def word_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens stand as the template says: at one end, at both ends or nowhere."""
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")


def make_expressions(count: int, longest: int = 20) -> list[str]:
    rng = random.Random(0)
    words = [*WORDS, "unknown", "[SEP]", "</s>"]
    return [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]


TOKENIZERS = {
    "bert": tiny_tokenizer,
    "end": lambda: word_tokenizer("$A </s>"),
    "start": lambda: word_tokenizer("<s> $A"),
    "several": lambda: word_tokenizer("<s> <s> $A </s>"),
    "none": lambda: word_tokenizer("$A"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_those_of_the_tokenizers_own_call(name, side):
    tokenizer = TOKENIZERS[name]()
    tokenizer.truncation_side = side
    own = copy.deepcopy(tokenizer)
    expressions = make_expressions(60)
    options = itertools.product(
        (4, 12, 40),
        (True, False, "longest_first"),
        (True, "max_length", False),
        (None, 4),
        ("left", "right", None),
    )
    for max_length, truncation, padding, multiple, padding_side in options:
        arguments = {
            "max_length": max_length,
            "truncation": truncation,
            "padding": padding,
            "pad_to_multiple_of": multiple if padding else None,
            "padding_side": padding_side,
            "return_special_tokens_mask": max_length == 12,
            "return_offsets_mapping": max_length == 12,
            "return_length": max_length == 12,
            "return_attention_mask": max_length != 40,
            "return_token_type_ids": False,
        }
        expected = own(expressions, **arguments)
        found, longest = tokenize(tokenizer, expressions, **arguments)
        assert found.keys() == expected.keys()
        # What a call says of the length counts padding; here it counts the tokens of the expression.
        for key in expected.keys() - {"length"}:
            assert [list(row) for row in found[key]] == [list(row) for row in expected[key]], (key, arguments)
        whole = max(map(len, own(expressions, truncation=False)["input_ids"]))
        assert longest == (whole if truncation and whole > max_length else 0)
    tensors, _ = tokenize(tokenizer, expressions, max_length=9, return_tensors="pt")
    expected = own(expressions, max_length=9, truncation=True, padding=True, return_tensors="pt")
    assert torch.equal(tensors["input_ids"], expected["input_ids"])


def test_what_cannot_be_cut_is_an_error(processor):
    with pytest.raises(ValueError, match="`max_length` is 1, but the tokenizer adds 2 special tokens"):
        processor(text="the red dog", max_length=1)
    with pytest.raises(ValueError, match="`return_overflowing_tokens` must be False"):
        processor(text="the red dog", return_overflowing_tokens=True)


@pytest.mark.parametrize("cut_and_padded", [False, True])
def test_a_call_does_not_change_what_is_saved(processor, tmp_path, cut_and_padded):
    if cut_and_padded:
        processor.tokenizer("the dog", max_length=3, truncation=True, padding="max_length")
        processor = type(processor)(processor.image_processor, processor.tokenizer)
        saved = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        assert saved["truncation"]["max_length"] == saved["padding"]["strategy"]["Fixed"] == 3
    processor.save_pretrained(tmp_path / "before")
    processor(text=make_expressions(10), max_length=5, padding="max_length")
    processor.save_pretrained(tmp_path / "after")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "before" / name).read_text() == (tmp_path / "after" / name).read_text()


def in_threads(call, arguments: list) -> list:
    """The results of the calls, which 16 threads make at the same time."""
    start = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        shares = [
            pool.submit(lambda part: (start.wait(), list(map(call, part)))[1], arguments[i::THREADS])
            for i in range(THREADS)
        ]
        results: list = [None] * len(arguments)
        for i, share in enumerate(shares):
            results[i::THREADS] = share.result()
    return results


def test_threads_may_share_a_processor():
    processor = tiny_processor()
    expressions = make_expressions(4_000)
    arguments = [
        ([expression], {"max_length": 4 + number % 9, "padding": (True, "max_length")[number % 2]})
        for number, expression in enumerate(expressions)
    ]

    def call(item: tuple) -> list:
        return processor(text=item[0], **item[1])["input_ids"].tolist()

    expected = [call(item) for item in arguments]
    assert in_threads(call, arguments) == expected


def test_threads_may_call_the_tokenizer_itself_at_the_same_time():
    """Neither the processor nor whoever cuts and pads by the same tokenizer notices the other."""
    processor = tiny_processor()
    cut_and_padded = {"max_length": 17, "truncation": True, "padding": "max_length"}

    def call(item: tuple[int, str]) -> list:
        number, expression = item
        if number % 2:
            return processor.tokenizer([expression], **cut_and_padded)["input_ids"]
        return processor(text=[expression])["input_ids"].tolist()

    # Each thread calls the one and the other in turn.
    arguments = [(number // THREADS, text) for number, text in enumerate(make_expressions(4_000, longest=40))]
    expected = [call(item) for item in arguments]
    assert in_threads(call, arguments) == expected


def test_threads_may_share_a_tokenizer_that_was_just_loaded(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer("the dog", max_length=3, truncation=True, padding="max_length")  # is saved along
    tokenizer.save_pretrained(tmp_path)
    processor = tiny_processor()
    expressions = make_expressions(THREADS)
    expected = [processor(text=expression)["input_ids"].tolist() for expression in expressions]
    for _ in range(20):
        processor = type(processor)(processor.image_processor, AutoTokenizer.from_pretrained(tmp_path), 12)
        assert in_threads(lambda text, of=processor: of(text=text)["input_ids"].tolist(), expressions) == expected


def test_threads_may_share_a_pipeline():
    image = Image.new("RGB", (40, 30), "red")
    grounder = pipeline("visual-grounding", model=tiny_model(), processor=tiny_processor())
    expressions = [*make_expressions(100, longest=8), *make_expressions(100, longest=60)] * 2
    expected = [grounder(image, expression)["box"] for expression in expressions[:200]] * 2
    found = [result["box"] for result in in_threads(lambda text: grounder(image, text), expressions)]
    for one, other in zip(found, expected, strict=True):
        assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-3)
