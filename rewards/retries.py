"""How long to wait before an HTTP request is tried again."""

import random
import re
import time
from datetime import UTC
from email.utils import parsedate_to_datetime


def retry_after(header: str | None, longest: float) -> float | None:
    """Seconds that a Retry-After header asks for (a number or an HTTP date), at most `longest`.

    None if it is absent, malformed, or not in the future: taking that at its word would turn retries into a burst.
    """
    if header is None:
        return None
    header = header.strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", header):
        seconds = float(header)
    else:
        try:
            date = parsedate_to_datetime(header)
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(seconds, longest) if seconds > 0 else None


def backoff(attempt: int, first: float, longest: float) -> float:
    """Seconds to wait after the `attempt`-th failure: between half and all of `first` · 2^(attempt - 1), capped."""
    return min(first * 2 ** (attempt - 1), longest) * random.uniform(0.5, 1.0)
