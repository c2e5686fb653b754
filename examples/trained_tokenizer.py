"""A tokenizer for models that are trained from scratch."""

from collections.abc import Iterable

from transformers import BertTokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> BertTokenizer:
    """Lower-cases and splits as BERT does, with a vocabulary of at most `vocab_size` tokens learned from the texts."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    template = BertTokenizer(vocab={token: index for index, token in enumerate(special)})
    return template.train_new_from_iterator(texts, vocab_size=vocab_size)
