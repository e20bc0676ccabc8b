"""The review page in a real browser, by keyboard only: two reviewers, an edit, a conflict, and hostile rows.

With T2I_ALIGN_SCREENSHOTS=folder, the pictures of the documentation are written there.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

from align.bench.chatgen.review import apply_decisions, read_queue
from align.bench.chatgen.review_store import load_decisions

pytest.importorskip("fastapi", reason="needs the extra `serve`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package `playwright` (no browser of its own)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PAYLOAD = (
    '"><img src=x onerror="window.pwned=1"><script>window.pwned=1;alert(1)</script>'
    '<iframe srcdoc="<script>parent.pwned=1</script>"></iframe><a href="javascript:window.pwned=1">x</a>'
    "<svg/onload=window.pwned=1>${window.pwned=1}{{constructor.constructor('window.pwned=1')()}}"
)


def message(role, text, *images):
    parts = [{"type": "text", "text": text, "image": None}]
    return {"role": role, "content": parts + [{"type": "image", "text": None, "image": image} for image in images]}


def row(name, *messages, **other):
    return {
        "id": name, "messages": list(messages), "input_type": "single", "role": "barista, 23", "generator": "template",
        "prompt": "a red fox asleep in the snow, watercolour, soft light, masterpiece, highly detailed",
        "negative_prompt": "lowres, blurry, watermark", "model": "Watercolour Dreams - v2", "base_model": "SD 1.5",
        "arguments": {"sampler": "DPM++ 2M Karras", "steps": 28, "cfg_scale": 6.5, "width": 512, "height": 768},
        "source": {"demonstration": name, "turns": []},
    } | other  # fmt: skip


FOX = row(
    "demo-17/0",
    message("user", "hey, can u do a fox sleeping in snow? kinda like this one but softer ☕", "fox.png"),
    message("assistant", "Here is a first version. What do you think?"),
    message("user", "cool, now more like watercolour and masterpiece, highly detailed plz"),
    input_type="history",
    source={"turns": ["a red fox asleep in the snow", "x"], "reference": {"image": "fox.png", "prompt": "a red fox"}},
)
CASTLE = row("demo-18/0", message("user", "I need a castle. That's all."), prompt="a castle on a hill, oil painting")
HOSTILE = row(
    f"demo-19/{PAYLOAD}",
    message(PAYLOAD, PAYLOAD, "https://evil.invalid/a.png", "../../etc/passwd"),
    message("user", PAYLOAD, "broken.png"),
    prompt=PAYLOAD, negative_prompt=PAYLOAD, model=PAYLOAD, role=PAYLOAD, generator=PAYLOAD, base_model=PAYLOAD,
    input_type=PAYLOAD, arguments={PAYLOAD: PAYLOAD},
    source={"turns": [PAYLOAD, PAYLOAD], "reference": {"prompt": PAYLOAD}},
)  # fmt: skip


def draw_fox(path):
    image = Image.new("RGB", (1152, 768), "#cfdde8")
    draw = ImageDraw.Draw(image)
    draw.ellipse((-200, 480, 1350, 1100), fill="#f7fafc")
    draw.ellipse((330, 360, 860, 650), fill="#c8602a")  # asleep
    draw.polygon([(345, 480), (330, 330), (430, 420)], fill="#a94c1f")
    draw.polygon([(455, 430), (480, 320), (540, 420)], fill="#a94c1f")
    draw.ellipse((310, 410, 560, 620), fill="#d9713a")
    draw.arc((350, 490, 410, 530), 0, 180, fill="#40200f", width=8)
    draw.ellipse((295, 545, 330, 575), fill="#40200f")
    draw.arc((380, 400, 960, 690), 340, 110, fill="#a94c1f", width=70)
    draw.ellipse((530, 610, 660, 700), fill="#fdf3ea")
    image.resize((384, 256)).save(path)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path):
    """Start the command on some rows; gives its URL, rows and database."""
    processes = []

    def start(*rows, token=None, reviews=2):
        folder = tmp_path / "pictures"
        folder.mkdir()
        draw_fox(folder / "fox.png")
        (folder / "broken.png").write_bytes(b"<script>window.pwned=1</script>")
        queue, database, log = tmp_path / "queue.jsonl", tmp_path / "review.sqlite", tmp_path / "log.txt"
        queue.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
        command = [sys.executable, "-m", "align.bench.chatgen.review", "--queue", queue, "--database", database,
                   "--images", folder, "--reviews", reviews, "--port", "0"]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "T2I_ALIGN_TOKEN"}
        environment |= {"T2I_ALIGN_TOKEN": token} if token else {}
        process = subprocess.Popen(list(map(str, command)), env=environment, stderr=log.open("w"))
        processes.append((process, log))
        deadline = time.monotonic() + 120
        while (match := re.search(r"at (http://\S+:\d+)\.$", log.read_text(), re.M)) is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return SimpleNamespace(url=match[1], queue=queue, database=database)

    yield start
    for process, log in processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and "Traceback" not in log.read_text(), log.read_text()


class Reviewer:
    """Somebody at a keyboard, in a browser of their own, who notes whatever a page should not do."""

    def __init__(self, browser, server, name, *, token=None, expected=(), **options):
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.page, self.faults, self.server, self.expected = self.context.new_page(), [], server, expected
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        self.page.on("popup", lambda page: self.faults.append(f"popup: {page.url}"))
        self.page.goto(server.url)
        self.page.keyboard.type(name)
        self.page.keyboard.press("Enter")
        if token:
            self.page.locator("#token-input").wait_for()
            self.page.keyboard.press("Tab")
            self.page.keyboard.type(token)
            self.page.keyboard.press("Enter")
        self.ready()

    def _console(self, entry):
        if entry.type in ("error", "warning") and not any(part in entry.text for part in self.expected):
            self.faults.append(f"console: {entry.text}")

    def _request(self, request):
        if urlsplit(request.url).netloc != urlsplit(self.server.url).netloc:
            self.faults.append(f"request: {request.url}")

    def ready(self):
        self.page.locator('body[data-busy="false"]').wait_for()

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)
            self.ready()

    def until(self, expression):
        # Not wait_for_function, which needs eval in the page: our policy forbids that.
        deadline = time.monotonic() + 20
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def leave(self):
        pwned = self.page.evaluate("window.pwned")
        self.context.close()
        assert pwned is None and self.faults == []


def screenshot(reviewer, name):
    if folder := os.environ.get("T2I_ALIGN_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        reviewer.page.screenshot(path=str(Path(folder) / name))


def test_two_reviewers_disagree_and_settle_it(browser, serve):
    server = serve(FOX, CASTLE)
    anna = Reviewer(browser, server, "anna")
    ben = Reviewer(browser, server, "ben", color_scheme="dark")
    assert anna.text("#progress") == "0 of 2, yours 0" and "sleeping in snow" in anna.text("#chat")
    assert "Watercolour Dreams" in anna.text("#target") and "DPM++ 2M Karras" in anna.text("#target")
    assert "barista, 23" in anna.text("#chat h2") and "a red fox asleep in the snow" in anna.text("#target ol")
    anna.until("document.querySelector('#chat img')?.naturalWidth === 384")
    screenshot(anna, "review-page.png")

    anna.press("e")  # the second text of the user repeats the prompt: anna changes it
    assert anna.page.locator("textarea").count() == 2
    anna.press("Tab", "Control+a")
    anna.page.keyboard.type("cool, now make it look like watercolour. k d u e ? are only letters here")
    anna.press("Escape")
    assert "masterpiece" in anna.text("#chat")  # left as it was
    anna.press("e", "Control+Enter")
    assert "Nothing is changed yet" in anna.text("#message")
    anna.press("Tab", "Control+a")
    anna.page.keyboard.type("cool, now make it look like watercolour")
    anna.press("Control+Enter")
    assert anna.text("#progress") == "0 of 2, yours 1" and "castle" in anna.text("#chat")

    assert "sleeping in snow" in ben.text("#chat")  # begun by anna
    ben.press("d", "2")
    assert ben.text("#progress") == "1 of 2, yours 1" and "Stored: drop, irrelevant" in ben.text("#message")
    ben.press("k")
    anna.press("k")
    assert anna.text("#progress") == "2 of 2, yours 2" and "Every row is done" in anna.text("#view")

    anna.press("c")
    assert "anna: edit · ben: drop, irrelevant" in anna.text("button.conflict")
    anna.press("Enter")
    assert "Reviewers disagree" in anna.text("#opinions")
    ben.press("c", "Enter")
    ben.until("document.querySelector('#chat img')?.naturalWidth === 384")
    screenshot(ben, "review-conflict.png")
    ben.press("Escape")
    anna.press("1")  # takes anna's own
    assert "Settled: edit" in anna.text("#message") and "Every row is done" in anna.text("#view")
    anna.press("s")
    assert anna.page.locator("table").nth(2).locator("tr").all_inner_texts()[1].split("\t")[:2] == ["anna", "2"]
    ben.press("c")
    assert "settled: edit" in ben.text("button.conflict")
    anna.leave()
    ben.leave()

    rows = read_queue(server.queue)
    kept, counts = apply_decisions(rows, load_decisions(server.database), reviews=2)
    assert counts["states"] == {"keep": 1, "edit": 1, "drop": 0, "conflict": 0, "unreviewed": 0}
    assert kept[0]["messages"][2]["content"][0]["text"] == "cool, now make it look like watercolour"
    assert kept[0]["messages"][:2] == rows[0]["messages"][:2] and kept[1] == rows[1]
    assert all(decision.seconds > 0 for decision in load_decisions(server.database))


def test_undo_looking_back_help_and_a_second_visit(browser, serve):
    server = serve(*(row(f"demo/{n}", message("user", f"chat number {n}")) for n in range(4)), reviews=1)
    anna = Reviewer(browser, server, "anna")
    anna.press("u")
    assert "nothing to take back" in anna.text("#message")
    anna.press("k", "d")
    assert anna.page.locator("#reason-dialog").is_visible()
    anna.press("Escape")  # does not drop it
    assert anna.text("#progress") == "1 of 4, yours 1"
    anna.press("d", "6", "u")
    assert "Taken back: drop, other" in anna.text("#message") and "number 1" in anna.text("#chat")
    anna.press("k", "ArrowLeft", "ArrowLeft")
    assert "number 0" in anna.text("#chat") and "You decided: keep" in anna.text("#chat")
    anna.press("ArrowLeft")
    assert "This was your first one" in anna.text("#message")
    anna.press("d", "1")  # decides anew
    assert "number 2" in anna.text("#chat") and anna.text("#progress") == "2 of 4, yours 2"
    anna.press("ArrowLeft")
    assert "You decided: drop, inappropriate" in anna.text("#chat")  # the newest decision comes first
    anna.press("ArrowRight")
    assert "number 2" in anna.text("#chat")
    anna.press("?")
    assert "keep the chat" in anna.text("#help")
    anna.press("k")  # the help is in front
    assert anna.text("#progress") == "2 of 4, yours 2"
    anna.press("Escape")
    anna.page.reload()
    assert anna.page.locator("#name-input").input_value() == "anna"
    anna.page.keyboard.press("Enter")
    anna.ready()
    assert "number 2" in anna.text("#chat")
    # Held or pressed twice, a key decides once.
    anna.page.evaluate(
        "[false, false, true].forEach((repeat) => "
        "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'k', repeat })))"
    )
    anna.until("document.querySelector('#chat').innerText.includes('number 3')")
    anna.ready()
    assert anna.text("#progress") == "3 of 4, yours 3"
    anna.page.keyboard.press("Tab")
    assert anna.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    anna.leave()
    assert {d.row: d.verdict for d in load_decisions(server.database)} == {
        "demo/0": "drop", "demo/1": "keep", "demo/2": "keep",
    }  # fmt: skip


def test_what_strangers_wrote_does_not_run(browser, serve):
    server = serve(HOSTILE)
    broken = "415 (Unsupported Media Type)"  # the browser itself notes that a picture could not be had
    people = [Reviewer(browser, server, name, expected=[broken]) for name in ("anna", "ben")]
    for reviewer in people:
        page = reviewer.page
        assert page.locator("#chat").inner_text().count("window.pwned=1") >= 4
        assert page.locator("#target").inner_text().count("window.pwned=1") >= 4
        page.locator("text=This picture can't be shown: broken.png").wait_for()
        assert page.locator("main :is(script, iframe, svg, a, img, [onerror])").count() == 0
        assert "Picture: https://evil.invalid/a.png" in reviewer.text("#chat")
    anna, ben = people
    anna.press("e", "Control+a")
    anna.page.keyboard.insert_text(PAYLOAD + "!")
    anna.press("Control+Enter")
    ben.press("k", "c", "Enter")
    assert "window.pwned=1" in ben.text("#opinions")
    assert ben.page.locator("main :is(script, iframe, svg, a, img, [onerror])").count() == 0
    ben.press("2", "s", "c")
    anna.press("ArrowLeft")
    assert "You decided: edit" in anna.text("#chat")
    # Nor would it run if it had got in: the policy forbids it.
    anna.expected = [broken, "Content Security Policy", "404 (Not Found)"]
    anna.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=/no onerror=\"window.pwned=1\">')")
    blocked = (
        "(source) => { const s = document.createElement('script'); s.textContent = source; document.body.append(s) }"
    )
    anna.page.evaluate(blocked, "window.pwned = 1")
    anna.page.wait_for_timeout(200)
    anna.leave()
    ben.leave()


def test_a_narrow_window_shows_all_of_it(browser, serve):
    server = serve(FOX)
    anna = Reviewer(browser, server, "Anna-Maria von und zu Hohenstein-Lang")
    for size in ((1280, 800), (800, 700), (420, 800)):
        anna.page.set_viewport_size({"width": size[0], "height": size[1]})
        beyond = anna.page.evaluate(
            "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
            ".map((e) => e.outerHTML)"
        )
        assert beyond == [], size
    anna.leave()


def test_the_token_is_asked_for_once(browser, serve):
    server = serve(FOX, token="s3cret")
    anna = Reviewer(browser, server, "anna", token="s3cret", expected=["401 (Unauthorized)"])
    anna.until("document.querySelector('#chat img')?.naturalWidth === 384")  # pictures too
    anna.page.reload()
    anna.page.keyboard.press("Enter")
    anna.ready()
    assert "sleeping in snow" in anna.text("#chat")
    anna.leave()


def test_a_server_that_is_gone_loses_nothing(browser, serve):
    server = serve(CASTLE, FOX, reviews=1)
    anna = Reviewer(browser, server, "anna", expected=["net::ERR_"])
    anna.page.route("**/decide", lambda route: route.abort())
    anna.press("k")
    assert "The server can't be reached, nothing was stored" in anna.text("#message") and "castle" in anna.text("#chat")
    anna.page.unroute("**/decide")
    anna.press("k")
    assert anna.text("#progress") == "1 of 2, yours 1"
    anna.leave()
