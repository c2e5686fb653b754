"""A tokenizer for models that are trained from scratch."""

from collections import Counter
from collections.abc import Iterable

from transformers import BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> BertTokenizer:
    """
    Make a tokenizer that lower-cases and splits as BERT's does, with a vocabulary from the texts.

    The vocabulary has all characters of the texts, so that words outside it can be spelled, and then whole words, the
    most frequent first. It depends on the texts alone. The WordPiece trainer behind `train_new_from_iterator` breaks
    ties at random instead: tokens would be numbered in another way each time, and the same seed would give other
    initial embeddings.

    Args:
        texts (`Iterable[str]`): the texts.
        vocab_size (`int`): the largest number of tokens, special ones included.

    Returns:
        `BertTokenizer`: the tokenizer.
    """
    backend = BertTokenizer(vocab={token: index for index, token in enumerate(SPECIAL)}).backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    characters = sorted(set("".join(counts)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    tokens = dict.fromkeys((*SPECIAL, *characters, *(f"##{character}" for character in characters), *words))
    return BertTokenizer(vocab={token: index for index, token in enumerate(list(tokens)[:vocab_size])})
