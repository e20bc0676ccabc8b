"""Tries and batches: every path spells its response, and a token sees its ancestors and nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.trainers.layouts import PackedLayout, PaddedLayout, build_trie, tree_mask

token = st.integers(0, 3)  # few tokens: many shared prefixes
responses = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=7)
prompts = st.lists(token, min_size=1, max_size=4)
random_tries = settings(max_examples=100, deadline=None, derandomize=True)


def ancestors(trie, place):
    """By the definition of `ends`, in order from the root."""
    return [i for i in range(len(trie.tokens)) if i <= place < trie.ends[i]]


@random_tries
@given(prompts, responses)
def test_every_path_spells_its_response(prompt, responses):
    trie = build_trie(prompt, responses)
    assert trie.tokens[: len(prompt)] == prompt
    for response, path in zip(responses, trie.paths, strict=True):
        assert [trie.edges[edge][1] for edge in path] == response
        for step, edge in enumerate(path):
            seen = ancestors(trie, trie.edges[edge][0])
            assert [trie.tokens[i] for i in seen] == prompt + response[:step]


@random_tries
@given(prompts, responses)
def test_positions_are_depths_and_nothing_is_computed_twice(prompt, responses):
    trie = build_trie(prompt, responses)
    assert trie.positions == [len(ancestors(trie, place)) - 1 for place in range(len(trie.tokens))]
    prefixes = {tuple(response[:length]) for response in responses for length in range(1, len(response) + 1)}
    followed = {prefix[:-1] for prefix in prefixes} - {()}
    assert len(trie.tokens) == len(trie.positions) == len(trie.ends) == len(prompt) + len(followed)
    assert len(trie.edges) == len(set(trie.edges)) == len(prefixes)


@random_tries
@given(prompts, responses)
def test_ranges_nest(prompt, responses):
    """The descendants of a token follow it directly; so the parent's range holds the child's."""
    trie = build_trie(prompt, responses)
    for place, end in enumerate(trie.ends):
        assert place < end <= len(trie.tokens)
        assert all(trie.ends[inside] <= end for inside in range(place, end))


def test_trie_by_hand():
    # 1 is followed by 2 and 3, of which 2 goes on; 4 ends at once.
    trie = build_trie([10, 11], [[1, 2, 5], [1, 3], [4], [1, 2, 6]])
    assert trie.tokens == [10, 11, 1, 2]
    assert trie.positions == [0, 1, 2, 3]
    assert trie.ends == [4, 4, 4, 4]
    assert trie.edges == [(1, 1), (2, 2), (3, 5), (3, 6), (2, 3), (1, 4)]
    assert trie.paths == [[0, 1, 2], [0, 4], [5], [0, 1, 3]]


def test_long_responses_are_no_problem():
    response = list(range(5000))
    trie = build_trie([7], [response, response[:4000]])
    assert len(trie.tokens) == 5000
    assert trie.paths[1] == trie.paths[0][:4000]


@pytest.mark.parametrize("layout", [PackedLayout, PaddedLayout])
def test_an_empty_prompt_predicts_nothing(layout):
    with pytest.raises(ValueError, match="must have at least one token, which predicts the first"):
        layout(0, 1)([{"prompt_ids": [], "responses": [[1, 2]], "rewards": [0.0]}])


def test_tree_mask_by_hand():
    # 0 - 1 - 2
    #       \ 3 - 4,  and padding at 5
    mask = tree_mask(torch.tensor([[5, 5, 3, 5, 5, 6]]))
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == expected


def test_packed_batch_by_hand():
    rows = [
        {"prompt_ids": [10, 11], "responses": [[1, 2, 9], [1, 3]], "rewards": [0.5, 1.5]},
        {"prompt_ids": [12], "responses": [[4]], "rewards": [2.5]},
    ]
    batch = PackedLayout(0, 3)(rows)
    assert batch["input_ids"].tolist() == [[10, 11, 1, 2], [12, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch["subtree_end"].tolist() == [[4, 4, 4, 4], [1, 2, 3, 4]]
    assert batch["heads"].tolist() == [1, 2, 3, 4]  # flat: the second row begins at 4
    assert batch["edge_heads"].tolist() == [0, 1, 1, 2, 3]
    assert batch["edge_tokens"].tolist() == [1, 2, 3, 9, 4]
    assert batch["paths"][batch["mask"]].tolist() == [0, 1, 3, 0, 2, 4]
    assert batch["mask"].sum(-1).tolist() == [[3, 2, 0], [1, 0, 0]]
    torch.testing.assert_close(
        batch["rewards"], torch.tensor([[0.5, 1.5, math.nan], [2.5, math.nan, math.nan]]), equal_nan=True
    )
    assert "attention_mask" not in batch


def test_padded_batch_by_hand():
    rows = [
        {"prompt_ids": [10, 11], "responses": [[1, 2, 9], [1, 3]], "rewards": [0.5, 1.5]},
        {"prompt_ids": [12], "responses": [[4]], "rewards": [2.5]},
    ]
    batch = PaddedLayout(0, 2)(rows)
    assert batch["input_ids"].tolist() == [[10, 11, 1, 2], [10, 11, 1, 0], [12, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch["heads"].tolist() == [1, 2, 3, 5, 6, 8]
    assert batch["edge_tokens"].tolist() == [1, 2, 9, 1, 3, 4]
    assert batch["edge_heads"].tolist() == [0, 1, 2, 3, 4, 5]
    assert "subtree_end" not in batch


@pytest.mark.parametrize("layout", [PackedLayout, PaddedLayout])
def test_edges_read_back_as_the_responses(layout, rows):
    batch = layout(0, 6)(rows)
    assert batch["mask"].shape == batch["paths"].shape == (3, 6, 5)
    tokens = batch["edge_tokens"][batch["paths"]]
    for prompt, row in enumerate(rows):
        for column in range(6):
            found = tokens[prompt, column][batch["mask"][prompt, column]].tolist()
            assert found == (row["responses"][column] if column < len(row["responses"]) else [])
    assert (batch["edge_heads"].diff() >= 0).all()
    assert (batch["heads"].diff() > 0).all()


@pytest.mark.parametrize("layout", [PackedLayout, PaddedLayout])
def test_gaps_and_reference_logps_are_filled_up(layout):
    rows = [
        {
            "prompt_ids": [10],
            "responses": [[1, 2], [3]],
            "rewards": [0.0, 1.0],
            "min_gap": [[0.0, 0.25], [0.25, 0.0]],
            "ref_token_logps": [[-1.0, -2.0], [-3.0]],
        },
        {
            "prompt_ids": [10],
            "responses": [[1, 2, 3]],
            "rewards": [0.0],
            "min_gap": [[0.0]],
            "ref_token_logps": [[-4.0, -5.0, -6.0]],
        },
    ]
    batch = layout(0, 2)(rows)
    assert batch["min_gap"].tolist() == [[[0.0, 0.25], [0.25, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    assert batch["ref_token_logps"].shape == batch["mask"].shape
    assert batch["ref_token_logps"][batch["mask"]].tolist() == [-1, -2, -3, -4, -5, -6]
    assert not batch["ref_token_logps"][~batch["mask"]].any()
    for row in rows:
        del row["min_gap"], row["ref_token_logps"]
    assert {"min_gap", "ref_token_logps"}.isdisjoint(layout(0, 2)(rows))


def test_packing_is_narrower_than_padding(rows):
    packed, padded = PackedLayout(0, 5)(rows), PaddedLayout(0, 5)(rows)
    # 7 + {5, 56, 567, 5678, 9}; 1 + {30, 30 31}; 12 + {11, 11 12}
    assert packed["subtree_end"].shape == (3, 14)
    assert packed["input_ids"].numel() < padded["input_ids"].numel() == 10 * 14
