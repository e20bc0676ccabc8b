"""What a trained policy has to beat: choosing a model without a language model.

Each baseline maps instructions to calls of the catalogue, so it never hallucinates.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from align.pairs import DataError
from rewards.commandline import ConfigError
from rollouts.api import APICall, APICallError
from rollouts.catalog import Catalog, CatalogError


class Baseline(Protocol):
    """Something that answers prompts with calls."""

    name: str

    def answer(self, prompts: Sequence[str]) -> list[APICall]:
        """One call per prompt."""
        ...


def make_baselines(
    names: Sequence[str],
    rows: Any,
    catalog: Catalog,
    architecture: str,
    *,
    sentence_encoder: str | None = None,
    where: str = "DABench",
) -> Iterator[Baseline]:
    """Baselines by the names that options have for them, each made when it is asked for.

    Args:
        names: Any of popular, tfidf, embedding.
        rows: DABench's training split.
        catalog: What can be called.
        architecture: Of the models.
        sentence_encoder: For `embedding`.
        where: What `rows` is from, for messages.

    Raises:
        DataError: A training row whose call is none.
        ConfigError: A package that is not installed.
    """
    prompts = [row["instruction"]["prompt"] for row in rows]
    try:
        calls = [APICall.from_dict(row["api"]) for row in rows]
    except APICallError as error:
        raise DataError(f"{where}, split sft: {error}") from error
    for name in names:
        try:
            if name == "popular":
                yield MostPopular(catalog, architecture)
            elif name == "tfidf":
                yield TfidfNeighbour(prompts, calls)
            else:
                yield EmbeddingNeighbour(prompts, calls, str(sentence_encoder))
        except ImportError as error:
            raise ConfigError(str(error)) from error


class MostPopular:
    """Always the most downloaded version of the architecture, with its own default parameters.

    Raises:
        CatalogError: If the catalogue has no model of this architecture.
    """

    name = "most popular model"

    def __init__(self, catalog: Catalog, base_model: str) -> None:
        entries = catalog.of_architecture(base_model)
        if not entries:
            raise CatalogError(f"The catalogue has no model for {base_model}.")
        self._ranked = sorted(entries, key=lambda entry: entry.stats.get("downloads", 0), reverse=True)
        self.call = self._ranked[0].default_call()

    def answer(self, prompts: Sequence[str]) -> list[APICall]:
        """The same call for every prompt."""
        return [self.call] * len(prompts)

    def ranked(self, prompts: Sequence[str], count: int) -> list[list[str]]:
        """The `count` most downloaded versions, the same for every prompt."""
        return [[entry.name for entry in self._ranked[:count]] for _ in prompts]


class TfidfNeighbour:
    """The call of the training prompt with the highest TF-IDF cosine similarity (words, sublinear frequency).

    Args:
        prompts: Training prompts.
        calls: Their calls.

    Raises:
        ImportError: Without scikit-learn, naming the extra to install.
    """

    name = "TF-IDF nearest neighbour"

    def __init__(self, prompts: Sequence[str], calls: Sequence[APICall]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise ImportError('The TF-IDF baseline needs scikit-learn: pip install "t2i-align[eval]".') from error
        self.calls = list(calls)
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
        self.matrix = self.vectorizer.fit_transform(prompts)

    def answer(self, prompts: Sequence[str]) -> list[APICall]:
        """Nearest neighbours; of equally near ones the first."""
        if not len(prompts):  # scikit-learn refuses to transform nothing
            return []
        queries = self.vectorizer.transform(prompts)
        answers = []
        for start in range(0, len(prompts), 256):
            similarity = (queries[start : start + 256] @ self.matrix.T).toarray()
            answers += [self.calls[i] for i in similarity.argmax(axis=1)]
        return answers

    def ranked(self, prompts: Sequence[str], count: int) -> list[list[str]]:
        """The `count` nearest models for each prompt; see `nearest_models`."""
        if not len(prompts):
            return []
        models, queries, found = [call.model for call in self.calls], self.vectorizer.transform(prompts), []
        for start in range(0, len(prompts), 256):
            similarity = (queries[start : start + 256] @ self.matrix.T).toarray()
            found += nearest_models(similarity, models, count)
        return found


class EmbeddingNeighbour:
    """The call of the training prompt whose sentence embedding is nearest (cosine).

    Args:
        prompts: Training prompts.
        calls: Their calls.
        encoder: Name or folder of a sentence-transformers model, e.g. all-MiniLM-L6-v2.

    Raises:
        ImportError: Without sentence-transformers, naming the extra to install.
    """

    name = "embedding nearest neighbour"

    def __init__(self, prompts: Sequence[str], calls: Sequence[APICall], encoder: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                'The embedding baseline needs sentence-transformers: pip install "t2i-align[eval]".'
            ) from error
        self.calls = list(calls)
        self.encoder = SentenceTransformer(encoder, trust_remote_code=False)
        self.matrix = self._embed(prompts)

    def answer(self, prompts: Sequence[str]) -> list[APICall]:
        """Nearest neighbours; of equally near ones the first."""
        return [self.calls[i] for i in (self._embed(prompts) @ self.matrix.T).argmax(axis=1)]

    def ranked(self, prompts: Sequence[str], count: int) -> list[list[str]]:
        """The `count` nearest models for each prompt; see `nearest_models`."""
        models, queries, found = [call.model for call in self.calls], self._embed(prompts), []
        for start in range(0, len(prompts), 256):
            found += nearest_models(queries[start : start + 256] @ self.matrix.T, models, count)
        return found

    def _embed(self, prompts: Sequence[str]) -> np.ndarray[Any, Any]:
        return self.encoder.encode(list(prompts), batch_size=64, normalize_embeddings=True, show_progress_bar=True)


def nearest_models(similarity: np.ndarray[Any, Any], models: Sequence[str], count: int) -> list[list[str]]:
    """Models by the nearest of their training prompts; of equally near ones, the one that comes first in training.

    Args:
        similarity: Of each query to each training prompt. Shape (queries, prompts).
        models: Of each training prompt.
        count: Models for each query, or all if there are fewer.
    """
    names = list(dict.fromkeys(models))
    number = {name: index for index, name in enumerate(names)}
    of_prompt = np.array([number[name] for name in models])
    order = np.argsort(of_prompt, kind="stable")
    starts = np.searchsorted(of_prompt[order], np.arange(len(names)))
    nearest = np.maximum.reduceat(similarity[:, order], starts, axis=1)
    ranked = np.argsort(-nearest, axis=1, kind="stable")[:, :count]
    return [[names[i] for i in row] for row in ranked]
