"""Which samples of each model are least like its others: ChatGen's initial test set (Sec. 3.1.3, "TestSet Split").

A sample is as distinct as 1 minus its BERTScore F1 with its nearest neighbour among the samples of its model. The paper
says no more than "about 20% most semantically distinct"; the nearest neighbour is what a test sample could be copied
from.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from align.evaluation.bert_score import BertScorer, Embedded, check_texts

SMALLEST_SPLIT = 3
"""Models with fewer samples give none to the test set."""
TEXTS_AT_ONCE = 1024
"""Texts that are embedded together; models are not divided, so a larger one is embedded by itself."""
SIMILARITIES_AT_ONCE = 1 << 24


class Distinctness(NamedTuple):
    """How distinct samples are, one entry each.

    Attributes:
        selected: Whether the sample is among the most distinct ones of its model.
        nearest_f1: BERTScore F1 with the nearest other sample of the model, 1 for equal texts; None without another.
        nearest: Number of that sample, of equally near ones the first; None without another.
    """

    selected: list[bool]
    nearest_f1: list[float | None]
    nearest: list[int | None]


def most_distinct(
    texts: Sequence[str], groups: Sequence[Hashable], share: float, scorer: BertScorer, *, shortlist: int = 32,
    exact_up_to: int = 128, eligible: Sequence[bool] | None = None, progress: bool = True,
) -> Distinctness:  # fmt: skip
    """Select about `share` of each model's samples, the most distinct ones first, of equally distinct ones the first.

    The result is the same for the same input. A text that another sample of its model has too is never selected.

    Args:
        texts: What is compared, one per sample.
        groups: Model of each sample; samples of different models are not compared.
        share: Of each model's samples, in (0, 1); see `quota`.
        scorer: If it has a baseline, F1 is rescaled; the selection is the same.
        shortlist: In a model with more distinct texts than `exact_up_to`, BERTScore is computed with so many nearest
            neighbours by sentence embedding (exact search, cosine). A neighbour that is missed makes a sample look more
            distinct than it is: of 1,000 real prompts, 32 have 96% of the nearest and select 98% alike.
        exact_up_to: Distinct texts of a model up to which all pairs are scored.
        eligible: Which samples may be selected, all by default; the others still count as neighbours and towards the
            number that the share is of. Empty texts, which are unlike everything, should not be.
        progress: Show a bar of samples.

    Raises:
        ValueError: Lengths that differ, an option out of range, or half a surrogate pair in a text.
        TypeError: Something that is no text.
    """
    eligible = [True] * len(texts) if eligible is None else eligible
    if not len(texts) == len(groups) == len(eligible):
        raise ValueError(
            f"Need a group and an eligibility per text, but got {len(texts)} texts, {len(groups)} groups and "
            f"{len(eligible)} eligibilities."
        )
    if not 0 < share < 1:
        raise ValueError(f"`share` must be between 0 and 1, e.g. 0.2, but got {share}.")
    if shortlist < 1 or exact_up_to < 0:
        raise ValueError(f"`shortlist` must be at least 1 and `exact_up_to` 0, but got {shortlist} and {exact_up_to}.")
    check_texts(texts)
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    result = Distinctness([False] * len(texts), [None] * len(texts), [None] * len(texts))
    with tqdm(total=len(texts), desc="comparing", unit="sample", disable=not progress) as bar:
        for packet in _packets(members.values()):
            samples = [number for group in packet for number in group]
            embedded = scorer.embed([texts[number] for number in samples])
            found = _nearest(embedded, [len(group) for group in packet], shortlist, exact_up_to)
            for text, (other, f1) in found.items():
                result.nearest_f1[samples[text]], result.nearest[samples[text]] = f1, samples[other]
            bar.update(len(samples))
    for group in members.values():
        distinct = [(f1, i) for i in group if eligible[i] and (f1 := result.nearest_f1[i]) is not None and f1 < 1]
        for _, number in sorted(distinct)[: quota(len(group), share)]:
            result.selected[number] = True
    return result


def quota(count: int, share: float) -> int:
    """How many samples a model gives to the test set: the nearest whole number to its share, halves upwards.

    Models with 1 or 2 samples give none, and none gives all; at a share of 0.2: 1 of 3 to 7, 2 of 8 to 12.
    """
    # 0.3 * 5 may come out as 1.4999999.
    return 0 if count < SMALLEST_SPLIT else min(math.floor(round(share * count, 9) + 0.5), count - 1)


def _packets(groups: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """Models whose samples are embedded together."""
    packet: list[list[int]] = []
    for group in groups:
        if packet and sum(map(len, packet)) + len(group) > TEXTS_AT_ONCE:
            yield packet
            packet = []
        packet.append(group)
    if packet:
        yield packet


def _nearest(
    embedded: Embedded, sizes: Sequence[int], shortlist: int, exact_up_to: int
) -> dict[int, tuple[int, float]]:
    """Nearest other text of its group and F1, of each text that has another; groups follow each other."""
    copies: list[list[int]] = []
    pairs, start = [torch.empty(2, 0, dtype=torch.long)], 0
    for size in sizes:
        with_row: defaultdict[int, list[int]] = defaultdict(list)
        for text, row in enumerate(embedded.rows[start : start + size].tolist(), start=start):
            with_row[row].append(text)
        copies += [same for same in with_row.values() if len(same) > 1]
        pairs.append(_pairs(embedded, torch.tensor([same[0] for same in with_row.values()]), shortlist, exact_up_to))
        start += size
    left, right = torch.cat(pairs, dim=1)
    f1 = embedded.score(left, right).f1.repeat(2).numpy()
    text, other = torch.cat([left, right]).numpy(), torch.cat([right, left]).numpy()
    order = np.lexsort((other, -f1, text))  # by text, then the nearest first, then the first
    best = order[np.unique(text[order], return_index=True)[1]]
    found = dict(zip(text[best].tolist(), zip(other[best].tolist(), f1[best].tolist(), strict=True), strict=True))
    for first, second, *more in copies:
        found |= {first: (second, 1.0), second: (first, 1.0)} | {text: (first, 1.0) for text in more}
    return found


def _pairs(embedded: Embedded, texts: Tensor, shortlist: int, exact_up_to: int) -> Tensor:
    """Pairs of a group's distinct texts that are scored, each once, the smaller number first. Shape (2, pairs)."""
    count = len(texts)
    if count <= max(exact_up_to, shortlist + 1):
        return texts[torch.triu_indices(count, count, 1)]
    vectors = embedded.sentences[embedded.rows[texts].to(embedded.sentences.device)]
    neighbours = []
    rows = max(1, SIMILARITIES_AT_ONCE // count)
    for start in range(0, count, rows):
        cosines = vectors[start : start + rows] @ vectors.T  # (rows, count)
        cosines.diagonal(start).fill_(-math.inf)
        neighbours.append(cosines.topk(shortlist, dim=1).indices.cpu())
    right = torch.cat(neighbours).flatten()
    left = torch.arange(count).repeat_interleave(shortlist)
    pairs = torch.unique(torch.minimum(left, right) * count + torch.maximum(left, right))
    return texts[torch.stack([pairs // count, pairs % count])]
