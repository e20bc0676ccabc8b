"""Which models suit a prompt, by words alone: what names never seen in training are found by.

    retriever = ModelRetriever(catalog.values(), examples=pairs)  # pairs: (prompt, model name), from training data
    retriever.similarities(["a corgi in ink"])  # (prompts, models)

A model is known by its name, description and trigger words, and by prompts it was used with, if there are any. Both are
compared with a prompt by TF-IDF over words; a model's similarity is that of the nearest of its texts. A new model needs
a description or a few prompts, and no training.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from rollouts.catalog import CatalogEntry

_CHUNK = 256


class ModelRetriever:
    """TF-IDF cosine similarity of prompts and models.

    Args:
        entries: The models.
        examples: Prompts that models were used with, each with the model's name; those of other models are left out.
        description_weight: Factor on the similarity of a description, beside that of an example.

    Raises:
        ImportError: Without scikit-learn, naming the extra to install.
        ValueError: No models.
    """

    def __init__(
        self,
        entries: Iterable[CatalogEntry],
        examples: Iterable[tuple[str, str]] = (),
        *,
        description_weight: float = 1.0,
    ) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise ImportError('Retrieval needs scikit-learn: pip install "t2i-align[eval]".') from error
        models = list(entries)
        if not models:
            raise ValueError("`entries` is empty; retrieval needs a model.")
        self.names = [entry.name for entry in models]
        self._index = {name: i for i, name in enumerate(self.names)}
        known = [(text, self._index[name]) for text, name in examples if name in self._index]
        texts = [_document(entry) for entry in models] + [text for text, _ in known]
        owners = list(range(len(models))) + [owner for _, owner in known]
        self._vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
        matrix = self._vectorizer.fit_transform(texts)
        weights = np.ones(len(texts), dtype=np.float32)
        weights[: len(models)] = description_weight
        # Rows in the order of their models, so that the best of each model is a reduction over a slice.
        order = np.argsort(owners, kind="stable")
        self._matrix = matrix[order].multiply(weights[order, None]).tocsr().astype(np.float32)
        self._starts = np.searchsorted(np.asarray(owners)[order], np.arange(len(models)))

    def similarities(self, prompts: Sequence[str]) -> np.ndarray:
        """Similarity of every prompt and model, 0 (no word in common) to 1. Shape (prompts, models)."""
        if not len(prompts):
            return np.zeros((0, len(self.names)), dtype=np.float32)
        queries = self._vectorizer.transform(prompts).astype(np.float32)
        found = []
        for start in range(0, len(prompts), _CHUNK):
            texts = (queries[start : start + _CHUNK] @ self._matrix.T).toarray()
            found.append(np.maximum.reduceat(texts, self._starts, axis=1))
        return np.concatenate(found)


def _document(entry: CatalogEntry) -> str:
    return " ".join([entry.name, entry.description, *entry.trigger_words])
