"""What people decided about the rows of a review, in an SQLite file that several processes write to.

Nothing in it is changed or deleted: a decision, a decision changed and an undo are each one entry more. What stands
follows from reading the entries in order (`Standing`). An entry is on the disk before anybody is told that it is kept.
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rollouts.store_index import set_wal, transaction

Verdict: TypeAlias = Literal["keep", "drop", "edit"]
VERDICTS: tuple[Verdict, ...] = ("keep", "drop", "edit")
REASONS: Mapping[str, str] = {
    "inappropriate": "offends, or is no picture for everybody",
    "irrelevant": "does not ask for what the target prompt draws",
    "unnatural": "nobody talks like this",
    "professional": "repeats the target prompt instead of asking freely",
    "picture": "its picture is missing, wrong or not what it talks about",
    "other": "anything else",
}
"""Why a row is dropped. The first two are ChatGen's (Sec. 3.1.3), the others ours."""

Subject: TypeAlias = tuple[str, str]
"""What is decided on: the id of a row and the hash of its content."""

APPLICATION_ID = 0x74327276  # "t2rv"
VERSION = 1
_NOT_CONTENT = ("split", "setting", "source")
_SCHEMA = (
    "CREATE TABLE entries ("
    " number INTEGER PRIMARY KEY AUTOINCREMENT,"
    " row TEXT NOT NULL,"
    " content TEXT NOT NULL,"
    " reviewer TEXT NOT NULL,"
    " verdict TEXT NOT NULL,"  # keep, drop, edit, undo
    " reason TEXT,"
    " texts TEXT,"  # JSON list
    " settles INTEGER NOT NULL,"
    " time REAL NOT NULL,"  # seconds since 1970
    " seconds REAL NOT NULL,"
    " undoes INTEGER REFERENCES entries)",
    "CREATE TABLE leases ("
    " reviewer TEXT PRIMARY KEY, row TEXT NOT NULL, content TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID",
)


class ReviewError(ValueError):
    """A review that can't be read or kept; the message names the file."""


@dataclass(frozen=True)
class Decision:
    """What a reviewer thinks of a row.

    Attributes:
        row: Its id.
        content: `content_hash` of what was looked at.
        reviewer: Who.
        verdict: keep, drop, or edit: keep with other words of the user.
        reason: One of `REASONS`; of a drop only.
        texts: The user's texts as they should be, in order; of an edit only.
        settles: It is the last word on a row that reviewers disagreed on.
        time: Seconds since 1970.
        seconds: Spent on it.
        number: Of the entry; 0: not stored yet.
    """

    row: str
    content: str
    reviewer: str
    verdict: Verdict
    reason: str | None = None
    texts: tuple[str, ...] | None = None
    settles: bool = False
    time: float = 0.0
    seconds: float = 0.0
    number: int = 0

    @property
    def subject(self) -> Subject:
        """What it is about."""
        return self.row, self.content

    @property
    def ballot(self) -> tuple[Verdict, tuple[str, ...] | None]:
        """Equal for decisions that want the same."""
        return self.verdict, self.texts

    def says_the_same(self, other: "Decision") -> bool:
        """Whether storing both would tell nothing that one does not."""
        return (self.ballot, self.reason) == (other.ballot, other.reason)


def content_hash(row: Mapping[str, Any]) -> str:
    """Of everything in a row that a reviewer judges; split, setting and source may change without another review.

    Numbers and missing values count alike in JSON and in Arrow: 7 is 7.0, and null is as good as absent.
    """
    content = {key: value for key, value in row.items() if key not in _NOT_CONTENT}
    return hashlib.sha256(json.dumps(_canonical(content), sort_keys=True).encode()).hexdigest()


def user_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What an edit may change: the text parts of the user's messages, in order."""
    return [
        part["text"] for entry in messages if entry["role"] == "user" for part in parts(entry) if part["type"] == "text"
    ]


def with_user_texts(messages: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """A copy of the messages that says `texts` instead of `user_texts(messages)`.

    Raises:
        ValueError: There is another number of them.
    """
    if len(texts) != (there := len(user_texts(messages))):
        raise ValueError(f"`texts` must be {there}, one for each text of the user, but are {len(texts)}.")
    new = iter(texts)
    return [
        dict(entry)
        | {
            "content": [
                dict(part) | ({"text": next(new)} if entry["role"] == "user" and part["type"] == "text" else {})
                for part in parts(entry)
            ]
        }
        for entry in messages
    ]


def parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The content of a message as a list of parts, also where it is one text."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


class Standing:
    """What stands after some entries.

    Attributes:
        opinions: The last decision of each reviewer who has one, by subject; without settlements.
        last: Number of the last entry that was read.
    """

    def __init__(self) -> None:
        self.opinions: dict[Subject, dict[str, Decision]] = {}
        self.last = 0
        self._settled: dict[Subject, list[Decision]] = {}
        self._trails: dict[str, dict[int, Decision]] = {}  # decisions that were not undone, by number

    def add(self, decision: Decision) -> None:
        """Read the next decision."""
        self.last = decision.number
        self._trails.setdefault(decision.reviewer, {})[decision.number] = decision
        if decision.settles:
            self._settled.setdefault(decision.subject, []).append(decision)
        else:
            self.opinions.setdefault(decision.subject, {})[decision.reviewer] = decision

    def undo(self, number: int, reviewer: str, undone: int) -> None:
        """Read the next entry, by which a reviewer takes a decision back: the one before it stands again."""
        self.last = number
        decision = self._trails[reviewer].pop(undone)
        if decision.settles:
            self._settled[decision.subject].remove(decision)
            return
        del self.opinions[decision.subject][reviewer]
        if not self.opinions[decision.subject]:
            del self.opinions[decision.subject]
        earlier = [d for d in self._trails[reviewer].values() if d.subject == decision.subject and not d.settles]
        if earlier:
            self.opinions.setdefault(decision.subject, {})[reviewer] = earlier[-1]

    def settlement(self, subject: Subject) -> Decision | None:
        """The last word on it, if anybody has spoken it."""
        return settled[-1] if (settled := self._settled.get(subject)) else None

    def trail(self, reviewer: str) -> list[Decision]:
        """What a reviewer decided and did not take back, oldest first; also what was decided otherwise later."""
        return list(self._trails.get(reviewer, {}).values())

    def reviewers(self) -> list[str]:
        """Everybody who has an opinion, in the order of their first decision."""
        return [name for name, trail in self._trails.items() if any(not d.settles for d in trail.values())]

    def decisions(self) -> Iterator[Decision]:
        """Every decision that counts: opinions, then settlements."""
        for opinions in self.opinions.values():
            yield from opinions.values()
        yield from (settled[-1] for settled in self._settled.values() if settled)


Choose: TypeAlias = Callable[[Standing, Mapping[str, Subject]], Subject | None]
"""What to lease, given what stands and who has leased what."""


class ReviewStore:
    """The file, shared by threads; any number of processes may have it open."""

    def __init__(
        self,
        path: str | Path,
        *,
        create: bool = True,
        busy_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open it.

        Args:
            path: Of the SQLite file.
            create: Make it if it is not there.
            busy_seconds: How long to wait for another process that writes.
            clock: Seconds since 1970.

        Raises:
            ReviewError: It is not there, or not ours, or can't be opened.
        """
        self.path, self.clock = Path(path), clock
        self.standing = Standing()
        self._lock = threading.RLock()
        self._db = _open(self.path, create, busy_seconds)

    @contextmanager
    def reading(self) -> Generator[Standing]:
        """What stands now, with what other processes have written; it does not change inside the block."""
        with self._lock:
            self._catch_up()
            yield self.standing

    def record(self, decision: Decision) -> Decision:
        """Store a decision and end its reviewer's lease; the same one twice in a row is stored once."""
        with self._lock, transaction(self._db):
            self._catch_up()
            before = (
                self.standing.settlement(decision.subject)
                if decision.settles
                else self.standing.opinions.get(decision.subject, {}).get(decision.reviewer)
            )
            if before is not None and before.says_the_same(decision):
                return before
            decision = replace(decision, time=decision.time or self.clock())
            added = self._db.execute(
                "INSERT INTO entries(row, content, reviewer, verdict, reason, texts, settles, time, seconds) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    decision.row, decision.content, decision.reviewer, decision.verdict, decision.reason,
                    None if decision.texts is None else json.dumps(decision.texts), decision.settles,
                    decision.time, decision.seconds,
                ),
            )  # fmt: skip
            self._db.execute("DELETE FROM leases WHERE (reviewer, row, content) = (?, ?, ?)",
                             (decision.reviewer, *decision.subject))  # fmt: skip
        return replace(decision, number=added.lastrowid or 0)

    def undo(self, reviewer: str, among: Collection[Subject]) -> Decision | None:
        """Take back the last decision of a reviewer about one of some subjects, and return it; None: there is none."""
        with self._lock, transaction(self._db):
            self._catch_up()
            found = next((d for d in reversed(self.standing.trail(reviewer)) if d.subject in among), None)
            if found is not None:
                self._db.execute(
                    "INSERT INTO entries(row, content, reviewer, verdict, settles, time, seconds, undoes) "
                    "VALUES (?, ?, ?, 'undo', ?, ?, 0, ?)",
                    (*found.subject, reviewer, found.settles, self.clock(), found.number),
                )
        return found

    def lease(self, reviewer: str, seconds: float, choose: Choose) -> Subject | None:
        """Reserve what `choose` says for a reviewer, instead of what was reserved for them before.

        Args:
            reviewer: Who; has one lease at a time.
            seconds: Until it expires.
            choose: Called with what stands and with the leases that have not expired, also this reviewer's.
        """
        with self._lock, transaction(self._db):
            self._catch_up()
            now = self.clock()
            rows = self._db.execute("SELECT reviewer, row, content FROM leases WHERE expires > ?", (now,))
            subject = choose(self.standing, {name: (row, content) for name, row, content in rows})
            self._db.execute("DELETE FROM leases WHERE reviewer = ? OR expires <= ?", (reviewer, now))
            if subject is not None:
                self._db.execute("INSERT INTO leases VALUES (?, ?, ?, ?)", (reviewer, *subject, now + seconds))
        return subject

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _catch_up(self) -> None:
        """Read the entries since the last time: writers take turns, so none appears later with a smaller number."""
        entries = self._db.execute(
            "SELECT row, content, reviewer, verdict, reason, texts, settles, time, seconds, number, undoes "
            "FROM entries WHERE number > ? ORDER BY number", (self.standing.last,)
        )  # fmt: skip
        for *values, texts, settles, at, seconds, number, undoes in entries.fetchall():
            if undoes is not None:
                self.standing.undo(number, values[2], undoes)
                continue
            texts = None if texts is None else tuple(json.loads(texts))
            self.standing.add(Decision(*values, texts, bool(settles), at, seconds, number))


def load_decisions(database: str | Path) -> list[Decision]:
    """The decisions that count: of each reviewer the last one about each row, and the last settlement.

    Raises:
        ReviewError: There is no such database, or it is another program's.
    """
    store = ReviewStore(database, create=False)
    try:
        with store.reading() as standing:
            return list(standing.decisions())
    finally:
        store.close()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _open(path: Path, create: bool, busy_seconds: float) -> sqlite3.Connection:
    if not create and not path.is_file():
        raise ReviewError(f"There is no review database {path}; python -m align.bench.chatgen.review makes one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    except (sqlite3.Error, OSError) as error:
        raise ReviewError(f"The review database {path} can't be opened: {error}.") from error
    try:
        _prepare(db, path, busy_seconds)
    except sqlite3.Error as error:
        db.close()
        raise ReviewError(f"The review database {path} can't be used: {error}; name another file.") from error
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path, busy_seconds: float) -> None:
    _check(db, path)
    set_wal(db, busy_seconds)
    db.execute("PRAGMA synchronous = FULL")  # also a power failure loses nothing; people decide slowly enough
    with transaction(db):
        if _check(db, path) == 0:
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {VERSION}")


def _check(db: sqlite3.Connection, path: Path) -> int:
    """The version of the file, 0 if it is empty."""
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise ReviewError(f"{path} is an SQLite database of another program; name another file.")
    if (version := db.execute("PRAGMA user_version").fetchone()[0]) > VERSION:
        raise ReviewError(f"{path} was written by a later version of t2i-align ({version}); install that one.")
    return version
