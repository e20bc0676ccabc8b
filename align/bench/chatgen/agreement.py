"""What reviewers agree on, row by row (`outcome`, `apply_decisions`), and how far over all rows, corrected for chance.

A unit is what was rated (a row) as a mapping of raters to labels; whoever did not rate it is absent.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias

from align.bench.chatgen.review_store import Decision, Subject, content_hash, with_user_texts

Unit: TypeAlias = Mapping[str, Hashable]
State = Literal["keep", "edit", "drop", "conflict", "unreviewed"]
STATES: tuple[State, ...] = ("keep", "edit", "drop", "conflict", "unreviewed")


class Outcome(NamedTuple):
    """What comes of a row.

    Attributes:
        state: What the most reviewers want; conflict: none of it, unreviewed: not enough of them have decided.
        reason: Of a drop: the most frequent one.
        texts: Of an edit.
        settled: Somebody had the last word.
    """

    state: State
    reason: str | None = None
    texts: tuple[str, ...] | None = None
    settled: bool = False


class PairAgreement(NamedTuple):
    """How two reviewers agree on the rows that both rated.

    Attributes:
        first, second: Who; in alphabetical order.
        units: That both rated.
        percent: Share of them with the same label, in percent.
        kappa: Cohen's; None where it is not defined.
    """

    first: str
    second: str
    units: int
    percent: float
    kappa: float | None


def disagree(opinions: Iterable[Decision]) -> bool:
    """Whether some of the decisions about a row want something else: keep, drop, or this or that edit."""
    return len({decision.ballot for decision in opinions}) > 1


def outcome(opinions: Sequence[Decision], settlement: Decision | None = None, *, reviews: int = 1) -> Outcome:
    """What the decisions about a row come to.

    Keep, drop and each different edit have a vote per reviewer; the most votes win, and a tie for the first place is a
    conflict.

    Args:
        opinions: The last one of each reviewer.
        settlement: Overrides them.
        reviews: How many opinions are needed.
    """
    if settlement is not None:
        return Outcome(settlement.verdict, settlement.reason, settlement.texts, True)
    if not opinions or len(opinions) < reviews:
        return Outcome("unreviewed")
    votes = Counter(decision.ballot for decision in opinions).most_common()
    if len(votes) > 1 and votes[0][1] == votes[1][1]:
        return Outcome("conflict")
    (verdict, texts), _ = votes[0]
    reasons = Counter(decision.reason for decision in sorted(opinions, key=lambda d: d.number) if decision.reason)
    return Outcome(verdict, reasons.most_common(1)[0][0] if verdict == "drop" and reasons else None, texts)


def apply_decisions(
    rows: Iterable[Mapping[str, Any]],
    decisions: Iterable[Decision],
    *,
    reviews: int = 1,
    unreviewed: Literal["keep", "drop"] = "keep",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Keep, drop and edit rows as reviewers want it.

    Args:
        rows: As they were in the queue. Split, setting and source may be different.
        decisions: Of `load_decisions`. Those about another content of a row do not count.
        reviews: Opinions that a row needs, unless it is settled; see `outcome`.
        unreviewed: What to do with rows that have fewer.

    Returns:
        The rows that stay, in order, edited ones as copies; and counts: `rows`, `kept` (after all), `states` (of
        `STATES`; conflicts are dropped), `reasons` (of drops), `settled`, and `changed` (rows with decisions
        only about another content).
    """
    if unreviewed not in ("keep", "drop"):
        raise ValueError(f"`unreviewed` must be keep or drop, but is {unreviewed!r}.")
    opinions: dict[Subject, list[Decision]] = {}
    settled: dict[Subject, Decision] = {}
    for decision in decisions:
        if decision.settles:
            settled[decision.subject] = decision
        else:
            opinions.setdefault(decision.subject, []).append(decision)
    known = {row for row, _ in opinions.keys() | settled.keys()}
    kept, states, reasons, counts = [], Counter(), Counter(), Counter()
    for row in rows:
        subject = (row["id"], content_hash(row))
        result = outcome(opinions.get(subject, []), settled.get(subject), reviews=reviews)
        states[result.state] += 1
        reasons.update([result.reason] if result.reason else [])
        counts["rows"] += 1
        counts["settled"] += result.settled
        counts["changed"] += row["id"] in known and subject not in opinions and subject not in settled
        if result.state == "edit":
            kept.append({**row, "messages": with_user_texts(row["messages"], result.texts or ())})
        elif result.state == "keep" or (result.state == "unreviewed" and unreviewed == "keep"):
            kept.append(dict(row))
    return kept, {
        "rows": counts["rows"],
        "kept": len(kept),
        "states": {state: states[state] for state in STATES},
        "reasons": dict(reasons.most_common()),
        "settled": counts["settled"],
        "changed": counts["changed"],
    }


def percent_agreement(units: Iterable[Unit]) -> float | None:
    """Of all pairs of labels given to the same unit, the percentage that are equal; None: there are no pairs."""
    same = pairs = 0
    for unit in units:
        counts = Counter(unit.values())
        same += sum(count * (count - 1) for count in counts.values())
        pairs += len(unit) * (len(unit) - 1)
    return 100 * same / pairs if pairs else None


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (1960), (p_o - p_e) / (1 - p_e), of two raters' labels of the same things.

    Args:
        first, second: Labels, one for each thing, in the same order.

    Returns:
        1 if all are equal, 0 if they agree as often as chance would have it, with each rater's own shares of the
        labels. None without things, and if both raters gave one and the same label to all: that is 0 / 0.
    """
    if len(first) != len(second):
        raise ValueError(f"`first` and `second` must be as long as each other, but are {len(first)} and {len(second)}.")
    n = len(first)
    counts, others = Counter(first), Counter(second)
    # Times n squared, so that the sums are whole numbers and 0 is exactly 0.
    observed = n * sum(a == b for a, b in zip(first, second, strict=True))
    expected = sum(count * others[label] for label, count in counts.items())
    return (observed - expected) / (n * n - expected) if n * n != expected else None


def krippendorffs_alpha(units: Iterable[Unit]) -> float | None:
    """Krippendorff's alpha (2011) for nominal labels, any number of raters, and raters who left units out.

    alpha = 1 - D_o / D_e from the matrix of coincidences: a unit with m labels adds each ordered pair of them with the
    weight 1 / (m - 1); units with a single label add nothing.

    Returns:
        1 if all agree, 0 for what chance would give. None without pairs, and if all labels are the same.
    """
    totals: Counter[Hashable] = Counter()
    disagreement = 0.0
    for unit in units:
        counts, m = Counter(unit.values()), len(unit)
        if m < 2:
            continue
        totals += counts  # a label's coincidences sum to its count: m - 1 partners of weight 1 / (m - 1)
        disagreement += (m * m - sum(count * count for count in counts.values())) / (m - 1)
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    return 1 - (n - 1) * disagreement / expected if expected else None


def pair_agreements(units: Iterable[Unit]) -> list[PairAgreement]:
    """Each two raters who have rated a unit both, by name."""
    units = list(units)
    raters = sorted({rater for unit in units for rater in unit})
    found = []
    for first, second in combinations(raters, 2):
        both = [(unit[first], unit[second]) for unit in units if first in unit and second in unit]
        if both:
            percent = 100 * sum(a == b for a, b in both) / len(both)
            kappa = cohens_kappa([a for a, _ in both], [b for _, b in both])
            found.append(PairAgreement(first, second, len(both), percent, kappa))
    return found
