import dataclasses
import pickle

import pytest

from epmvg_hf.training.known_words import ENGLISH, KnownWords


def test_each_word_has_one_meaning_and_no_side_is_neutral():
    swapped = set(ENGLISH.swaps) | set(ENGLISH.swaps.values())
    groups = [swapped, ENGLISH.neutral, ENGLISH.places, ENGLISH.colors]
    assert sum(map(len, groups)) == len(set().union(*groups))
    # Words for left and right of other languages, compass points, what is written, and slips for left and right.
    doubtful = """links rechts gauche droite droit sinister dexter izquierda derecha esquerda direita sinistra destra
        port starboard larboard chap sol bal jobb lewy kiri kanan zuo migi hidari levo pravo east west eastern western
        north south clock clockwise letter letters word words number numbers text label logo read says writing eight
        tight fight let lest loft lift rite wright l r s z j"""
    assert not set(doubtful.split()) & set().union(*groups)


@pytest.mark.parametrize(
    ("expression", "mirrorable", "croppable", "colorless"),
    [
        ("a dog", True, True, True),
        ("A RED Dog!", True, True, False),
        ("the dog above", True, False, True),
        ("the left dog", True, False, True),
        ("right behind the dog", False, False, True),
        ("the roter dog", False, False, False),
        ("", True, True, True),
    ],
)
def test_what_words_allow(expression, mirrorable, croppable, colorless):
    assert ENGLISH.mirrorable(expression) == mirrorable
    assert ENGLISH.croppable(expression) == croppable
    assert ENGLISH.colorless(expression) == colorless


def test_the_first_word_with_an_opposite_is_the_one_put_in():
    words = KnownWords({"links": "rechts", "lks": "rechts"}, {"hund"})
    assert [words.mirror(text) for text in ("lks Hund", "rechts Hund")] == ["rechts Hund", "links Hund"]


def test_words_can_be_added_to_the_english_ones():
    more = dataclasses.replace(ENGLISH, neutral=ENGLISH.neutral | {"Pneumothorax"})
    assert more.mirrorable("the left pneumothorax") and not ENGLISH.mirrorable("the left pneumothorax")
    assert pickle.loads(pickle.dumps(more)).mirror("the left pneumothorax") == "the right pneumothorax"


def test_unknown_words_are_counted():
    counts = ENGLISH.unknown(["der Kreis", "Der dog ->"])
    assert counts == {"der": 2, "kreis": 1, ">": 1} and counts.most_common(1) == [("der", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"links": "rechts"}, {"linke Seite"}), r"neutral holds 'linke seite', which is not one word"),
        (({"links": "rechts"}, {""}), r"neutral holds '', which is not one word"),
        (({"ganz links": "rechts"}, set()), r"swaps holds 'ganz links', which is not one word"),
        (({"links": "rechts"}, {"Hund", "Rechts"}), r"'rechts' stands in both swaps and neutral"),
        (({}, {"rot"}, (), ["Rot"]), r"'rot' stands in both neutral and colors"),
        (({}, "hund"), r"neutral must be a collection of words, not the string 'hund'"),
    ],
)
def test_a_word_list_that_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KnownWords(*arguments)


def test_letters_that_only_look_like_those_of_a_side_are_another_word():
    assert ENGLISH.mirror("R\u0130GHT tree, leftmo\u017ft tree") == "R\u0130GHT tree, leftmo\u017ft tree"
    assert not ENGLISH.mirrorable("R\u0130GHT tree") and not ENGLISH.mirrorable("leftmo\u017ft tree")
