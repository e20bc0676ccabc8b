"""Prometheus' text format: names, labels, cumulative buckets."""

import re

from rewards.score_queue import BatchReport
from rewards.service_metrics import ServiceMetrics


def samples(text):
    """Sample name with labels -> value; every line must be a comment or a sample."""
    found = {}
    for line in text.splitlines():
        if line.startswith("# "):
            assert re.fullmatch(r"# (HELP \w+ .+|TYPE \w+ (counter|gauge|summary|histogram))", line), line
        else:
            match = re.fullmatch(r'(\w+(?:\{(?:\w+="[^"]*",?)*\})?) (\S+)', line)
            assert match, line
            found[match[1]] = float(match[2])
    return found


def test_counts():
    metrics = ServiceMetrics()
    metrics.count_request("hps_v2", 200, 0.25)
    metrics.count_request("hps_v2", 200, 0.5)
    metrics.count_request("", 404, 0.0)
    metrics.count_batch("hps_v2", BatchReport(requests=2, pairs=5, images=3, row_errors=1, seconds=0.125))
    metrics.count_batch("hps_v2", BatchReport(requests=1, pairs=1000, images=1, row_errors=0, seconds=0.5))
    text = metrics.render({"hps_v2": 4}, in_flight=6)
    found = samples(text)
    label = '{scorer="hps_v2"}'
    assert found['t2i_reward_requests_total{scorer="hps_v2",status="200"}'] == 2
    assert found['t2i_reward_requests_total{scorer="",status="404"}'] == 1
    assert found[f"t2i_reward_request_seconds_sum{label}"] == 0.75
    assert found[f"t2i_reward_pairs_total{label}"] == 1005
    assert found[f"t2i_reward_images_total{label}"] == 4
    assert found[f"t2i_reward_row_errors_total{label}"] == 1
    assert found[f"t2i_reward_batch_seconds_sum{label}"] == 0.625
    assert found[f"t2i_reward_batch_pairs_count{label}"] == 2
    assert found[f"t2i_reward_queue_requests{label}"] == 4 and found["t2i_reward_in_flight_requests"] == 6
    buckets = {le: found[f't2i_reward_batch_pairs_bucket{{scorer="hps_v2",le="{le}"}}'] for le in (4, 8, 512, "+Inf")}
    assert buckets == {4: 0, 8: 1, 512: 1, "+Inf": 2}
    assert text.endswith("\n") and "# TYPE t2i_reward_batch_pairs histogram\n" in text
