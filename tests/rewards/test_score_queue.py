"""Merging of requests: who is scored with whom, what happens if it fails, and that nothing accepted is lost."""

import hashlib
import threading
import time
from io import BytesIO

import pytest
import torch
from PIL import Image

from rewards.batch_queue import QueueClosedError
from rewards.score_queue import ScoreQueue, ScorerFailedError, score_pictures
from rewards.scorer import Scored
from rewards.wire import Picture, ScoreRequest


def picture(value, size=(4, 4)):
    file = BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return Picture(hashlib.sha256(file.getvalue()).digest(), file.getvalue())


def request(*pairs):
    return ScoreRequest([prompt for prompt, _ in pairs], [picture(value) for _, value in pairs])


class Recorder:
    """Scores number + grey value, remembers its calls, and waits for `gate` in each."""

    def __init__(self):
        self.calls, self.gate = [], threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, prompts, images):
        self.calls.append((list(prompts), list(images)))
        self.entered.release()
        assert self.gate.wait(10)
        if "boom" in prompts:
            raise RuntimeError("no score for boom")
        if "exit" in prompts:
            raise SystemExit(3)
        return torch.tensor([float(p) + image.getpixel((0, 0)) for p, image in zip(prompts, images, strict=True)])


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def queue(recorder):
    queue = ScoreQueue("toy", recorder, max_batch=4, max_wait=0.0)
    yield queue
    recorder.gate.set()
    queue.close()


def block(queue, recorder):
    """Occupy the scorer with a request, so that what comes next has to wait."""
    recorder.gate.clear()
    job = queue.submit(request(("0", 0)))
    assert recorder.entered.acquire(timeout=5)
    return job


def scores(job):
    return job.future.result(timeout=5).scores.tolist()


def test_waiting_requests_are_merged_up_to_max_batch(queue, recorder):
    first = block(queue, recorder)
    sizes = (1, 2, 2, 1, 6, 1)
    jobs = [queue.submit(request(*((str(i), 10 * n) for n in range(size)))) for i, size in enumerate(sizes)]
    assert len(queue) == 6
    recorder.gate.set()
    assert scores(first) == [0.0]
    assert [scores(job) for job in jobs] == [[i + 10.0 * n for n in range(size)] for i, size in enumerate(sizes)]
    # In order of arrival and at most 4 pairs; 6 pairs of one request are not cut.
    assert [len(prompts) for prompts, _ in recorder.calls] == [1, 3, 3, 6, 1]


def test_equal_pictures_of_different_requests_are_one_object(queue, recorder):
    block(queue, recorder)
    jobs = [queue.submit(request(("1", 7), ("2", 9))), queue.submit(request(("3", 9), ("4", 7)))]
    recorder.gate.set()
    assert [scores(job) for job in jobs] == [[8.0, 11.0], [12.0, 11.0]]
    a, b, c, d = recorder.calls[1][1]
    assert a is d and b is c and a is not b


def test_an_idle_scorer_waits_for_company(recorder):
    queue = ScoreQueue("toy", recorder, max_batch=3, max_wait=30.0)
    jobs = [queue.submit(request((str(i), 0))) for i in range(2)]
    time.sleep(0.1)
    assert not recorder.calls
    jobs.append(queue.submit(request(("2", 0))))  # the batch is full: not 30 seconds
    assert [scores(job) for job in jobs] == [[0.0], [1.0], [2.0]]
    assert [len(prompts) for prompts, _ in recorder.calls] == [3]
    late = queue.submit(request(("5", 0)))
    queue.close()  # nor here
    assert scores(late) == [5.0]


def test_time_is_up_for_a_batch_that_is_not_full(recorder):
    queue = ScoreQueue("toy", recorder, max_batch=3, max_wait=0.05)
    started = time.monotonic()
    assert scores(queue.submit(request(("1", 0)))) == [1.0]
    assert time.monotonic() - started >= 0.05
    queue.close()


@pytest.mark.parametrize("bad", ["boom", "exit"])
def test_only_the_request_at_fault_fails(queue, recorder, bad):
    block(queue, recorder)
    jobs = [queue.submit(request((prompt, 1))) for prompt in ("1", bad, "3")]
    recorder.gate.set()
    assert (scores(jobs[0]), scores(jobs[2])) == ([2.0], [4.0])
    with pytest.raises(ScorerFailedError, match=r"toy failed: (RuntimeError\('no score for boom'\)|SystemExit\(3\))"):
        jobs[1].future.result(timeout=5)
    assert [len(prompts) for prompts, _ in recorder.calls] == [1, 3, 1, 1, 1]
    assert scores(queue.submit(request(("9", 0)))) == [9.0]  # its thread lives


def test_cancelled_requests_are_forgotten(queue, recorder):
    running = block(queue, recorder)
    waiting, other = queue.submit(request(("1", 1))), queue.submit(request(("2", 1)))
    queue.cancel(waiting)
    queue.cancel(running)  # too late, and harmless
    assert len(queue) == 1
    recorder.gate.set()
    assert (scores(running), scores(other)) == ([0.0], [3.0])
    assert waiting.future.cancelled()
    assert [prompts for prompts, _ in recorder.calls] == [["0"], ["2"]]


def test_close_finishes_what_waits(queue, recorder):
    block(queue, recorder)
    jobs = [queue.submit(request((str(i), 0))) for i in range(9)]
    closing = threading.Thread(target=queue.close)
    closing.start()
    time.sleep(0.05)
    with pytest.raises(QueueClosedError, match="queue of toy is closed"):
        queue.submit(request(("1", 0)))
    recorder.gate.set()
    closing.join(5)
    assert not closing.is_alive()
    assert [job.future.result(timeout=0).scores.tolist() for job in jobs] == [[float(i)] for i in range(9)]


def test_reports(recorder):
    reports = []
    queue = ScoreQueue("toy", recorder, max_batch=4, max_wait=0.0, on_batch=reports.append)
    broken = Picture(b"x", picture(1).data[:-30])
    scored = queue.submit(ScoreRequest(["1", "2", "3"], [picture(7), broken, picture(7)])).future.result(timeout=5)
    queue.close()
    assert scored.scores[[0, 2]].tolist() == [8.0, 10.0] and scored.scores[1].isnan()
    assert list(scored.errors) == [1] and "can't be decoded" in scored.errors[1]
    assert recorder.calls[0][0] == ["1", "3"]
    (report,) = reports
    assert report[:4] == (1, 3, 2, 1) and report.seconds > 0


def test_answers_of_scorers_are_checked():
    pictures = [picture(1), picture(2)]

    def rows(prompts, images):
        return Scored(torch.tensor([1.0, torch.nan], dtype=torch.float64), {1: "bad"})

    class WithScore:
        score = staticmethod(rows)

    scored = score_pictures(WithScore(), ["a", "b"], pictures)
    assert scored.scores.dtype == torch.float32 and scored.errors == {1: "bad"}
    assert score_pictures(lambda p, i: torch.tensor([torch.inf, 2.0]), ["a", "b"], pictures).errors == {
        0: "the score is not finite."
    }
    with pytest.raises(ValueError, match=r"scores of shape \(1, 2\) for 2 pairs"):
        score_pictures(lambda p, i: torch.ones(1, 2), ["a", "b"], pictures)
    with pytest.raises(ValueError, match=r"scores of shape \(3,\) for 2 pairs"):
        score_pictures(lambda p, i: torch.ones(3), ["a", "b"], pictures)
