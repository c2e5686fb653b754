from epmvg_hf.runs.trained_tokenizer import SPECIAL, train_tokenizer

TEXTS = ["the red dog", "The dog", "a red cat, left"]


def test_characters_come_first_then_words_by_frequency_and_alphabet():
    tokenizer = train_tokenizer(TEXTS, 1000)
    characters = list(",acdefghlort")
    spelling = [f"##{character}" for character in characters]
    expected = [*SPECIAL, *characters, *spelling, "dog", "red", "the", "cat", "left"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == expected


def test_the_vocabulary_depends_on_the_texts_alone():
    assert train_tokenizer(TEXTS, 30).get_vocab() == train_tokenizer(reversed(TEXTS), 30).get_vocab()


def test_unknown_words_are_spelled():
    tokenizer = train_tokenizer(TEXTS, 1000)
    assert tokenizer.tokenize("The RED goat") == ["the", "red", "g", "##o", "##a", "##t"]
    assert tokenizer.tokenize("zoo") == ["[UNK]"]  # no text has a z


def test_the_vocabulary_has_at_most_the_size_asked_for():
    tokenizer = train_tokenizer(TEXTS, 30)
    assert len(tokenizer) == 30 and tokenizer.tokenize("the dog") == ["t", "##h", "##e", "dog"]


def test_an_expression_stands_between_the_special_tokens_of_bert():
    tokenizer = train_tokenizer(TEXTS, 1000)
    assert tokenizer.convert_ids_to_tokens(tokenizer("red dog")["input_ids"]) == ["[CLS]", "red", "dog", "[SEP]"]
