"""Let people check the chats of a split: keep, drop, or edit them, in a local web page (ChatGen Sec. 3.1.3).

    python -m align.bench.chatgen.review --queue data/chatgen/review.jsonl --images data/chatgen --reviews 2

Open http://127.0.0.1:8500 and press ? for the keys. Each row goes to `reviews` reviewers; where they disagree, anybody
can settle it (key c). Several reviewers, and several servers with the same database on one machine, may work at once.
What they decided is applied by `load_decisions` and `apply_decisions`. The queue's lines are rows of ChatGenBench.

A reviewer's name is what they say it is. For others than yourself, set the environment variable T2I_ALIGN_TOKEN to a
secret, give --host, and pass both on; the page asks for the token once.
"""

import ipaddress
import json
import re
import socket
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from align.bench.chatgen import agreement
from align.bench.chatgen.agreement import STATES, apply_decisions, disagree, outcome
from align.bench.chatgen.review_app import ReviewService, build_app
from align.bench.chatgen.review_store import (
    REASONS,
    Decision,
    ReviewError,
    ReviewStore,
    Standing,
    Subject,
    content_hash,
    load_decisions,
    parts,
)
from rewards.commandline import ConfigError, run_command
from rewards.serve import bind, check_extra_is_installed, read_token, run

__all__ = ["ReviewConfig", "ReviewQueue", "apply_decisions", "load_decisions", "main", "read_queue"]


@dataclass
class ReviewConfig:
    """Options of `python -m align.bench.chatgen.review`."""

    queue: str = field(metadata={"help": "JSONL file of ChatGenBench rows, in the order in which they are asked."})
    database: str = field(default="review.sqlite", metadata={"help": "SQLite file of the decisions, on a local disk."})
    images: str | None = field(
        default=None, metadata={"help": "Folder that the paths of pictures lie in; none: paths are shown as text."}
    )
    reviews: int = field(default=1, metadata={"help": "Different reviewers that each row is shown to."})
    lease_seconds: float = field(
        default=600.0, metadata={"help": "Seconds for which a row that a reviewer looks at is kept from the others."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 and ::: every one."})
    port: int = field(default=8500, metadata={"help": "TCP port; 0: any free one, which is logged."})
    allowed_hosts: list[str] = field(
        default_factory=list,
        metadata={"help": "Further names under which browsers may call the server, with or without a port (proxies)."},
    )
    token_env: str = field(
        default="T2I_ALIGN_TOKEN", metadata={"help": "Environment variable with the token that reviewers must give."}
    )
    allow_no_token: bool = field(
        default=False, metadata={"help": "Serve without a token on other addresses than this machine's own."}
    )
    max_text_chars: int = field(default=20_000, metadata={"help": "Characters of an edited text."})
    max_body_bytes: int = field(default=2**20, metadata={"help": "Bytes of a request's body."})
    max_queue: int = field(default=64, metadata={"help": "Requests accepted at a time; more get 503."})
    body_timeout: float = field(default=30.0, metadata={"help": "Seconds in which a request's body must arrive."})

    def __post_init__(self) -> None:
        for name in ("reviews", "max_text_chars", "max_body_bytes", "max_queue"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"`port` must be from 0 to 65535, but is {self.port}.")
        for name in ("lease_seconds", "body_timeout"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` must be above 0, but is {value}.")


def main(config: ReviewConfig) -> None:
    """Serve the queue until SIGTERM or SIGINT."""
    check_extra_is_installed()
    token = read_token(config)
    rows = read_queue(config.queue)
    images = None if config.images is None else Path(config.images)
    if images is not None and not images.is_dir():
        raise ConfigError(f"`images` {images} is no folder.")
    listener = bind(config.host, config.port)
    store = ReviewStore(config.database)
    service = ReviewService(
        ReviewQueue(rows, store, reviews=config.reviews, lease_seconds=config.lease_seconds),
        images=images, hosts=Hosts(config.host, listener.getsockname()[1], config.allowed_hosts), token=token,
        max_text_chars=config.max_text_chars, max_body_bytes=config.max_body_bytes, max_queue=config.max_queue,
        body_timeout=config.body_timeout,
    )  # fmt: skip
    sys.exit(run(service, build_app(service), listener, f"{len(rows)} rows to review"))


class Hosts:
    """The names that a server answers to; another site can point its own name here (DNS rebinding)."""

    def __init__(self, host: str, port: int, allowed: Collection[str] = ()) -> None:
        """Names.

        Args:
            host: Address that is listened at.
            port: Likewise.
            allowed: Further ones; those without a port count on every port.
        """
        own = {host}
        self.any_address = host in ("0.0.0.0", "::")
        if self.any_address or host == "localhost" or _is_address(host, loopback=True):
            own |= {"127.0.0.1", "::1", "localhost"}
        if self.any_address:
            own.add(socket.gethostname())
        self.names = {_bracketed(name).lower() for name in own}
        self.port, self.allowed = str(port), {name.lower() for name in allowed}

    def allow(self, header: str) -> bool:
        """Whether this is one of them, as the header `Host` has it."""
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\s:\[\]/@,]+)(?::(\d+))?", header.lower())
        if match is None:
            return False
        name, port = match[1], match[2] or "80"
        if {name, header.lower()} & self.allowed:
            return True
        own = name in self.names or (self.any_address and _is_address(name.strip("[]")))
        return own and port == self.port


class Conflict(NamedTuple):
    """A row that reviewers disagree on."""

    row: Mapping[str, Any]
    opinions: list[Decision]
    settlement: Decision | None


class ReviewQueue:
    """Which row is whose turn, and how far the review is."""

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], store: ReviewStore, *, reviews: int = 1, lease_seconds: float = 600.0
    ) -> None:
        """Ready.

        Args:
            rows: With different ids, in the order in which they are asked.
            store: Of the decisions.
            reviews: Reviewers that each row is shown to.
            lease_seconds: For which a row that is looked at is kept from others.
        """
        self.store, self.reviews, self.lease_seconds = store, reviews, lease_seconds
        self.rows: dict[Subject, Mapping[str, Any]] = {(row["id"], content_hash(row)): row for row in rows}
        self.subjects: dict[str, Subject] = {subject[0]: subject for subject in self.rows}
        self._position = {subject: position for position, subject in enumerate(self.rows)}

    def next(self, reviewer: str) -> Subject | None:
        """Lease a reviewer the row that is their turn: what they have leased already, else what others began first.

        None if they have seen all that is left, or others are looking at it.
        """

        def choose(standing: Standing, leases: Mapping[str, Subject]) -> Subject | None:
            own = leases.get(reviewer)
            others = Counter(subject for name, subject in leases.items() if name != reviewer)
            best, begun = None, -1
            for subject in self.rows:
                opinions = standing.opinions.get(subject, {})
                if reviewer in opinions or standing.settlement(subject) is not None:
                    continue
                # Somebody who looks back at a row is counted already.
                looking = others[subject] - sum(leases.get(name) == subject for name in opinions)
                if len(opinions) + looking >= self.reviews:
                    continue
                if subject == own:
                    return subject
                if len(opinions) > begun:
                    best, begun = subject, len(opinions)
            return best

        return self.store.lease(reviewer, self.lease_seconds, choose)

    def lease(self, reviewer: str, subject: Subject) -> None:
        """Lease a reviewer a certain row."""
        self.store.lease(reviewer, self.lease_seconds, lambda *_: subject)

    def undo(self, reviewer: str) -> Decision | None:
        """Take back what a reviewer decided last; their turn is that row."""
        undone = self.store.undo(reviewer, self.rows.keys())
        if undone is not None:
            self.lease(reviewer, undone.subject)
        return undone

    def decided(self, reviewer: str, *, before: float = float("inf"), after: float = 0) -> Decision | None:
        """A reviewer's decision next to others: the last one with a number below `before`, or the first above `after`.

        Decisions that were replaced or taken back are passed over, settlements too.
        """
        with self.store.reading() as standing:
            stand = [
                d
                for d in standing.trail(reviewer)
                if d.subject in self.rows and standing.opinions.get(d.subject, {}).get(reviewer) is d
            ]
        if after:
            return next((d for d in stand if d.number > after), None)
        return next((d for d in reversed(stand) if d.number < before), None)

    def progress(self, reviewer: str) -> dict[str, int]:
        """Rows in all, those with enough decisions, this reviewer's, and conflicts that nobody has settled."""
        complete = mine = 0
        with self.store.reading() as standing:
            for subject, opinions in standing.opinions.items():
                if subject in self.rows:
                    complete += len(opinions) >= self.reviews or standing.settlement(subject) is not None
                    mine += reviewer in opinions
            conflicts = sum(conflict.settlement is None for conflict in self.conflicts())
        return {"total": len(self.rows), "complete": complete, "mine": mine, "conflicts": conflicts}

    def conflicts(self) -> list[Conflict]:
        """What reviewers disagree on: first what nobody has settled, each in the queue's order."""
        with self.store.reading() as standing:
            found = {
                subject: Conflict(self.rows[subject], self.opinions(standing, subject), standing.settlement(subject))
                for subject, opinions in standing.opinions.items()
                if subject in self.rows and disagree(opinions.values())
            }
        return [found[s] for s in sorted(found, key=lambda s: (found[s].settlement is not None, self._position[s]))]

    def conflict(self, subject: Subject) -> Conflict | None:
        """The conflict about one row, if there is one."""
        with self.store.reading() as standing:
            opinions = self.opinions(standing, subject)
            settlement = standing.settlement(subject)
        return Conflict(self.rows[subject], opinions, settlement) if disagree(opinions) or settlement else None

    @staticmethod
    def opinions(standing: Standing, subject: Subject) -> list[Decision]:
        """Of all reviewers about a row, oldest first."""
        return sorted(standing.opinions.get(subject, {}).values(), key=lambda decision: decision.number)

    def shown(self, subject: Subject) -> dict[str, Any]:
        """A row as the page needs it: all of it is text, pictures are numbered, `facts` are pairs of name and text."""
        row, numbers = self.rows[subject], count()
        messages = [
            {
                "role": entry["role"],
                "parts": [
                    {"text": part["text"]}
                    if part["type"] == "text"
                    else {"image": next(numbers), "address": part["image"]}
                    for part in parts(entry)
                ],
            }
            for entry in row["messages"]
        ]
        source = row.get("source") or {}
        reference, turns = source.get("reference"), source.get("turns")
        facts = {"Model": row.get("model"), "Base model": row.get("base_model")}
        facts |= {name.replace("_", " "): value for name, value in (row.get("arguments") or {}).items()}
        facts |= {"Picture shows": reference.get("prompt") if isinstance(reference, dict) else None}
        facts |= {"Kind of chat": row.get("input_type"), "Written by": row.get("generator")}
        return {
            "id": row["id"], "content": subject[1], "messages": messages, "role": row.get("role") or "",
            "prompt": row.get("prompt") or "", "negative_prompt": row.get("negative_prompt") or "",
            "turns": [str(turn) for turn in turns] if isinstance(turns, list) else [],
            "facts": [[name, str(value)] for name, value in facts.items() if value not in (None, "")],
        }  # fmt: skip

    def statistics(self) -> dict[str, Any]:
        """How far the review is, what was decided by whom, and how well reviewers agree on keep, drop and edit."""
        with self.store.reading() as standing:
            rows = {subject: self.opinions(standing, subject) for subject in self.rows}
            settled = {subject: standing.settlement(subject) for subject in self.rows}
            reviewers = standing.reviewers()
        outcomes = [outcome(rows[subject], settled[subject], reviews=self.reviews) for subject in rows]
        states, reasons = Counter(o.state for o in outcomes), Counter(o.reason for o in outcomes)
        units = [{decision.reviewer: decision.verdict for decision in opinions} for opinions in rows.values()]
        return {
            "rows": len(rows),
            "reviews": self.reviews,
            "states": {state: states[state] for state in STATES},
            "reasons": {reason: reasons[reason] for reason in REASONS},
            "settled": sum(o.settled for o in outcomes),
            "reviewers": [
                _person(name, [d for opinions in rows.values() for d in opinions if d.reviewer == name])
                for name in reviewers
            ],
            "agreement": {
                "units": sum(len(unit) > 1 for unit in units),
                "percent": agreement.percent_agreement(units),
                "krippendorffs_alpha": agreement.krippendorffs_alpha(units),
                "pairs": [pair._asdict() for pair in agreement.pair_agreements(units)],
            },
        }


def read_queue(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
        ReviewError: Naming the line that is no row, or has the id of an earlier one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ReviewError(f"Can't read `queue` {path}: {error}.") from error
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_row(row)
        except (ValueError, RecursionError) as error:
            raise ReviewError(f"{path}, line {number}: {error}") from error
        if row["id"] in rows:
            raise ReviewError(f"{path}, line {number}: the id {row['id']!r} has been there before.")
        rows[row["id"]] = row
    if not rows:
        raise ReviewError(f"`queue` {path} has no rows.")
    return list(rows.values())


def _person(name: str, decisions: Sequence[Decision]) -> dict[str, Any]:
    verdicts = Counter(decision.verdict for decision in decisions)
    seconds = [decision.seconds for decision in decisions]
    return {
        "name": name,
        "decisions": len(decisions),
        "keep": verdicts["keep"],
        "drop": verdicts["drop"],
        "edit": verdicts["edit"],
        "median_seconds": median(seconds) if seconds else None,
    }


def _check_row(row: Any) -> None:
    """Raise ValueError unless the page can show it."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not row["id"].strip():
        raise ValueError("a row must be a JSON object with a text `id`.")
    row["id"].encode()  # half a surrogate pair can't be stored
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError('`messages` must be a list of {"role": text, "content": text or parts}.')
    for name in ("prompt", "negative_prompt", "model", "role", "input_type", "base_model", "generator"):
        if not isinstance(row.get(name, ""), str | None):
            raise ValueError(f"`{name}` must be text, but is {type(row[name]).__name__}.")
    for name in ("arguments", "source"):
        if not isinstance(row.get(name, {}), dict | None):
            raise ValueError(f"`{name}` must be an object, but is {type(row[name]).__name__}.")


def _is_message(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        return False
    content = entry.get("content")
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(
            isinstance(part, dict) and part.get("type") in ("text", "image") and isinstance(part.get(part["type"]), str)
            for part in content
        )
    )


def _is_address(name: str, *, loopback: bool = False) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or not loopback


def _bracketed(name: str) -> str:
    return f"[{name}]" if ":" in name else name


if __name__ == "__main__":
    run_command(main, ReviewConfig, errors=(ReviewError,))
