# Copyright 2026 The EpmVG HF authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Tokens of expressions, cut and padded without changing the tokenizer.

A fast tokenizer keeps the truncation and padding of its last call inside, where another thread that uses it at the
same time meets them. So here it is always asked for whole expressions without padding, in a way that changes nothing
inside, and the rest is done on its lists.
"""

import copy
import reprlib
from typing import Any

from tokenizers import Tokenizer
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    expressions: list[str],
    max_length: int,
    truncation: bool | str = True,
    padding: bool | str = True,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_attention_mask: bool | None = None,
    return_special_tokens_mask: bool = False,
    return_tensors: str | None = None,
    **kwargs: Any,
) -> tuple[BatchEncoding, int]:
    """
    Tokenizes expressions as a call of the tokenizer does.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        expressions (`list[str]`): N expressions.
        max_length (`int`): the most tokens of an expression, special tokens included, if it is cut.
        truncation, padding, pad_to_multiple_of, padding_side, return_attention_mask, return_special_tokens_mask, \
return_tensors:
            See the call of the tokenizer.
        kwargs: further arguments of that call.

    Returns:
        `tuple[BatchEncoding, int]`: what the call returns, and how many tokens the longest expression had before it
        was cut, or 0 if none was cut.

    Raises:
        ValueError: `max_length` leaves no room for the special tokens, an expression has no token but these, or parts
            that are cut off are asked for.
    """
    if kwargs.pop("return_overflowing_tokens", False):
        raise ValueError("`return_overflowing_tokens` must be False: each expression has one row of tokens.")
    kwargs.pop("stride", None)  # is about those parts
    rows = dict(_whole(tokenizer, expressions, return_attention_mask=True, return_special_tokens_mask=True, **kwargs))
    for expression, special in zip(expressions, rows["special_tokens_mask"], strict=True):
        if all(special):
            raise ValueError(
                f"the expression {reprlib.repr(expression)} has no token: the tokenizer removes all of its characters."
            )
    longest = max(map(len, rows["input_ids"]))
    if longest <= max_length or truncation in (False, "do_not_truncate"):
        longest = 0
    else:
        kept = [_keep(mask, max_length, tokenizer.truncation_side) for mask in rows["special_tokens_mask"]]
        for name, values in rows.items():
            if name != "length":
                rows[name] = [[row[i] for i in places] for row, places in zip(values, kept, strict=True)]
    if "length" in rows:
        rows["length"] = list(map(len, rows["input_ids"]))
    if not return_special_tokens_mask:
        del rows["special_tokens_mask"]
    # `tokenizer.pad` pads all but these.
    others = {name: rows.pop(name) for name in ("offset_mapping", "length") if name in rows}
    side = padding_side or tokenizer.padding_side
    padded = tokenizer.pad(
        rows, padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask=True, verbose=False
    )
    if "offset_mapping" in others:
        for offsets, ids in zip(others["offset_mapping"], padded["input_ids"], strict=True):
            missing = [(0, 0)] * (len(ids) - len(offsets))
            offsets[:] = missing + offsets if side == "left" else offsets + missing
    if return_attention_mask is False:
        del padded["attention_mask"]
    return BatchEncoding({**padded, **others}, tensor_type=return_tensors), longest


def _whole(tokenizer: PreTrainedTokenizerBase, expressions: list[str], **kwargs: Any) -> BatchEncoding:
    """
    The whole expressions without padding, whatever truncation and padding a fast tokenizer holds, and without
    changing those: they are of the call that another thread is just making, or what the tokenizer was saved with.
    """
    kwargs |= {"padding": False, "truncation": False, "return_tensors": None, "verbose": False}
    if not tokenizer.is_fast:
        return tokenizer(expressions, **kwargs)
    backend = tokenizer.backend_tokenizer
    reader = copy.copy(tokenizer)  # reads with the same backend, but leaves its settings alone
    reader.set_truncation_and_padding = lambda **settings: None
    if backend.truncation is None and backend.padding is None:
        encoded = reader(expressions, **kwargs)
        # Another thread may have set them in the meantime.
        if not any(encoding.overflowing or 0 in encoding.attention_mask for encoding in encoded.encodings):
            return encoded
    reader._tokenizer = _without_settings(backend)
    return reader(expressions, **kwargs)


def _without_settings(backend: Tokenizer) -> Tokenizer:
    """A tokenizer of the same parts, which are shared and not copied, that neither truncates nor pads."""
    plain = Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    plain.post_processor = backend.post_processor
    # In the order of their numbers, by which they get the same numbers again.
    plain.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return plain


def _keep(special_tokens_mask: list[int], max_length: int, truncation_side: str) -> list[int]:
    """The places of the tokens that remain of an expression: all that are special, and as many others as fit."""
    special = sum(special_tokens_mask)
    if special > max_length:
        raise ValueError(f"`max_length` is {max_length}, but the tokenizer adds {special} special tokens.")
    words = [place for place, is_special in enumerate(special_tokens_mask) if not is_special]
    room = max_length - special
    cut = words[room:] if truncation_side == "right" else words[: max(0, len(words) - room)]
    return sorted(set(range(len(special_tokens_mask))).difference(cut))
