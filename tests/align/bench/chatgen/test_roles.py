"""Roles are data: many people, each with a way of speaking."""

from collections import Counter
from typing import get_args

from align.bench.chatgen.roles import EMOJI, MANNERS, QUIRKS, REPLIES, ROLES, Register


def test_more_than_a_hundred_people():
    assert len(ROLES) >= 100  # ChatGen Sec. 3.1.2: "over 100 roles from everyday life"
    assert len({role.trade for role in ROLES}) == len({role.name for role in ROLES}) == len(ROLES)
    assert {"doctor", "professor", "law student"} <= {role.trade for role in ROLES}  # the paper's examples
    assert ROLES[0].name == "kindergarten child, 5"


def test_of_all_ages():
    ages = [role.age for role in ROLES]
    assert min(ages) < 6 and max(ages) > 75
    assert all(sum(low <= age < low + 20 for age in ages) >= 10 for low in (0, 20, 40, 60))


def test_no_register_is_rare_or_rules():
    registers = Counter(role.register for role in ROLES)
    assert set(registers) == set(get_args(Register)) == set(MANNERS)
    assert min(registers.values()) >= 8 and max(registers.values()) < len(ROLES) / 2
    assert all(role.age <= 11 for role in ROLES if role.register == "childlike")


def test_quirks_are_known_and_all_are_somebodys():
    assert {quirk for role in ROLES for quirk in role.quirks} == set(QUIRKS)
    assert all(role.quirks and len(set(role.quirks)) == len(role.quirks) for role in ROLES)


def test_purposes_follow_it_is():
    assert all(role.purpose.startswith("for ") and not role.purpose.endswith(".") for role in ROLES)
    # Six words of what a language model is told in a row would be taken for a leak of it (`checks.LEAKED_WORDS`).
    assert max(len(role.purpose.split()) for role in ROLES) <= 5


def test_templates_have_their_slots_and_no_other():
    for manner in MANNERS.values():
        for text in (*manner.requests, *manner.likes, *manner.sames, *manner.changes):
            assert text.count("{") == text.count("{phrase}") + text.count("{Phrase}") == 1
        assert all("{purpose}" in text.lower() for text in manner.purposes)
        plain = (*manner.hedges, *manner.greetings, *manner.farewells, *manner.praises)
        assert not any("{" in text for text in plain)
    assert len(set(REPLIES)) == len(REPLIES) and len(set(EMOJI)) == len(EMOJI)
