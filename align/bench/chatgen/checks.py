"""What is wrong with a chat that a language model wrote: named checks, in the order in which they are tried.

Language models that play a role refuse, fall into another language, repeat their instructions or give back the very
prompt that they were to paraphrase. A chat that breaks a check is counted under its name and written anew.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from align.bench.chatgen.role_prompts import EXAMPLES, instructions
from align.bench.chatgen.schema import ChatTask
from align.bench.plain_text import one_line, truncate

MAX_WORDS = 80  # of a message; the paper asks for "as brief as possible"
MAX_REPEATS = 4  # of the same four words in one message
LEAKED_WORDS = 6  # in a row that also stand in the instructions
VERBATIM_SHARE, VERBATIM_WORDS, LONG_RUN_WORDS = 0.6, 5, 12
MIN_FOREIGN_PROBABILITY = 0.85
MAX_FOREIGN_LETTERS = 1 / 3
MIN_FUNCTION_WORDS = 0.15

_BEGINNING = 2000  # characters in which a refusal shows
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_REFUSAL = re.compile(
    r"\b(?:i(?:['’]m| am) (?:sorry|afraid),? (?:but )?(?:i |that )?(?:can|won|am unable|cannot|must)"
    r"|i (?:can(?:['’]t|not)|cannot|won['’]t|will not|am (?:unable|not able) to) (?:help|assist|create|generate|write"
    r"|provide|fulfil|comply|do that|produce)"
    r"|as an? (?:ai|artificial|(?:large )?language model)\b|(?:against|violates?) (?:my|our|the) (?:guideline|polic))",
    re.IGNORECASE,
)
_ROLE_TALK = re.compile(
    r"\b(?:role[- ]?play|persona\b|non[- ]?professional|professional prompt|user experience designer|freestyle query"
    r"|colloquial|you are playing|i am playing|here(?:['’]s| is) (?:a|an|the|your|my)\b[^.!?]{0,40}\b(?:query|prompt"
    r"|rewrite|version|message))|</?(?:prompt|model|picture)>|\{(?:role|prompt|model|example)",
    re.IGNORECASE,
)
_SYNTAX = re.compile(
    r"\([^()]*:\d+(?:\.\d+)?\s*\)|<\s*(?:lora|lyco|hypernet)|\bBREAK\b|\*\*|```|^\s*#|</?[a-z]+>|https?://"
    r"|\b(?i:masterpiece|best quality|uhd|negative prompt|cfg(?: scale)?|sampler|sampling steps|clip skip|lora"
    r"|trigger words?|checkpoint|stable diffusion)\b"
)
_FUNCTION_WORDS = re.compile(  # of English, chat spelling included
    r"\b(?:an?|the|i|you|me|my|we|it|is|am|are|was|be|can|could|would|will|do|does|did|have|has|of|in|on|at|to|for|with"
    r"|and|or|but|not|so|this|that|like|just|please|pls|want|need|make|draw|by|from|as|some|one|ur?|gimme)\b"
)
# Those that models answer in; with all 140, short texts are taken for rare ones.
_LANGUAGES = ["en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "uk", "cs", "sv", "da", "fi", "tr", "el", "ar"]
_LANGUAGES += ["he", "hi", "zh", "ja", "ko", "vi", "id", "th", "hu", "ro"]


@dataclass(frozen=True)
class Problem:
    """What a chat broke.

    Attributes:
        name: Of the check.
        detail: What it saw, in one line.
    """

    name: str
    detail: str


class Check(NamedTuple):
    """One reason to write a chat anew: what it says, and what it sees in a message (None: nothing)."""

    text: str
    sees: Callable[[str, ChatTask], str | None]


def problem_of(texts: Sequence[str], task: ChatTask) -> Problem | None:
    """The first check that a chat breaks, or `None`."""
    if len(texts) != len(task.targets):
        return Problem("wrong_turns", f"{len(texts)} messages instead of {len(task.targets)}")
    for name, check in CHECKS.items():
        for text in texts:
            if (seen := check.sees(text, task)) is not None:
                return Problem(name, truncate(one_line(seen), 120))
    return None


def _empty(text: str, task: ChatTask) -> str | None:
    return None if _words(text) else repr(text[:40])


def _refusal(text: str, task: ChatTask) -> str | None:
    found = _REFUSAL.search(text[:_BEGINNING])
    return text[found.start() :] if found else None


def _leaked_role_prompt(text: str, task: ChatTask) -> str | None:
    if found := _ROLE_TALK.search(text):
        return found[0]
    run = longest_common_run(_words(text), _words(instructions(task.role)))
    return " ".join(run) if len(run) >= LEAKED_WORDS else None


def _copied_example(text: str, task: ChatTask) -> str | None:
    said = {" ".join(_words(said)) for examples in EXAMPLES.values() for e in examples for said in e.said}
    words = " ".join(_words(text))
    return next((example for example in said if example in words), None)


def _verbatim_prompt(text: str, task: ChatTask) -> str | None:
    words = _words(text)
    for target in task.targets:
        wanted = _words(target)
        run = longest_common_run(words, wanted)
        if len(run) >= min(LONG_RUN_WORDS, max(VERBATIM_WORDS, VERBATIM_SHARE * len(wanted))):
            return " ".join(run)
    return None


def _names_model(text: str, task: ChatTask) -> str | None:
    # The title alone can be an everyday word, so it counts from two words on, and unless the prompt says it too.
    spoken = f" {' '.join(_words(text))} "
    title = " ".join(_words(task.demonstration.model.split(" - ")[0]))
    whole = " ".join(_words(task.demonstration.model))
    prompt = f" {' '.join(_words(task.demonstration.prompt))} "
    for name in {title, whole}:
        if " " in name and f" {name} " in spoken and f" {name} " not in prompt:
            return name
    return None


def _prompt_syntax(text: str, task: ChatTask) -> str | None:
    found = _SYNTAX.search(text)
    return found[0] if found else None


def _other_language(text: str, task: ChatTask) -> str | None:
    letters = [letter for letter in text if letter.isalpha()]
    foreign = sum(not letter.isascii() and ord(letter) > 0x24F for letter in letters)
    if foreign > MAX_FOREIGN_LETTERS * len(letters):
        return text
    words = _words(text)
    if len(words) < 3 or len(_FUNCTION_WORDS.findall(text.lower())) >= MIN_FUNCTION_WORDS * len(words):
        return None
    language, probability = _identifier().classify(text.lower())
    return f"{language}: {text}" if language != "en" and probability >= MIN_FOREIGN_PROBABILITY else None


def _too_long(text: str, task: ChatTask) -> str | None:
    count = len(_words(text))
    return f"{count} words" if count > MAX_WORDS else None


def _repeats_itself(text: str, task: ChatTask) -> str | None:
    words = _words(text)
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if not runs:
        return None
    run, count = runs.most_common(1)[0]
    return f"{count} times {' '.join(run)!r}" if count >= MAX_REPEATS else None


CHECKS: dict[str, Check] = {
    "empty": Check("no words", _empty),
    "refusal": Check("the language model refuses", _refusal),
    "too_long": Check(f"a message of more than {MAX_WORDS} words", _too_long),
    "leaked_role_prompt": Check("repeats what it was told to do, or speaks of its role", _leaked_role_prompt),
    "copied_example": Check("is one of the examples", _copied_example),
    "verbatim_prompt": Check("gives the professional prompt back", _verbatim_prompt),
    "names_model": Check("names the model", _names_model),
    "prompt_syntax": Check("words or signs that only professionals use", _prompt_syntax),
    "other_language": Check("not in English", _other_language),
    "repeats_itself": Check(f"the same four words {MAX_REPEATS} times or more", _repeats_itself),
}
EXPLANATIONS = {name: check.text for name, check in CHECKS.items()} | {
    "wrong_turns": "not as many messages as asked for",
    "endpoint_error": "the endpoint failed, again and again",
    "unusable_answer": "no chat completion, or no list of messages",
    "nothing_to_say": "the template finds nothing in the prompt that it can put into everyday words",
    "duplicate": "too near another chat of the same demonstration (BERTScore)",
}


def longest_common_run(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The longest run of words that two texts share. Time: the product of their lengths."""
    best, end = 0, 0
    lengths = [0] * (len(second) + 1)
    for word in first:
        previous = 0
        for j, other in enumerate(second, start=1):
            previous, lengths[j] = lengths[j], previous + 1 if word == other else 0
            if lengths[j] > best:
                best, end = lengths[j], j
    return list(second[end - best : end])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError('Checking languages needs py3langid: pip install "t2i-align[bench]".') from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES)
    return identifier
