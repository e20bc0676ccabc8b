"""The grammar of calls beside a regular expression with partial matching; walks through it end in real calls."""

import random

import pytest
import regex

from rollouts.api import ARCHITECTURES, APICall
from rollouts.call_grammar import CallGrammar, CallLimits, GrammarError
from rollouts.catalog import Catalog
from rollouts.samplers import KNOWN_SAMPLERS


@pytest.fixture(scope="module")
def grammar(awkward_catalog):
    return CallGrammar(awkward_catalog.values(), lead=" ")


def walk(grammar, generator):
    """A random text of the grammar, byte by byte where there is a choice."""
    state, text = grammar.start, b""
    while True:
        forced, state = grammar.forced(state)
        text += forced
        if grammar.is_finished(state):
            return text, state
        byte, state = generator.choice(grammar.branches(state))
        text += bytes([byte])


def pattern(catalog):
    """All but the bound of width times height."""
    ends = {name: catalog[name].default_call().to_json() for name in catalog}
    numbers = r"(?:[1-9]|[12][0-9])(?:\.[0-9]?[1-9])?|30"
    steps = "|".join(map(str, range(1, 151)))
    calls = []
    for text in ends.values():
        head, tail = text.split('"width": ')[0], text.split(', "model description": ')[1]
        bounds = next(b for b in ARCHITECTURES.values() if f'"base Model": "{b.name}"' in head)
        side = "|".join(str(n) for n in range(bounds.min_side, bounds.max_side + 1) if n % 8 == 0)
        samplers = "|".join(map(regex.escape, sorted(KNOWN_SAMPLERS)))
        calls.append(
            f'{regex.escape(head)}"width": (?:{side}), "height": (?:{side}), "sampling method": "(?:{samplers})", '
            f'"sampling steps": (?:{steps}), "cfg scale": (?:{numbers}), "model description": {regex.escape(tail)}'
        )
    return regex.compile(" (?:" + "|".join(calls) + ")")


def test_walks_are_calls_of_the_catalogue_in_canonical_text(grammar, awkward_catalog):
    generator = random.Random(0)
    for _ in range(300):
        text, state = walk(grammar, generator)
        call = APICall.from_json(text.decode())
        assert text.decode() == " " + call.to_json()
        assert awkward_catalog.validate(call) == []
        assert call.model_description == awkward_catalog[call.model].description
        assert grammar.call(state) == call


def test_every_byte_is_allowed_or_not_as_a_regular_expression_says(grammar, awkward_catalog):
    expected = pattern(awkward_catalog)
    alphabet = sorted({*'{}"\\:, .0123456789abcDEx狐🦊ש'})
    generator = random.Random(1)
    checked = 0
    for _ in range(40):
        text, _ = walk(grammar, generator)
        whole = text.decode()
        for cut in sorted(generator.sample(range(len(whole)), 25)):
            for following in (*generator.sample(alphabet, 4), whole[cut]):
                tried = whole[:cut] + following
                matches = expected.fullmatch(tried, partial=True) is not None
                if matches and '"height": ' in tried:
                    continue  # the regular expression does not know how many pixels there may be
                state = grammar.advance(grammar.start, tried.encode())
                assert (state is not None) == matches, tried
                checked += 1
    assert checked > 2000


def test_bytes_one_by_one_lead_where_all_at_once_do(grammar):
    text, end = walk(grammar, random.Random(2))
    for start in range(0, len(text), 17):
        state = grammar.advance(grammar.start, text[:start])
        for byte in text[start:]:
            options = dict(grammar.branches(state)) if not grammar.forced(state)[0] else None
            following = grammar.advance(state, bytes([byte]))
            assert options is None or options[byte] == following
            state = following
        assert state == end
    assert grammar.advance(end, b" ") is None and grammar.branches(end) == [] and grammar.forced(end) == (b"", end)


def test_names_that_begin_others_part_at_the_quote(awkward_catalog):
    names = ["Pixel Wave - v1", "Pixel Wave - v10"]
    grammar = CallGrammar(awkward_catalog[name] for name in names)
    forced, state = grammar.forced(grammar.start)
    assert forced == b'{"model": "Pixel Wave - v1' and grammar.chosen_model(state) is None
    assert [byte for byte, _ in grammar.branches(state)] == [ord('"'), ord("0")]
    assert [grammar.chosen_model(after) for _, after in grammar.branches(state)] == names


def pixels_and_steps(entry, width, height, sampler, steps):
    return steps * width * height / 1e6 * (2 if sampler == "Heun" else 1)


def test_too_many_pixels_are_not_offered(awkward_catalog):
    grammar = CallGrammar([next(e for e in awkward_catalog.values() if e.base_model == "SD 1.5")])
    _, state = grammar.forced(grammar.start)
    for width, height, fits in ((1024, 1536, True), (1032, 1536, False), (1536, 1024, True), (512, 512, True)):
        found = grammar.advance(state, f'{width}, "height": {height}, '.encode())
        assert (found is not None) == fits, (width, height)


def test_limits_hold_whatever_is_chosen(awkward_catalog):
    limits = CallLimits(
        samplers=frozenset({"Heun", "Euler a"}), max_steps=40, max_seconds=3.0, seconds=pixels_and_steps
    )
    grammar = CallGrammar(awkward_catalog.values(), limits)
    generator, seen = random.Random(3), set()
    for _ in range(200):
        call = grammar.call(walk(grammar, generator)[1])
        seconds = pixels_and_steps(None, call.width, call.height, call.sampling_method, call.sampling_steps)
        assert seconds <= 3 and call.sampling_steps <= 40
        seen.add(call.sampling_method)
    assert seen == {"Heun", "Euler a"}


def test_what_is_too_slow_for_a_sampler_leaves_the_others(awkward_catalog):
    entry = next(e for e in awkward_catalog.values() if e.base_model == "SD 1.5")
    # 256 x 256 pixels in one step: 0.066 seconds, and 0.131 with Heun.
    limits = CallLimits(samplers=frozenset({"Heun", "Euler"}), max_seconds=0.1, seconds=pixels_and_steps)
    grammar = CallGrammar([entry], limits)
    for seed in range(5):
        assert grammar.call(walk(grammar, random.Random(seed))[1]).sampling_method == "Euler"


def test_errors_say_what_is_impossible(awkward_catalog):
    with pytest.raises(GrammarError, match="No model is left"):
        CallGrammar([])
    limits = CallLimits(max_seconds=0.001, seconds=pixels_and_steps)
    with pytest.raises(GrammarError, match=r"None of \d+ models draws a picture within 0.001 seconds"):
        CallGrammar(awkward_catalog.values(), limits)
    with pytest.raises(ValueError, match="`max_seconds` needs `seconds`"):
        CallLimits(max_seconds=1.0)
    with pytest.raises(ValueError, match="DDIM a"):
        CallLimits(samplers=frozenset({"DDIM a"}))
    with pytest.raises(ValueError, match="`samplers` is empty"):
        CallLimits(samplers=frozenset())
    with pytest.raises(ValueError, match="`max_steps` must be 1 to 150, but is 151"):
        CallLimits(max_steps=151)


def test_a_catalogue_of_one_model_is_decided_at_once(awkward_catalog):
    entry = next(iter(awkward_catalog.values()))
    grammar = CallGrammar(Catalog([entry]).values())
    assert grammar.chosen_model(grammar.start) == entry.name
    assert grammar.forced(grammar.start)[0].decode() == entry.default_call().to_json().split("512")[0]
