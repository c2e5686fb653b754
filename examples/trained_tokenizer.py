"""A tokenizer for models that are trained from scratch."""

from collections import Counter
from collections.abc import Iterable

from transformers import BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> BertTokenizer:
    """
    Lower-cases and splits as BERT does. The vocabulary is that of the texts: all characters, from which any word can
    be spelled, and whole words, the most frequent first, until there are `vocab_size` tokens.

    Not by `train_new_from_iterator`: its WordPiece trainer breaks ties at random, so that each training of a tokenizer
    numbers the tokens, and with them a seed's initial embeddings, in another way.
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
