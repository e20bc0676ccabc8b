"""Choosing a model without a language model: what the agents of ChatGen have to beat at their second step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.bench.chatgen.schema import chat_text
from align.evaluation.baselines import EmbeddingNeighbour, MostPopular, TfidfNeighbour
from align.evaluation.plan_results import result_row
from align.pairs import DataError
from rewards.commandline import ConfigError
from rollouts.api import APICall
from rollouts.catalog import Catalog

BASELINES = ("default", "popular", "tfidf", "embedding")
DEFAULT_MODEL = "default model"
_FIRST = 5


class DefaultModel:
    """Always the model of the default call."""

    name = DEFAULT_MODEL

    def __init__(self, call: APICall) -> None:
        self.call = call

    def ranked(self, prompts: Sequence[str], count: int) -> list[list[str]]:
        """The one model."""
        return [[self.call.model] for _ in prompts]


def make_choosers(
    names: Sequence[str], rows: Any, catalog: Catalog, default: APICall, *, encoder: str, learn_from: str = "chat",
) -> Iterator[Any]:  # fmt: skip
    """Baselines by the names that options have for them, each made when it is asked for.

    Args:
        names: Of `BASELINES`.
        rows: ChatGenBench's training split.
        catalog: What can be called.
        default: The default call, whose architecture `popular` chooses from.
        encoder: For `embedding`.
        learn_from: `chat`: what the user said, in all messages. `prompt`: the human-validated prompts, to which the
            words of a test chat are compared.

    Raises:
        DataError: There are no training rows that a neighbour could be looked for in.
        ConfigError: A package that is not installed.
    """
    known = [row for row in rows if row["model"] in catalog] if {"tfidf", "embedding"} & set(names) else []
    if {"tfidf", "embedding"} & set(names) and not known:
        raise DataError("No training row's model is in the catalogue; `baselines` tfidf and embedding need some.")
    texts = [row["prompt"] if learn_from == "prompt" else chat_text(row["messages"]) for row in known]
    calls = {name: catalog[name].default_call() for name in {row["model"] for row in known}}
    of_row = [calls[row["model"]] for row in known]
    for name in names:
        try:
            if name == "default":
                yield DefaultModel(default)
            elif name == "popular":
                yield MostPopular(catalog, default.base_model)
            elif name == "tfidf":
                yield TfidfNeighbour(texts, of_row)
            else:
                yield EmbeddingNeighbour(texts, of_row, encoder)
        except ImportError as error:
            raise ConfigError(str(error)) from error


def chosen_rows(
    chooser: Any, rows: Sequence[Mapping[str, Any]], shots: Mapping[str, int], catalog: Catalog
) -> list[dict[str, Any]]:
    """A chooser's rows of `plan_results`, with `version`, `version_top5` and `model` as plans have them.

    Args:
        chooser: Of `make_choosers`; it is asked what the user says in each chat.
        rows: Of ChatGenBench.
        shots: Demonstrations of each model.
        catalog: For models, of which the names are versions.
    """
    found = []
    ranked = chooser.ranked([chat_text(row["messages"]) for row in rows], _FIRST)
    for row, names in zip(rows, ranked, strict=True):
        steps = {
            "version": float(names[0] == row["model"]),
            "version_top5": float(row["model"] in names),
            "model": float(catalog[names[0]].model_id == row["source"]["model_id"]),
        }
        plan = {"model": names[0]}
        found.append(result_row(row, shots[row["model"]], stage="", method=chooser.name, plan=plan, steps=steps))
    return found
