"""The review behind HTTP: who may ask, what a page is told, and which files it may see.

Everything in a row was written by strangers. The page gets it as JSON and shows it as text; pictures are served by row
and number from one folder only, after they were decoded; addresses on the web are never fetched.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from align.bench.chatgen.review_store import REASONS, VERDICTS, Decision, Subject, user_texts
from rewards.gate import Answer, Gate, Refusal, refused
from rewards.gated_app import chunks, gated_app, response
from rewards.images import ImageError, load_image

if TYPE_CHECKING:
    from fastapi import FastAPI

    from align.bench.chatgen.review import Conflict, Hosts, ReviewQueue

logger = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer."""
JSON = "application/json"
PAGE = {
    "index.html": "text/html",
    "review.js": "text/javascript",
    "parts.js": "text/javascript",
    "review.css": "text/css",
}
PICTURES = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
"""Media type by Pillow's format: what browsers show. MPO is what Pillow calls JPEGs with a preview in them."""
MAX_PICTURE_BYTES = 2**25
MAX_PICTURE_PIXELS = 2**26
REVIEWER = re.compile(r"[^\W_](?:[\w .'-]{0,38}[\w.])?")
_FIELDS = {"reviewer", "row", "content", "verdict", "reason", "texts", "settles", "seconds"}


class ReviewService(Gate):
    """A queue behind a token, limits and checks of what is sent."""

    def __init__(
        self,
        queue: "ReviewQueue",
        *,
        hosts: "Hosts",
        images: Path | None = None,
        token: str | None = None,
        max_text_chars: int = 20_000,
        max_body_bytes: int = 2**20,
        max_queue: int = 64,
        body_timeout: float = 30.0,
    ) -> None:
        """Ready.

        Args:
            queue: What is reviewed.
            hosts: Names that requests may be for.
            images: Folder of the pictures; None: none is served.
            max_text_chars: Of an edited text.
            token, max_body_bytes, max_queue, body_timeout: See `Gate`.
        """
        super().__init__(max_body_bytes=max_body_bytes, max_queue=max_queue, token=token, body_timeout=body_timeout)
        self.queue, self.hosts, self.images, self.max_text_chars = queue, hosts, images, max_text_chars
        # Pictures can't send a header, so that browsers get a cookie for the token. Its name differs by token, because
        # cookies are shared by all ports of a host.
        digest = hmac.new((token or "").encode(), b"t2i-align review", hashlib.sha256).hexdigest()
        self.cookie_name, self._cookie = f"t2i-review-{digest[:8]}", digest[8:]

    def check(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> None:
        """Raise Refusal (401) unless the request carries the token, or the cookie that was given for it."""
        if not hmac.compare_digest(cookies.get(self.cookie_name, "").encode(), self._cookie.encode()):
            self.check_token(headers)

    def check_sender(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal unless a request that changes something is JSON from our own page or from no browser."""
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be sent as application/json")
        host = headers.get("host", "").lower()
        if headers.get("origin", f"http://{host}").lower() not in (f"http://{host}", f"https://{host}"):
            raise Refusal(403, "the request comes from the page of another site")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refusal(403, "the request comes from the page of another site")

    def session(self, value: Mapping[str, Any]) -> dict[str, str]:
        """`POST /session`: the header that sets the cookie, for the `token`."""
        token = value.get("token")
        self.check_token({"authorization": f"Bearer {token}" if isinstance(token, str) and token.isascii() else "?"})
        return {"Set-Cookie": f"{self.cookie_name}={self._cookie}; Path=/; HttpOnly; SameSite=Strict"}

    def setup(self, _: Mapping[str, str]) -> dict[str, Any]:
        """`GET /setup`: what the page needs to know."""
        return {
            "total": len(self.queue.rows), "reviews": self.queue.reviews, "max_text_chars": self.max_text_chars,
            "reasons": [{"name": name, "help": text} for name, text in REASONS.items()],
        }  # fmt: skip

    def next(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """`POST /next`: a `reviewer`'s turn."""
        reviewer = self._reviewer(value)
        subject = self.queue.next(reviewer)
        return {"row": subject and self._shown(subject), "mine": None, "progress": self.queue.progress(reviewer)}

    def decide(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """`POST /decide`: store a decision; `settles`: as the last word on a conflict."""
        if unknown := sorted(value.keys() - _FIELDS):
            raise Refusal(400, f"unknown field {unknown[0]!r:.60}; a decision may hold {', '.join(sorted(_FIELDS))}")
        reviewer, subject = self._reviewer(value), self._subject(value.get("row"))
        if value.get("content") != subject[1]:
            raise Refusal(409, "the row has changed since it was shown; look at it again")
        if (verdict := value.get("verdict")) not in VERDICTS:
            raise Refusal(400, f"`verdict` must be one of {', '.join(VERDICTS)}, but is {verdict!r:.40}")
        reason = value.get("reason")
        if reason not in (list(REASONS) if verdict == "drop" else [None]):
            raise Refusal(400, f"`reason` belongs to a drop, and is one of {', '.join(REASONS)}")
        seconds, settles = value.get("seconds", 0), value.get("settles", False)
        if type(seconds) not in (int, float) or not (math.isfinite(seconds) and 0 <= seconds <= 86_400):
            raise Refusal(400, f"`seconds` must be a number from 0 to 86400, but is {seconds!r:.40}")
        if not isinstance(settles, bool):
            raise Refusal(400, f"`settles` must be true or false, but is {settles!r:.40}")
        if settles and self.queue.conflict(subject) is None:
            raise Refusal(409, "reviewers do not disagree on this row, so that there is nothing to settle")
        decision = Decision(
            *subject, reviewer, verdict, reason, self._texts(value, subject), settles, seconds=float(seconds)
        )
        stored = self.queue.store.record(decision)
        return {"decision": asdict(stored), "progress": self.queue.progress(reviewer)}

    def undo(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """`POST /undo`: take back what a `reviewer` decided last, and show it again."""
        reviewer = self._reviewer(value)
        undone = self.queue.undo(reviewer)
        return {
            "row": undone and self._shown(undone.subject),
            "mine": undone and asdict(undone),
            "progress": self.queue.progress(reviewer),
        }

    def row(self, query: Mapping[str, str]) -> dict[str, Any]:
        """`GET /row?row=ID`: a row; what was decided on it is told only if reviewers disagree."""
        subject = self._subject(query.get("row"))
        conflict = self.queue.conflict(subject)
        return {"row": self._shown(subject), "conflict": conflict and _conflict(conflict)}

    def decided(self, query: Mapping[str, str]) -> dict[str, Any]:
        """`GET /decided?reviewer=NAME&before=N` or `after=N`: looking back; see `ReviewQueue.decided`."""
        reviewer = self._reviewer(query)
        numbers = {name: _number(query[name]) for name in ("before", "after") if query.get(name)}
        decision = self.queue.decided(reviewer, **numbers)
        return {
            "row": decision and self._shown(decision.subject),
            "mine": decision and asdict(decision),
            "progress": self.queue.progress(reviewer),
        }

    def conflicts(self, _: Mapping[str, str]) -> dict[str, Any]:
        """`GET /conflicts`: what reviewers disagree on."""
        return {"conflicts": [_conflict(conflict) for conflict in self.queue.conflicts()]}

    def statistics(self, _: Mapping[str, str]) -> dict[str, Any]:
        """`GET /statistics`: see `ReviewQueue.statistics`."""
        return self.queue.statistics()

    def picture(self, query: Mapping[str, str]) -> Answer:
        """`GET /image?row=ID&index=N`: the n-th picture of a row's messages, from 0."""
        messages = self.queue.shown(self._subject(query.get("row")))["messages"]
        addresses = [piece["address"] for entry in messages for piece in entry["parts"] if "image" in piece]
        index = _number(query.get("index", ""))
        path = find_picture(self.images, addresses[index]) if index < len(addresses) else None
        if path is None:
            raise Refusal(404, "there is no such picture")
        data, media = read_picture(path)
        return Answer(200, media, data, {"Cache-Control": "private, no-cache"})

    def close(self) -> None:
        """Close the database."""
        self.stopping = True
        self.queue.store.close()

    def _shown(self, subject: Subject) -> dict[str, Any]:
        row = self.queue.shown(subject)
        for piece in (piece for entry in row["messages"] for piece in entry["parts"] if "image" in piece):
            piece["served"] = find_picture(self.images, piece["address"]) is not None
            piece["address"] = piece["address"][:300]  # data: addresses hold whole pictures
        return row

    def _subject(self, row: Any) -> Subject:
        if not isinstance(row, str) or row not in self.queue.subjects:
            raise Refusal(404, "there is no such row")
        return self.queue.subjects[row]

    def _reviewer(self, value: Mapping[str, Any]) -> str:
        name = value.get("reviewer")
        if not isinstance(name, str) or not REVIEWER.fullmatch(name) or unicodedata.normalize("NFC", name) != name:
            raise Refusal(400, "a reviewer's name is up to 40 letters, digits, spaces and . _ ' -, a letter first")
        with self.queue.store.reading() as standing:
            others = [other for other in standing.reviewers() if other.casefold() == name.casefold() and other != name]
        if others:
            raise Refusal(409, f"there is a reviewer {others[0]} already: write the name so, or take another")
        return name

    def _texts(self, value: Mapping[str, Any], subject: Subject) -> tuple[str, ...] | None:
        texts = value.get("texts")
        if value.get("verdict") != "edit":
            if texts is not None:
                raise Refusal(400, "`texts` belong to an edit")
            return None
        before = user_texts(self.queue.rows[subject]["messages"])
        if not isinstance(texts, list) or len(texts) != len(before) or not all(isinstance(t, str) for t in texts):
            raise Refusal(400, f"`texts` must be a list of {len(before)} texts, those of the user's messages")
        if any(not text.strip() for text in texts):
            raise Refusal(422, "a text is empty; drop the row if nothing of it is of use")
        if any(len(text) > self.max_text_chars for text in texts):
            raise Refusal(413, f"a text has more than the {self.max_text_chars:,} characters allowed")
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise Refusal(422, "a text holds half a surrogate pair, which is no text")
        if texts == before:
            raise Refusal(422, "the texts are as they were; keep the row instead")
        return tuple(texts)


def find_picture(folder: Path | None, address: str) -> Path | None:
    """The file of a picture; None if it is an address, or there is no such file in the folder, links followed."""
    if folder is None or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", address):
        return None
    try:
        path = (folder / address).resolve(strict=True)
        inside = path.is_relative_to(folder.resolve(strict=True)) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
        return None
    return path if inside else None


def read_picture(path: Path) -> tuple[bytes, str]:
    """A picture's bytes and media type, once it has been decoded.

    Raises:
        Refusal: It can't be, is too large, or is of a format that browsers do not show.
    """
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            raise Refusal(413, f"the picture has more than {MAX_PICTURE_BYTES:,} bytes")
        data = path.read_bytes()
        image = Image.open(BytesIO(data), formats=[name for name in PICTURES if name != "MPO"])
        load_image(image, max_pixels=MAX_PICTURE_PIXELS)
    except ImageError as error:
        raise Refusal(415, f"the picture can't be shown: {str(error).rstrip('.')}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refusal(415, "the file is no picture that browsers show") from error
    return data, PICTURES[image.format or ""]


class Fence:
    """ASGI: refuses requests for other hosts, and puts `HEADERS` on every answer."""

    def __init__(self, app: Any, hosts: "Hosts") -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def fenced(event: Any) -> None:
            if event["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                event = event | {"headers": [*event.get("headers", ()), *more]}
            await send(event)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) == 1 and self.hosts.allow(hosts[0]):
            return await self.app(scope, receive, fenced)
        answer = refused(Refusal(403, "the server is not called by this name; see `allowed_hosts`"))
        return await response(answer)(scope, receive, fenced)


def build_app(service: ReviewService) -> "FastAPI":
    """The application with its routes: those of `PAGE`, and the methods of `ReviewService` as they say.

    Raises:
        ImportError: FastAPI is not installed.
    """
    app = gated_app("t2i-align review", service.close, lambda _, refusal: refused(refusal))
    from fastapi import Request
    from starlette.responses import Response

    app.add_middleware(Fence, hosts=service.hosts)

    def serve(path: str, answer: Answer) -> None:
        async def static(_: Request) -> Response:
            return response(answer)

        app.add_api_route(path, static)

    def get(path: str, ask: Callable[[Mapping[str, str]], Any]) -> None:
        async def asked(request: Request) -> Response:
            def answer() -> Answer:
                service.check(request.headers, request.cookies)
                found = ask(request.query_params)
                return found if isinstance(found, Answer) else _json(found)

            return response(await _answered(answer))

        app.add_api_route(path, asked)

    def post(path: str, act: Callable[[Mapping[str, Any]], Answer], *, open_to_all: bool = False) -> None:
        async def acted(request: Request) -> Response:
            service.check_sender(request.headers)
            if not open_to_all:
                service.check(request.headers, request.cookies)
            with service.admitted():
                value = _object(await service.receive(request.headers, chunks(request)))
                return response(await _answered(lambda: act(value)))

        app.add_api_route(path, acted, methods=["POST"])

    folder = files("align.bench.chatgen") / "review_page"
    for name, media in PAGE.items():
        page = Answer(200, f"{media}; charset=utf-8", (folder / name).read_bytes(), {"Cache-Control": "no-cache"})
        serve("/" if name == "index.html" else f"/{name}", page)
    serve("/favicon.ico", Answer(204, "image/x-icon", b"", {}))
    post("/session", lambda value: Answer(200, JSON, b"{}", service.session(value)), open_to_all=True)
    for act in (service.next, service.decide, service.undo):
        post(f"/{act.__name__}", lambda value, act=act: _json(act(value)))
    for ask in (service.setup, service.row, service.decided, service.conflicts, service.statistics):
        get(f"/{ask.__name__}", ask)
    get("/image", service.picture)
    return app


async def _answered(work: Callable[[], Answer]) -> Answer:
    """What the work, on a thread, comes to; errors as answers, so that they too have the headers of every answer."""
    try:
        return await asyncio.to_thread(work)
    except Refusal:
        raise
    except sqlite3.Error as error:
        logger.exception("The database can't be used.")
        return refused(Refusal(503, f"nothing was stored: {error}"))
    except Exception as error:  # a bug of ours
        logger.exception("The request could not be answered.")
        return refused(Refusal(500, f"{type(error).__name__} in the service; its log says more"))


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON ({error})"[:300]) from error
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, but is {type(value).__name__}")
    return value


def _json(value: Any) -> Answer:
    # ASCII, since a stranger's text may hold half a surrogate pair, which UTF-8 can't.
    return Answer(200, JSON, json.dumps(value).encode(), {"Cache-Control": "no-store"})


def _conflict(conflict: "Conflict") -> dict[str, Any]:
    return {
        "row": conflict.row["id"],
        "prompt": (conflict.row.get("prompt") or "")[:300],
        "opinions": [asdict(decision) for decision in conflict.opinions],
        "settlement": conflict.settlement and asdict(conflict.settlement),
    }


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise Refusal(400, f"a number is expected, but is {text!r:.40}")
    return int(text)
