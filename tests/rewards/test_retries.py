import time
from email.utils import formatdate

import pytest

from rewards.retries import backoff, retry_after


def test_a_number_or_a_date_says_how_long_to_wait():
    assert retry_after("2", 30.0) == 2.0
    assert retry_after(" 1.5 ", 30.0) == 1.5
    assert retry_after("3600", 30.0) == 30.0
    assert 8 < retry_after(formatdate(time.time() + 10, usegmt=True), 30.0) <= 10


@pytest.mark.parametrize(
    "header", [None, "", "0", "-1", "nan", "inf", "1e3", "soon", "9" * 400, "Mon, 01 Jan 2001 00:00:00 GMT"]
)
def test_a_header_that_is_no_use_is_none(header):
    assert retry_after(header, 30.0) is None


def test_waits_double_and_stay_below_the_longest():
    for attempt, most in ((1, 0.5), (2, 1.0), (3, 2.0), (20, 30.0)):
        waits = [backoff(attempt, 0.5, 30.0) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most
