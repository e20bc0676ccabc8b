"""Diversity where it matters: groups of beams have to differ in the model they name, and nowhere else.

    diversity = SlotDiversity.of_models(dialogue, catalog.of_architecture("SD 1.5"))
    diverse_beam_search(..., diversity=diversity)

On JSON responses the usual penalty hits whatever token differs first, mostly punctuation or the first letter of a name.
Here the names as they stand at the beginning of a response (`{"model": "NAME", "type": ...`) form a trie of tokens. The
penalty counts only at a node where the names part, and only beams that stand at that same node.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rollouts.catalog import CatalogEntry
from rollouts.dialogue import Dialogue


class SlotDiversity:
    """A `Diversity` of `rollouts.decoding` over given beginnings of a response. It keeps no state between calls.

    A beam that leaves the trie, for a name that nobody has or by other tokens for the same text, is outside the slot
    from then on, like one that has come to the end of a name.

    Args:
        beginnings: Token ids, from the first of the response to the end of the slot.
        constrain: Allow only tokens of the trie inside the slot, so that every name exists.

    Raises:
        ValueError: No beginnings, or an empty one.
    """

    def __init__(self, beginnings: Iterable[Sequence[int]], *, constrain: bool = False) -> None:
        self._constrain = constrain
        self._children: list[dict[int, int]] = [{}]  # of every node: token -> node
        self._depth = 0
        for tokens in beginnings:
            if not tokens:
                raise ValueError("`beginnings` must hold one token each at least, but one is empty.")
            self._add(tokens)
        if not self._depth:
            raise ValueError("`beginnings` holds none; a slot needs one name at least.")

    @classmethod
    def of_models(
        cls, dialogue: Dialogue, models: Iterable[CatalogEntry], *, constrain: bool = False
    ) -> "SlotDiversity":
        """The slot of the model in a canonical call, in the tokens of this dialogue.

        It goes on to the parameters, so that with `constrain` the type and base model are those of the model named.

        Raises:
            ValueError: No models.
            DialogueError: The tokenizer's template does not suit.
        """
        heads = [m.default_call().to_json().split('"width":', 1)[0] + '"width": ' for m in models]
        # Whole strings are tokenized, since tokens reach across quotes; what depends on the text that follows is cut.
        ways = (dialogue.response_ids([head + digit for head in heads]) for digit in "59")
        return cls((_common(*pair) for pair in zip(*ways, strict=True)), constrain=constrain)

    def places(self, generated: Tensor) -> Tensor:
        """The node of every row where at least two names part, -1 for the others. See `Diversity.places`."""
        nodes = (self._node(row) for row in self._rows(generated))
        places = [-1 if node is None or len(self._children[node]) < 2 else node for node in nodes]
        return torch.tensor(places, dtype=torch.long, device=generated.device)

    def constrain(self, generated: Tensor, logps: Tensor) -> Tensor:
        """With `constrain`, -inf for every token that leaves the trie. See `Diversity.constrain`."""
        if not self._constrain:
            return logps
        allowed = [(i, node) for i, row in enumerate(self._rows(generated)) if (node := self._node(row)) is not None]
        constrained = logps.clone()
        for row, node in allowed:
            if tokens := list(self._children[node]):
                constrained[row] = -torch.inf
                constrained[row, tokens] = logps[row, tokens]
        return constrained

    def _add(self, tokens: Sequence[int]) -> None:
        node = 0
        for token in tokens:
            if token not in self._children[node]:
                self._children[node][token] = len(self._children)
                self._children.append({})
            node = self._children[node][token]
        self._depth = max(self._depth, len(tokens))

    def _rows(self, generated: Tensor) -> list[list[int]]:
        return generated[:, : self._depth + 1].tolist() if generated.shape[1] else [[]] * len(generated)

    def _node(self, tokens: list[int]) -> int | None:
        """Where these tokens lead, or None outside the trie."""
        node: int | None = 0
        for token in tokens:
            if node is None:
                return None
            node = self._children[node].get(token)
        return node


def _common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The tokens that both begin with."""
    common = []
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        common.append(a)
    return common
