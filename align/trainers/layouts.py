"""How ranked candidates are laid out as a batch of token rows: packed as a trie, or padded as one row per candidate.

The candidates of a prompt share the prompt and, being JSON, long prefixes. Packed, every distinct prefix is computed
once: prompt and trie are one row in depth-first order, a token sees exactly the tokens on its way to the root, and its
position is its depth. Log-probabilities and gradients are those of the padded layout, up to rounding.

Either way a batch names *edges*: a response token and the place that predicts it. A last token is never an input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]
"""What a layout makes. Rows R (prompts, or candidates), width W, prompts P, n candidates, T tokens of a response.

    rewards         (P, n) float32; NaN: no such candidate
    input_ids       (R, W)
    position_ids    (R, W)
    subtree_end     (R, W) packed only: a token at i is seen by those from i on to before subtree_end[i]
    attention_mask  (R, W) padded only
    heads           (H,) flat places in (R, W) where logits are needed
    edge_heads      (E,) index into `heads` of the place that predicts an edge, ascending
    edge_tokens     (E,) its token
    paths           (P, n, T) edges of each candidate's response
    mask            (P, n, T) which of them there are
    min_gap         (P, n, n) float32, if rows have one
    ref_token_logps (P, n, T) float32, if rows have them
"""


@dataclass
class Trie:
    """Prompt and responses as one row, in depth-first order.

    Attributes:
        tokens: Inputs: the prompt, then every response token that something follows.
        positions: Depth of each.
        ends: One past the last descendant of each.
        edges: (place that predicts it, token) of every distinct response prefix.
        paths: Edges of each response.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    edges: list[tuple[int, int]] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)


class _Node(NamedTuple):
    children: dict[int, "_Node"]
    ending: list[tuple[int, int]]
    """(response, its token number) of all that pass through."""


def build_trie(prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> Trie:
    """Lay out the responses to a prompt.

    Args:
        prompt: Token ids, at least one: something must predict the first response token.
        responses: Token ids with the end token; equal ones and prefixes of each other are fine.
    """
    if not prompt:
        raise ValueError("`prompt` must have at least one token, which predicts the first one of the responses.")
    root = _Node({}, [])
    for number, response in enumerate(responses):
        node = root
        for step, token in enumerate(response):
            node = node.children.setdefault(token, _Node({}, []))
            node.ending.append((number, step))
    trie = Trie(list(prompt), list(range(len(prompt))), [0] * len(prompt))
    trie.paths = [[0] * len(response) for response in responses]
    # Depth first by hand: responses are longer than Python's recursion limit allows.
    open_nodes = [(len(prompt) - 1, iter(root.children.items()))]
    while open_nodes:
        place, children = open_nodes[-1]
        item = next(children, None)
        if item is None:
            trie.ends[place] = len(trie.tokens)
            open_nodes.pop()
            continue
        token, node = item
        for number, step in node.ending:
            trie.paths[number][step] = len(trie.edges)
        trie.edges.append((place, token))
        if node.children:  # else nothing is predicted from it
            trie.tokens.append(token)
            trie.positions.append(trie.positions[place] + 1)
            trie.ends.append(0)
            open_nodes.append((len(trie.tokens) - 1, iter(node.children.items())))
    trie.ends[: len(prompt)] = [len(trie.tokens)] * len(prompt)
    return trie


class PackedLayout:
    """One row per prompt. A callable for a `DataLoader`'s `collate_fn`.

    Args:
        pad_token_id: Fills up rows; never looked at.
        num_candidates: Lists are filled up to this many, so that every batch has the same shape.
    """

    def __init__(self, pad_token_id: int, num_candidates: int):
        self.pad_token_id, self.num_candidates = pad_token_id, num_candidates

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows have `prompt_ids`, `responses`, `rewards`, and may have `min_gap` and `ref_token_logps`."""
        tries = [build_trie(row["prompt_ids"], row["responses"]) for row in rows]
        width = max(len(trie.tokens) for trie in tries)
        # Padding sees itself only: a row of a mask that sees nothing would be NaN.
        ends = [trie.ends + list(range(len(trie.ends) + 1, width + 1)) for trie in tries]
        batch = {
            "rewards": _rewards(rows, self.num_candidates),
            "input_ids": _pad([trie.tokens for trie in tries], width, self.pad_token_id),
            "position_ids": _pad([trie.positions for trie in tries], width, 0),
            "subtree_end": torch.tensor(ends),
        }
        edges = [(row * width + place, token) for row, trie in enumerate(tries) for place, token in trie.edges]
        starts = [sum(len(trie.edges) for trie in tries[:row]) for row in range(len(tries))]
        paths = [[[start + edge for edge in path] for path in t.paths] for start, t in zip(starts, tries, strict=True)]
        return batch | _edges(edges, paths, self.num_candidates) | _extras(rows, self.num_candidates)


class PaddedLayout:
    """One row per candidate, padded on the right: what models without tree masks need. Arguments as `PackedLayout`."""

    def __init__(self, pad_token_id: int, num_candidates: int):
        self.pad_token_id, self.num_candidates = pad_token_id, num_candidates

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """As `PackedLayout.__call__`."""
        # A list that is shorter than others adds no rows.
        sequences = [list(row["prompt_ids"]) + list(r)[:-1] for row in rows for r in row["responses"]]
        if not all(row["prompt_ids"] for row in rows):
            raise ValueError("`prompt_ids` must have at least one token, which predicts the first response token.")
        width = max(map(len, sequences))
        batch = {
            "rewards": _rewards(rows, self.num_candidates),
            "input_ids": _pad(sequences, width, self.pad_token_id),
            "position_ids": _pad([range(len(s)) for s in sequences], width, 0),
            "attention_mask": _pad([[1] * len(s) for s in sequences], width, 0),
        }
        edges: list[tuple[int, int]] = []
        paths: list[list[list[int]]] = []
        line = 0
        for row in rows:
            paths.append([])
            for response in row["responses"]:
                first = line * width + len(row["prompt_ids"]) - 1
                paths[-1].append(list(range(len(edges), len(edges) + len(response))))
                edges += [(first + step, token) for step, token in enumerate(response)]
                line += 1
        return batch | _edges(edges, paths, self.num_candidates) | _extras(rows, self.num_candidates)


def tree_mask(subtree_end: Tensor) -> Tensor:
    """Which token sees which: True at (row, 0, i, j) if j is i or an ancestor of i. Shape (R, 1, W, W).

    Args:
        subtree_end: See `Batch`. In depth-first order the descendants of j are the tokens from j on to its end.
    """
    places = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    seeing, seen = places.view(1, 1, -1, 1), places.view(1, 1, 1, -1)
    return (seen <= seeing) & (seeing < subtree_end[:, None, None, :])


def _edges(edges: list[tuple[int, int]], paths: list[list[list[int]]], num_candidates: int) -> Batch:
    """Edges sorted by where they are predicted, and the paths in terms of them."""
    order = sorted(range(len(edges)), key=lambda edge: edges[edge][0])
    rank = {edge: number for number, edge in enumerate(order)}
    heads = sorted({place for place, _ in edges})
    index = {place: number for number, place in enumerate(heads)}
    longest = max((len(path) for row in paths for path in row), default=0)
    lines = torch.zeros(len(paths), num_candidates, longest, dtype=torch.long)
    mask = torch.zeros(lines.shape, dtype=torch.bool)
    for row, of_prompt in enumerate(paths):
        for column, path in enumerate(of_prompt):
            lines[row, column, : len(path)] = torch.tensor([rank[edge] for edge in path], dtype=torch.long)
            mask[row, column, : len(path)] = True
    return {
        "heads": torch.tensor(heads, dtype=torch.long),
        "edge_heads": torch.tensor([index[edges[edge][0]] for edge in order], dtype=torch.long),
        "edge_tokens": torch.tensor([edges[edge][1] for edge in order], dtype=torch.long),
        "paths": lines,
        "mask": mask,
    }


def _rewards(rows: Sequence[Mapping[str, Any]], num_candidates: int) -> Tensor:
    rewards = torch.full((len(rows), num_candidates), torch.nan)
    for number, row in enumerate(rows):
        rewards[number, : len(row["rewards"])] = torch.tensor(row["rewards"], dtype=torch.float32)
    return rewards


def _extras(rows: Sequence[Mapping[str, Any]], num_candidates: int) -> Batch:
    batch: Batch = {}
    if all(row.get("min_gap") is not None for row in rows):
        gaps = torch.zeros(len(rows), num_candidates, num_candidates)
        for number, row in enumerate(rows):
            n = len(row["min_gap"])
            gaps[number, :n, :n] = torch.tensor(row["min_gap"], dtype=torch.float32)
        batch["min_gap"] = gaps
    if all(row.get("ref_token_logps") is not None for row in rows):
        longest = max(len(response) for row in rows for response in row["responses"])
        logps = torch.zeros(len(rows), num_candidates, longest)
        for number, row in enumerate(rows):
            for column, values in enumerate(row["ref_token_logps"]):
                logps[number, column, : len(values)] = torch.tensor(values, dtype=torch.float32)
        batch["ref_token_logps"] = logps
    return batch


def _pad(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows], dtype=torch.long)
