"""Plain text out of untrusted HTML, in time linear in its length.

The standard library's `html.parser` is not used: on Python 3.11 it needs 24 s for 200 kB of "<!--" and 7 minutes for
200 kB of "<a ".
"""

from __future__ import annotations

import html
import re

MAX_INPUT_CHARS = 200_000

# Never crosses the next "<", so that every character is looked at a bounded number of times. The second branch takes
# tags whose quotes do not match.
_TAG = re.compile(
    r"""<(?P<close>/?)(?P<name>[A-Za-z][^\s/<>"']*+|[!?/])(?:(?:[^<>"']++|"[^"<]*+"|'[^'<]*+')*+>|[^<>]*+>)"""
)
_DROPPED = {
    name: re.compile(f"</{name}", re.IGNORECASE)
    for name in ("script", "style", "template", "iframe", "svg", "textarea", "title")
}
_BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "br",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "html",
        "legend",
        "li",
        "main",
        "nav",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "tfoot",
        "thead",
        "tr",
        "ul",
    ]
)
_BREAK = "\0"  # stands for a line break until those of the source are dealt with
_SPACED = frozenset(("td", "th", "img", "video", "audio", "button", "option"))

# html.unescape raises ValueError on numbers of more than 4,300 digits; no character has more than 7.
_ENDLESS_REFERENCE = re.compile(r"&#(?:[0-9]{8,}+|[xX][0-9a-fA-F]{8,}+);?")
# <lora:name:0.8> and its kin call an extension of a web UI; they are no words.
_NETWORK_TAG = re.compile(r"<[a-zA-Z]{1,20}:[^<>\n]{1,200}>")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
_ANGLE_BRACKETS = re.compile("[<>\uff1c\uff1e\ufe64\ufe65]+")

_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]++@[A-Za-z0-9-]++(?:\.[A-Za-z0-9-]++)++")
# ASCII only: Chinese and Japanese sentences go on right after an address, without a blank.
_URL_CHARS = r"[A-Za-z0-9\-._~:/?#@!$&*+,;=%|]"
_URL_REST = rf"(?:{_URL_CHARS}|\({_URL_CHARS}*+\))*+"
_URL = re.compile(
    rf"(?:(?<![a-z])(?:https?|ftp)://|(?<![A-Za-z0-9.])www\.){_URL_REST}"
    rf"|(?<![A-Za-z0-9.@-])[A-Za-z0-9-]++(?:\.[A-Za-z0-9-]++)*+(?<=\.com|\.net|\.org)(?![A-Za-z0-9@-])(?:/{_URL_REST})?"
    # Elsewhere lower case is asked for: "style.Art" is more often two sentences than an address.
    r"|(?<![A-Za-z0-9.@-])[A-Za-z0-9-]++(?:\.[A-Za-z0-9-]++)*+"
    r"(?:(?<=\.(?:ai|be|cc|cn|co|de|fr|gg|io|jp|ly|me|ru|tv|uk))|(?<=\.(?:app|art|dev|xyz))|(?<=\.(?:info|site)))"
    rf"(?![A-Za-z0-9@-])(?:/{_URL_REST})?",
    re.ASCII,
)
_EMPTY_BRACKETS = re.compile(r"\([\s.,;:|/-]*+\)|\[[\s.,;:|/-]*+\]|（\s*+）|【\s*+】")

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_CJK_CHAR = re.compile(f"[{_CJK}]")
_SENTENCE_END = re.compile(r"""[.!?…]++["'”’)\]]*+(?=\s|$)|[。！？]++[.!?…。！？]*+["'”’)\]」』）】]*+""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:e\.g|i\.e|eg|ie|vs|approx|ver|vol|no|mr|mrs|ms|dr|st|inc|feat|[a-z])\.$", re.I
)


def html_to_text(source: str | None, max_input_chars: int = MAX_INPUT_CHARS) -> str:
    """Plain text of an HTML fragment or of text that should hold no HTML at all.

    Blocks become lines. Scripts, comments, addresses of web pages and e-mail, control and invisible characters are
    gone, entities are decoded, blanks collapsed. The result never holds an angle bracket, whatever was escaped.

    Args:
        source: Untrusted text; None is the empty text.
        max_input_chars: What stands behind is not read.
    """
    if not source:
        return ""
    cut = len(source) > max_input_chars
    if cut:
        source = source[:max_input_chars]
        last = source.rfind("<")
        if last > source.rfind(">"):  # the cut went through a tag
            source = source[:last]
    text = _strip_tags(source.replace(_BREAK, ""))
    for _ in range(3):  # cards copied from elsewhere are escaped twice
        decoded = html.unescape(_ENDLESS_REFERENCE.sub("", text))
        if decoded == text:
            break
        text = decoded
    text = _INVISIBLE.sub("", text)
    text = _ANGLE_BRACKETS.sub(" ", _NETWORK_TAG.sub(" ", text))
    text = _URL.sub(_sentence_end_of, _EMAIL.sub("", text))
    text = _EMPTY_BRACKETS.sub("", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def one_line(text: str) -> str:
    """The text with every run of blanks and line breaks as one blank."""
    return " ".join(text.split())


def short_line(source: str | None, max_chars: int = 200) -> str:
    """Untrusted text, such as a name or a tag, as one short plain line without punctuation around it."""
    return truncate(one_line(html_to_text(source, 20 * max_chars)), max_chars).strip(" ,;.:|/\\")


def split_sentences(text: str) -> list[str]:
    """The sentences of each line, in Latin and in Chinese and Japanese punctuation."""
    sentences: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in _sentence_ends(line):
            sentences.append(line[start:end].strip())
            start = end
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]


def truncate(text: str, max_chars: int) -> str:
    """The text cut to at most `max_chars` at the end of a sentence, else between two words.

    Only a single word longer than that is cut in the middle.
    """
    if len(text) <= max_chars:
        return text
    sentence = max((end for end in _sentence_ends(text[: max_chars + 1]) if end <= max_chars), default=0)
    if sentence >= 0.4 * max_chars:
        return text[:sentence].strip()
    for end in range(max_chars, 0, -1):
        # Between two Chinese or Japanese characters there is no blank, but a word may end.
        if text[end].isspace() or (_CJK_CHAR.match(text[end - 1]) and _CJK_CHAR.match(text[end])):
            shorter = text[:end].rstrip(" ,;:-–—/|(（[【、，；：&+")
            if shorter:
                return shorter
    return text[:max_chars]


def count_words(text: str) -> float:
    """Words of the text; two Chinese, Japanese or Korean characters count as one."""
    latin = _CJK_CHAR.sub(" ", text)
    return sum(any(c.isalpha() for c in word) for word in latin.split()) + len(_CJK_CHAR.findall(text)) / 2


def is_cjk(text: str) -> bool:
    """Whether at least half of the letters are Chinese, Japanese or Korean."""
    letters = sum(map(str.isalpha, text))
    return letters > 0 and 2 * len(_CJK_CHAR.findall(text)) >= letters


def _strip_tags(source: str) -> str:
    pieces: list[str] = []
    breaks = False
    position = 0
    while (start := source.find("<", position)) >= 0:
        pieces.append(source[position:start])
        if source.startswith("<!--", start):
            end = source.find("-->", start + 4)
            if end < 0:
                break
            position = end + 3
            continue
        tag = _TAG.match(source, start)
        if tag is None:
            pieces.append("<")
            position = start + 1
            continue
        name, position = tag["name"].lower(), tag.end()
        if name in _DROPPED and not tag["close"]:
            closing = _DROPPED[name].search(source, position)
            if closing is None:
                break
            position = closing.start()
        elif name in _BLOCKS:
            breaks = True
            pieces.append(_BREAK)
        elif name in _SPACED:
            pieces.append(" ")
    else:
        pieces.append(source[position:])
    text = "".join(pieces)
    # In HTML a line break is a blank; in text without blocks it is a line break.
    return (" ".join(text.splitlines()) if breaks else text).replace(_BREAK, "\n")


def _sentence_end_of(address: re.Match[str]) -> str:
    """What is left of an address: the punctuation of its sentence."""
    return address[0][len(address[0].rstrip(".,;:!?")) :]


def _sentence_ends(line: str) -> list[int]:
    ends = []
    for match in _SENTENCE_END.finditer(line):
        end = match.end()
        if not _ABBREVIATION.search(line, max(0, end - 12), end):
            ends.append(end)
    return ends
