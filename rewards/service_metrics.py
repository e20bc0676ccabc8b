"""Counters of the reward service in Prometheus' text format."""

import threading
from collections import defaultdict
from collections.abc import Mapping

from rewards.score_queue import BatchReport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper bounds of the histogram of pairs per batch."""

_HELP = {
    "requests_total": ("counter", "Score requests by HTTP status."),
    "request_seconds": ("summary", "Time from a request's head to its answer."),
    "pairs_total": ("counter", "Pairs of prompt and image that went through a scorer."),
    "images_total": ("counter", "Distinct images per batch that went through a scorer."),
    "row_errors_total": ("counter", "Pairs that could not be scored."),
    "batch_seconds": ("summary", "Time a scorer took for a batch."),
    "batch_pairs": ("histogram", "Pairs per batch."),
    "queue_requests": ("gauge", "Requests that wait for a scorer."),
    "in_flight_requests": ("gauge", "Requests accepted and not yet answered."),
}


class ServiceMetrics:
    """What happened since the service started; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (metric, sample's suffix, labels) -> value
        self._values: defaultdict[tuple[str, str, str], float] = defaultdict(int)

    def count_request(self, scorer: str, status: int, seconds: float) -> None:
        """A request was answered; `scorer` is empty if it asked for none that is served."""
        with self._lock:
            self._values["requests_total", "", _labels(scorer=scorer, status=str(status))] += 1
            self._add("request_seconds", scorer, seconds)

    def count_batch(self, scorer: str, batch: BatchReport) -> None:
        """A scorer finished a batch."""
        labels = _labels(scorer=scorer)
        with self._lock:
            self._values["pairs_total", "", labels] += batch.pairs
            self._values["images_total", "", labels] += batch.images
            self._values["row_errors_total", "", labels] += batch.row_errors
            self._add("batch_seconds", scorer, batch.seconds)
            for bound in (*BATCH_SIZES, "+Inf"):
                inside = bound == "+Inf" or batch.pairs <= bound
                self._values["batch_pairs", "_bucket", _labels(scorer=scorer, le=str(bound))] += inside
            self._add("batch_pairs", scorer, batch.pairs)

    def render(self, waiting: Mapping[str, int], in_flight: int) -> str:
        """Everything in the text format.

        Args:
            waiting: Requests in the queue of each scorer.
            in_flight: Requests of all scorers.
        """
        with self._lock:
            values = dict(self._values)
        values["in_flight_requests", "", ""] = in_flight
        for scorer, requests in waiting.items():
            values["queue_requests", "", _labels(scorer=scorer)] = requests
        lines = []
        for metric, (kind, text) in _HELP.items():
            samples = [f"t2i_reward_{m}{s}{labels} {v}" for (m, s, labels), v in values.items() if m == metric]
            lines += [f"# HELP t2i_reward_{metric} {text}", f"# TYPE t2i_reward_{metric} {kind}", *samples]
        return "\n".join(lines) + "\n"

    def _add(self, metric: str, scorer: str, value: float) -> None:
        self._values[metric, "_sum", _labels(scorer=scorer)] += value
        self._values[metric, "_count", _labels(scorer=scorer)] += 1


def _labels(**labels: str) -> str:
    pairs = (f'{name}="{value}"' for name, value in labels.items())  # names of scorers hold nothing to escape
    return f"{{{','.join(pairs)}}}"
