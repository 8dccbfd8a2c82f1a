"""Two lexicons of sentiment that packages of PyPI carry; nothing is downloaded, and the packages are not imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from upcycle.errors import SourceError
from upcycle.options.extras import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Rows = Iterator[tuple[str, str, dict[str, Any]]]


def textblob_senses() -> Rows:
    """Senses of English words by TextBlob's en-sentiment.xml (PDDL): place, `word: gloss`, polarity and subjectivity.

    Raises:
        MissingPackageError: textblob is not installed.
        SourceError: its lexicon is not there, or damaged.
    """
    file = _file("textblob", "en/en-sentiment.xml")
    try:
        words = list(ElementTree.parse(file).getroot().iter("word"))
        for number, word in enumerate(words, start=1):
            if gloss := word.attrib.get("sense", ""):
                labels = {name: float(word.attrib[name]) for name in ("polarity", "subjectivity")}
                yield f"{file}, word {number}", f"{word.attrib['form']}: {gloss}", labels
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise _damaged(file, error) from error


def vader_words() -> Rows:
    """Words of vaderSentiment's lexicon (MIT): place, word, and mean and deviation of ten people's ratings of valence.

    Raises:
        MissingPackageError: vaderSentiment is not installed.
        SourceError: its lexicon is not there, or damaged.
    """
    file = _file("vaderSentiment", "vader_lexicon.txt")
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            word, mean, deviation, _ratings = line.split("\t")
            yield f"{file}:{number}", word, {"valence": float(mean), "deviation": float(deviation)}
    except (UnicodeDecodeError, ValueError) as error:
        raise _damaged(file, error) from error


LEXICONS: dict[str, Callable[[], Rows]] = {"textblob": textblob_senses, "vader": vader_words}


def _file(package: str, inside: str) -> Path:
    need(f"the lexicon of {package}", package)
    spec = find_spec(package)
    assert spec
    places = [Path(place) / inside for place in spec.submodule_search_locations or ()]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise SourceError(f"{package} has no lexicon", found=f"no {inside} in it", remedy=f"install {package} again")
    return found


def _damaged(file: Path, error: Exception) -> SourceError:
    return SourceError("the lexicon is damaged", found=f"{file}: {error!r:.200}", remedy="install its package again")
