"""HTML to text, sentences and cuts, with what strangers can put into a card."""

import time

import pytest

from align.bench.plain_text import html_to_text, split_sentences, truncate


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, ""),
        ("", ""),
        ("<p>One <b>bo</b>ld</p><p>Two<br />three</p>", "One bold\nTwo\nthree"),
        ("<ul><li>a</li><li>b</li></ul><td>c</td><td>d</td>", "a\nb\nc d"),
        ("<p>line\nbreak in HTML</p>", "line break in HTML"),
        ("line\nbreak in text", "line\nbreak in text"),
        ("a<script>alert('<p>')</script>b<STYLE>p {}</STYLE >c", "abc"),
        ("a<script>never closed", "a"),
        ("a<!-- hidden <p> -->b<!-- open", "ab"),
        ("Tom &amp; Jerry&nbsp;&#39;s caf&eacute; &amp;amp; twice", "Tom & Jerry 's café & twice"),
        ("&lt;script&gt;x&lt;/script&gt; &amp;lt;b&amp;gt;", "script x /script b"),
        ("1 < 2 > 0, I <3 u, ＜wide＞", "1 2 0, I 3 u, wide"),
        ("use &lt;lora:some_name:0.8&gt; or <lora:other:1> here", "use or here"),
        ("<a href=\"https://x.com/a>b\" title='>'>text</a>", "text"),
        ("<a href=it's>text</a> more", "text more"),
        ("See https://x.com/a_(b)?c=d. Then www.site.de/x, or ftp://h/f!", "See . Then , or !"),
        ("link(https://civitai.com/models/1) and github.com/a/b or my-site.co.uk/a", "link and or"),
        ("在这里https://t.me/+abc凯登定制", "在这里凯登定制"),
        ("mail me.first+x@mail.example.com, now", "mail , now"),
        ("Works with v1.5 e.g. Node.js and style.Art too", "Works with v1.5 e.g. Node.js and style.Art too"),
        ("a\x00b\x07c\u200bd\u202ee\ud800f\ufeffg", "abcdefg"),
        ("&#" + "9" * 5000 + "; &#x" + "f" * 50 + "; ok", "ok"),
        ("<p>tag at the cut</p><a hre", "tag at the cut\na hre"),
    ],
)
def test_html_to_text(source, expected):
    assert html_to_text(source) == expected


def test_what_stands_behind_the_limit_is_not_read_and_no_half_tag_is_left():
    assert html_to_text("<p>ab</p><a href='x'>", max_input_chars=15) == "ab"
    assert html_to_text("abcdef", max_input_chars=4) == "abcd"


@pytest.mark.parametrize(
    "unit",
    ["<", "<!", "<!--", "</", "<a ", "<a b='", '<a =">"', "<div>", "<script>", "&", "&#", "a.", "a@", "www.", "[ .",
     "x", "<a:", "https://a(", "! ", "。", "\u0300", "<p>word. ", "&amp;"],
)  # fmt: skip
def test_time_is_linear_in_the_input_whatever_it_is(unit):
    # html.parser of Python 3.11 needs minutes for some of these.
    start = time.process_time()
    text = html_to_text(unit * (1_000_000 // len(unit)))
    split_sentences(text)
    truncate(text, 240)
    assert time.process_time() - start < 1.5
    assert "<" not in text and ">" not in text


def test_twenty_megabytes_take_no_longer():
    source = "<p>A model for castles. <b>bold</b> &amp; more</p>" * 400_000
    start = time.process_time()
    text = html_to_text(source)
    assert time.process_time() - start < 1.0
    assert text.startswith("A model for castles. bold & more\nA model") and len(text) < 200_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Trained on v1.5 with 2.5D art, e.g. castles. Next", ["Trained on v1.5 with 2.5D art, e.g. castles.", "Next"]),
        ('He said "go." Then (see.) Done...', ['He said "go."', "Then (see.)", "Done..."]),
        ("画风可爱。适合人物！真的？是", ["画风可爱。", "适合人物！", "真的？", "是"]),
        ("「アニメ。」次の文", ["「アニメ。」", "次の文"]),
        ("a line\nanother. line", ["a line", "another.", "line"]),
        ("¿Qué es? Un modelo.", ["¿Qué es?", "Un modelo."]),
    ],
)
def test_split_sentences(text, expected):
    assert split_sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("short", 20, "short"),
        ("One sentence. Two sentence.", 20, "One sentence."),
        ("A. A long sentence that goes on", 20, "A. A long sentence"),  # the first sentence is too short to stand alone
        ("cut at, words", 9, "cut at"),
        ("x" * 30, 20, "x" * 20),
        ("这个模型适合画古风人物和山水背景", 8, "这个模型适合画古"),
        ("exactly twenty chars and", 20, "exactly twenty chars"),
    ],
)
def test_truncate_at_a_sentence_or_word(text, limit, expected):
    assert truncate(text, limit) == expected
