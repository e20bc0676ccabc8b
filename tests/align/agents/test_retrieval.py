"""Similarities beside TF-IDF written out by hand."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from align.agents.retrieval import ModelRetriever

EXAMPLES = [
    ("a corgi in ink, ink and more ink", "Pixel"),
    ("a lake", "{}"),
    ("Corgi by the lake", "{}"),
    ("never mind", "a model that is gone"),
]
QUESTIONS = ["a corgi", "ink on paper", "lake lake CORGI", "nothing whatsoever", ""]


def words(text):
    return Counter(re.findall(r"\w+", text.lower()))


def by_hand(shop, weight):
    """Cosines of (1 + ln tf)(ln((1 + n) / (1 + df)) + 1); a model has that of its nearest text."""
    texts = [(words(" ".join([e.name, e.description, *e.trigger_words])), e.name, weight) for e in shop.values()]
    texts += [(words(text), name, 1.0) for text, name in EXAMPLES if name in shop]
    frequency = Counter(word for counts, _, _ in texts for word in counts)

    def vector(counts):
        raw = {
            word: (1 + math.log(n)) * (math.log((1 + len(texts)) / (1 + frequency[word])) + 1)
            for word, n in counts.items()
            if word in frequency
        }
        length = math.sqrt(sum(value**2 for value in raw.values()))
        return {word: value / length for word, value in raw.items()}

    found = np.zeros((len(QUESTIONS), len(shop)))
    for row, question in enumerate(QUESTIONS):
        asked = vector(words(question))
        for counts, name, factor in texts:
            similarity = factor * sum(asked.get(word, 0) * value for word, value in vector(counts).items())
            column = list(shop).index(name)
            found[row, column] = max(found[row, column], similarity)
    return found


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_similarities_are_those_of_the_nearest_text(shop, weight):
    retriever = ModelRetriever(shop.values(), EXAMPLES, description_weight=weight)
    found = retriever.similarities(QUESTIONS)
    assert retriever.names == list(shop)
    np.testing.assert_allclose(found, by_hand(shop, weight), atol=1e-6)
    assert not found[3:].any() and retriever.names[int(found[1].argmax())] == "Pixel"


def test_many_questions_and_none(shop):
    retriever = ModelRetriever(shop.values(), EXAMPLES)
    once = retriever.similarities(QUESTIONS)
    np.testing.assert_array_equal(retriever.similarities(QUESTIONS * 200), np.tile(once, (200, 1)))
    assert retriever.similarities([]).shape == (0, len(shop))
    with pytest.raises(ValueError, match="`entries` is empty"):
        ModelRetriever([])
