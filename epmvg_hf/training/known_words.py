"""Words whose meaning is known, by which an expression shows that it stays true when its image is changed."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# A word, a possessive ending, or one other character: a digit is part of a word, an emoji or an arrow is none.
_TOKEN = re.compile(r"['\u2019]s\b(?!['\u2019])|[^\W_]+|[^\w\s]")
_WORD = re.compile(r"[^\W_]+")
_DASHES_AND_QUOTES = "\u2013\u2014\u2018\u2019\u201c\u201d\u2026"  # typographic ones, and the ellipsis
_PUNCTUATION = frozenset(".,;:!?'\"()/&-" + _DASHES_AND_QUOTES) | {"'s", "\u2019s"}


@dataclass(frozen=True)
class KnownWords:
    """
    The words whose meaning is known. An expression may be mirrored, cropped or strongly recoloured with its image only
    if every one of its words is known to allow it: a word that is not listed here may be another language's word for
    left, a misspelling of it, or a colour. The case of letters does not matter. Of other characters, only the common
    punctuation marks are known.

    Words are what stands between spaces and punctuation. An expression in a language that is written without spaces is
    therefore one long unknown word.

    Args:
        swaps (`Mapping[str, str]`):
            Words for a side, each with the word that takes its place in a mirrored image. A pair given once works in
            both directions. Where several words have the same opposite, the first of them takes its place.
        neutral (`Collection[str]`): Words that say nothing about sides, places, order, other objects or colours.
        places (`Collection[str]`, *optional*, defaults to `()`):
            Words about a position, an order or other objects that hold in a mirrored image, but perhaps not in a crop.
        colors (`Collection[str]`, *optional*, defaults to `()`): Words about a colour or a brightness.
        exceptions (`str`, *optional*):
            A regular expression, in which case does not matter. Expressions in which it finds something are not
            mirrored, although their words are known ("right behind").

    Raises:
        `ValueError`: An entry is not one word, a word has two meanings, or a string was given in place of a list.
        `re.error`: `exceptions` is not a regular expression.

    Example:

    ```python
    >>> from epmvg_hf import GroundingAugmentation
    >>> from epmvg_hf.training.known_words import KnownWords

    >>> german = KnownWords(
    ...     swaps={"links": "rechts", "linke": "rechte", "linken": "rechten"},
    ...     neutral={"der", "die", "das", "Kreis", "Hund"},
    ...     places={"oben", "unten", "von"},
    ...     colors={"rot", "rote"},
    ... )
    >>> german.mirrorable("der linke Kreis"), german.mirror("der linke Kreis")
    (True, 'der rechte Kreis')
    >>> german.mirrorable("der Kreis left")
    False
    >>> augmentation = GroundingAugmentation(words=german)
    ```

    To know more words than the English ones, add them:

    ```python
    >>> import dataclasses
    >>> from epmvg_hf.training.known_words import ENGLISH

    >>> ENGLISH.unknown(["left pneumothorax", "small pneumothorax"]).most_common(1)
    [('pneumothorax', 2)]
    >>> medical = dataclasses.replace(ENGLISH, neutral=ENGLISH.neutral | {"pneumothorax"})
    >>> medical.mirror("left pneumothorax")
    'right pneumothorax'
    ```
    """

    swaps: Mapping[str, str]
    neutral: Collection[str] = field(repr=False)
    places: Collection[str] = field(default=(), repr=False)
    colors: Collection[str] = field(default=(), repr=False)
    exceptions: str = field(default="(?!)", repr=False)  # this default finds nothing
    _exceptions: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        swaps = {word.lower(): opposite.lower() for word, opposite in dict(self.swaps).items()}
        lists = {name: _lowered(name, getattr(self, name)) for name in ("neutral", "places", "colors")}
        kinds = dict.fromkeys(_lowered("swaps", [*swaps, *swaps.values()]), "swaps")
        for name, words in lists.items():
            for word in words:
                if kinds.setdefault(word, name) != name:
                    raise ValueError(
                        f"The word {word!r} stands in both {kinds[word]} and {name}; it can have one meaning."
                    )
        for name, value in {"swaps": swaps, **lists, "_exceptions": re.compile(self.exceptions, re.I)}.items():
            object.__setattr__(self, name, value)

    def mirrorable(self, expression: str) -> bool:
        """Whether the expression stays true in a mirrored image once its words for sides are swapped."""
        return self._mirrorable.issuperset(_tokens(expression)) and not self._exceptions.search(expression)

    def croppable(self, expression: str) -> bool:
        """Whether the expression stays true in a crop that keeps its object whole."""
        return self._croppable.issuperset(_tokens(expression))

    def colorless(self, expression: str) -> bool:
        """Whether the expression says nothing about colours."""
        return self._colorless.issuperset(_tokens(expression))

    def mirror(self, expression: str) -> str:
        """Swaps the words for sides. All other words stay, also unknown ones: ask [`~KnownWords.mirrorable`] first."""
        return _WORD.sub(self._swap, expression)

    def unknown(self, expressions: Iterable[str]) -> Counter[str]:
        """Counts the words that are not listed, and so keep images of your expressions from being mirrored."""
        counts = Counter(token for expression in expressions for token in _tokens(expression))
        return Counter({token: count for token, count in counts.items() if token not in self._mirrorable})

    def describe_unknown(self, expressions: Collection[str]) -> str | None:
        """A sentence for the log if more than half of these expressions have a word that is not listed, or `None`."""
        having = sum(not self._mirrorable.issuperset(_tokens(expression)) for expression in expressions)
        if having * 2 <= len(expressions):
            return None
        examples = ", ".join(word for word, _ in self.unknown(expressions).most_common(5))
        return (
            f"{having:,} of {len(expressions):,} expressions looked at have words that the augmentation does not know "
            f"({examples}), so their images are neither mirrored, cropped nor strongly recoloured; "
            "GroundingAugmentation(words=KnownWords(...)) says what the words mean."
        )

    @cached_property
    def _mirrorable(self) -> frozenset[str]:
        return _PUNCTUATION.union(self._opposites, self.neutral, self.places, self.colors)

    @cached_property
    def _croppable(self) -> frozenset[str]:
        return _PUNCTUATION.union(self.neutral, self.colors)

    @cached_property
    def _colorless(self) -> frozenset[str]:
        return _PUNCTUATION.union(self._opposites, self.neutral, self.places)

    @cached_property
    def _opposites(self) -> dict[str, str]:
        opposites = dict(self.swaps)
        for word, opposite in self.swaps.items():
            opposites.setdefault(opposite, word)
        return opposites

    def _swap(self, match: re.Match[str]) -> str:
        word = match[0]
        swapped = self._opposites.get(word.lower())
        if swapped is None:
            return word
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped


def _tokens(expression: str) -> list[str]:
    return _TOKEN.findall(expression.lower())


def _lowered(name: str, words: Collection[str]) -> frozenset[str]:
    if isinstance(words, str):
        raise ValueError(f"{name} must be a collection of words, not the string {words!r}.")
    lowered = frozenset(word.lower() for word in words)
    for word in sorted(lowered):
        if not _TOKEN.fullmatch(word):
            raise ValueError(f"{name} holds {word!r}, which is not one word; list the words one by one.")
    return lowered


def _read_english() -> dict[str, list[str]]:
    text = Path(__file__).with_name("english_words.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    _, *sections = "\n".join(lines).split("[")
    return {name: words.split() for name, _, words in (section.partition("]") for section in sections)}


# The words of ReferItGame's annotators for right and left, of which one letter is missing, doubled, swapped with its
# neighbour or hit beside its key. Only those are here of which no other word could have been meant.
_SLIPS = {
    "left": "rght righ rigth rigt rgt rgiht rihgt rihght riight rightt rtight roght rught ruight rioght rigjt righjt "
    "righyt righr rfight rifght reight rigbht rgight rightw",
    "right": "lef leaft laft laeft lelt lieft lleft lefrt leftg leff lefft lefte leftt lfet lrft lwft elft meft kleft",
}

_ENGLISH_SWAPS = {
    "left": "right",
    "leftmost": "rightmost",
    "leftest": "rightest",
    "leftish": "rightish",
    "lefts": "rights",  # "the man on lefts arm"
    "lefthand": "righthand",
    "leftside": "rightside",
    "lft": "rt",
    "topleft": "topright",
    "bottomleft": "bottomright",
    "upperleft": "upperright",
    "lowerleft": "lowerright",
    "onleft": "onright",
    "toleft": "toright",
    **{slip: opposite for opposite, slips in _SLIPS.items() for slip in slips.split()},
}

_RIGHT = r"\b(?:right|rght|righ|rigth|rigt|rt)"

# Expressions that mirroring would make false even with left and right swapped: "right behind the car" does not mean a
# direction, "the cake that is left" does not mean a side, and "the first person" is counted from a side that nobody
# names. Words for what is written or numbered need no mention here: english_words.txt leaves them out.
_ENGLISH_EXCEPTIONS = "|".join(
    (
        rf"(?<!\bthe )(?<!\bon )(?<!\bfar )(?<!\bto ){_RIGHT}[\s-]+"
        r"(?:above|across|adjacent|after|against|along|alongside|among|around|aside|at|atop|away|before|behind"
        r"|below|beneath|beside|between|beyond|by|close|down|handed|here|in|inside|into|near|next|now|off|on|onto|out"
        r"|outside|over|past|there|through|towards?|under|underneath|up|when|where)\b",
        rf"\ball {_RIGHT}\b|{_RIGHT}\s+(?:angled?|angles|side up|way)\b",
        r"\bleft[\s-]+(?:alone|behind|handed|out|over|to|uneaten|unfinished)\b",
        r"\b(?:are|be|been|being|gets?|getting|got|had|has|have|he|is|just|she|that|that['\u2019]s|thats|they|was|were"
        r"|what['\u2019]s|whats|who|who['\u2019]s)\s+left\b",
        r"\b(?:last|only)\s+\w+\s+left\b",
        r"\b(?:driver|passenger)(?:['\u2019]?s['\u2019]?)? side\b",
        # An order, unless the expression names where it starts, or the words mean something else.
        r"^(?!(?s:.*)\b(?:left|right|leftmost|rightmost|lft|rt|top|bottom|upper|lower|up|down|above|below|front|back|rear"
        r"|behind|foreground|background|closest|nearest|from)\b)"
        r"(?s:.*)\b(?:first|second|third|fourth|fifth|sixth|seventh|ninth|tenth|last|next(?! to\b))\b"
        r"(?! (?:aid|base|baseman|floor|level|place|row|story)\b)",
    )
)

ENGLISH = KnownWords(_ENGLISH_SWAPS, exceptions=_ENGLISH_EXCEPTIONS, **_read_english())
