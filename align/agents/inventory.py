"""A catalogue as an agent uses it: what may be written under each filter, and what retrieval knows."""

from collections import OrderedDict
from functools import cached_property

from align.agents.filters import CallFilter, FilterError
from align.agents.retrieval import ModelRetriever
from align.agents.scoring import name_tokens
from rollouts.api import APICall
from rollouts.call_constraint import CallConstraint
from rollouts.call_grammar import GrammarError
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.costs import CostModel
from rollouts.dialogue import Dialogue
from rollouts.token_bytes import TokenBytes

KEPT_FILTERS = 256
"""Constraints that are kept, the last ones used."""


class Inventory:
    """A catalogue, and what is made of it when it is needed.

    Args:
        catalog: What can be called.
        default: The call to make when the policy is unsure.
        dialogue: Of the policy.
        tokens: Of its tokenizer.
        costs: What drawing costs, for `max_seconds`.
        examples: Prompts and the names of models they were used with.
    """

    def __init__(
        self,
        catalog: Catalog,
        default: APICall,
        dialogue: Dialogue,
        tokens: TokenBytes,
        costs: CostModel | None,
        examples: list[tuple[str, str]],
    ) -> None:
        self.catalog, self.default = catalog, default
        self._dialogue, self._tokens, self._costs, self._examples = dialogue, tokens, costs, examples
        self._constraints: OrderedDict[CallFilter, CallConstraint] = OrderedDict()
        self._columns = {name: column for column, name in enumerate(catalog)}
        self._any = CallConstraint.of_models(dialogue, catalog.values(), tokens=tokens)

    def entries(self, filter: CallFilter) -> list[CatalogEntry]:
        """What a filter leaves."""
        filter.check_names(self.catalog)
        return [entry for entry in self.catalog.values() if filter.admits(entry)]

    def constraint(self, filter: CallFilter) -> CallConstraint:
        """What may be written under a filter; the last ones are kept."""
        if filter not in self._constraints:
            try:
                made = CallConstraint.of_models(
                    self._dialogue, self.entries(filter), limits=filter.limits(self._costs), tokens=self._tokens
                )
            except GrammarError as error:
                raise FilterError(f"The filter leaves nothing to call. {error}") from error
            self._constraints[filter] = made
            if len(self._constraints) > KEPT_FILTERS:
                self._constraints.popitem(last=False)
        self._constraints.move_to_end(filter)
        return self._constraints[filter]

    def allows(self, call: APICall, filter: CallFilter) -> bool:
        """Whether a filter leaves this call, model and parameters."""
        grammar = self.constraint(filter).grammar
        state = grammar.advance(grammar.start, (grammar.lead + call.to_json()).encode())
        return state is not None and grammar.is_finished(state)

    def name_tokens(self, name: str) -> list[int]:
        """Of the beginning of a call of this model."""
        return name_tokens(self._any, [self.catalog[name]])[0]

    def column(self, name: str) -> int:
        """Of a model in the retriever's similarities."""
        return self._columns[name]

    @cached_property
    def retriever(self) -> ModelRetriever:
        """Of all models."""
        return ModelRetriever(self.catalog.values(), self._examples)
