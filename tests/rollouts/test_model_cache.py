"""With strings as weights and lists as models: what is read, built, kept and freed, and when."""

import threading
import time

import pytest

from rollouts.model_cache import ModelCache, ModelTooLarge


class Shelf:
    """Models a to d of 4 bytes, `big` of 11; remembers what was asked of it."""

    def __init__(self, device_bytes=10, host_bytes=None, **options):
        self.reads, self.builds, self.freed = [], [], []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = set()
        self.cache = ModelCache(
            read=self.read, build=self.build, size=self.size, free=self.freed.append, device_bytes=device_bytes,
            host_bytes=host_bytes, **options,
        )  # fmt: skip

    def size(self, name):
        if name == "unknown":
            raise KeyError(name)
        return 11 if name == "big" else 4

    def read(self, name):
        self.gate.wait(10)
        self.reads.append((name, threading.current_thread() is threading.main_thread()))
        if name in self.broken:
            raise OSError(f"{name} is broken")
        return f"weights of {name}"

    def build(self, name, weights):
        assert weights == f"weights of {name}"
        self.builds.append(name)
        return f"model {name}"


@pytest.fixture
def shelf():
    made = []

    def make(**options):
        made.append(Shelf(**options))
        return made[-1]

    yield make
    for one in made:
        one.gate.set()
        one.cache.close()


def read_names(shelf):
    return "".join(name for name, _ in shelf.reads)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_least_recently_used_model_leaves(shelf):
    cpu = shelf()
    for name in "abab":
        assert cpu.cache.get(name) == f"model {name}"
    assert read_names(cpu) == "ab" and cpu.cache.used_bytes() == 8
    cpu.cache.get("a")
    cpu.cache.get("c")
    assert cpu.freed == ["model b"] and cpu.cache.names() == {"a", "c"}
    cpu.cache.get("b")
    assert cpu.freed == ["model b", "model a"] and read_names(cpu) == "abcb"
    assert cpu.cache.used_bytes() == 8


def test_a_model_larger_than_the_budget_is_refused_before_anything_is_read_or_freed(shelf):
    cpu = shelf()
    cpu.cache.get("a")
    with pytest.raises(ModelTooLarge, match="big takes 0.000 GB, but the budget is 0.000 GB") as caught:
        cpu.cache.get("big")
    assert (caught.value.needed, caught.value.budget) == (11, 10)
    assert cpu.cache.prefetch("big") is False
    assert read_names(cpu) == "a" and cpu.freed == [] and cpu.cache.names() == {"a"}


def test_a_prefetched_model_is_read_once_on_the_other_thread(shelf):
    cpu = shelf()
    cpu.cache.get("a")
    cpu.gate.clear()
    assert cpu.cache.prefetch("b") and cpu.cache.prefetch("b")
    assert cpu.cache.names() == {"a"} and cpu.cache.used_bytes() == 8
    cpu.gate.set()
    assert cpu.cache.get("b") == "model b"
    assert cpu.reads == [("a", True), ("b", False)] and cpu.builds == ["a", "b"]
    assert cpu.cache.prefetch("a") and read_names(cpu) == "ab"


def test_prefetching_never_frees_the_model_in_use(shelf):
    cpu = shelf(device_bytes=7)
    cpu.cache.get("a")
    assert cpu.cache.prefetch("b") is False
    assert cpu.freed == [] and cpu.cache.names() == {"a"}


def test_prefetching_frees_a_model_that_is_not_in_use(shelf):
    cpu = shelf()
    cpu.cache.get("a")
    cpu.cache.get("b")
    assert cpu.cache.prefetch("c")
    assert cpu.freed == ["model a"]
    wait_until(lambda: cpu.cache.names() == {"b", "c"})
    assert cpu.cache.prefetch("d") is False  # b is in use, c is to be next
    cpu.cache.get("c")
    assert cpu.freed == ["model a"]


def test_what_was_prefetched_leaves_only_if_it_must(shelf):
    cpu = shelf(device_bytes=12)
    for name in "ab":
        cpu.cache.get(name)
    cpu.cache.prefetch("c")
    cpu.cache.get("d")
    assert cpu.freed == ["model a"]
    small = shelf(device_bytes=8)
    small.cache.get("a")
    small.cache.prefetch("b")
    small.cache.get("c")
    assert small.freed == ["model a"]
    tight = shelf(device_bytes=4)
    tight.cache.prefetch("b")
    assert tight.cache.get("c") == "model c" and tight.cache.names() == {"c"}


def test_errors_of_reading_ahead_are_raised_when_the_model_is_asked_for_and_it_can_be_asked_for_again(shelf):
    cpu = shelf()
    cpu.broken = {"b"}
    cpu.cache.get("a")
    assert cpu.cache.prefetch("b")
    wait_until(lambda: len(cpu.reads) == 2)
    assert cpu.cache.names() == {"a"}
    with pytest.raises(OSError, match="b is broken"):
        cpu.cache.get("b")
    assert cpu.cache.used_bytes() == 4
    cpu.broken = set()
    assert cpu.cache.get("b") == "model b"
    with pytest.raises(KeyError):
        cpu.cache.get("unknown")


def test_an_error_of_building_leaves_nothing_behind(shelf):
    cpu = shelf()
    cpu.build = None
    cpu.cache._build = lambda name, weights: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cpu.cache.get("a")
    assert cpu.cache.names() == set() and cpu.cache.used_bytes() == 0


def test_with_host_memory_a_model_that_left_the_device_is_not_read_again(shelf):
    gpu = shelf(device_bytes=4, host_bytes=8)
    for name in "abab":
        gpu.cache.get(name)
    assert read_names(gpu) == "ab" and gpu.builds == list("abab") and gpu.freed == ["model a", "model b", "model a"]
    assert gpu.cache.used_bytes("device") == 4 and gpu.cache.used_bytes("host") == 8
    gpu.cache.get("c")
    assert gpu.cache.names() == {"b", "c"} and read_names(gpu) == "abc"
    gpu.cache.get("a")
    assert read_names(gpu) == "abca"


def test_without_room_in_host_memory_weights_are_not_kept(shelf):
    gpu = shelf(device_bytes=8, host_bytes=3)
    for name in "aba":
        gpu.cache.get(name)
    assert read_names(gpu) == "ab" and gpu.cache.used_bytes("host") == 0
    assert gpu.cache.prefetch("c") is False


def test_weights_can_be_thrown_away_though_there_is_room(shelf):
    gpu = shelf(device_bytes=4, host_bytes=100, keep_weights=False)
    gpu.cache.prefetch("a")
    gpu.cache.get("a")
    gpu.cache.get("b")
    assert gpu.cache.used_bytes("host") == 0 and gpu.cache.names() == {"b"}


def test_closing_frees_everything(shelf):
    cpu = shelf()
    cpu.cache.get("a")
    cpu.cache.prefetch("b")
    cpu.cache.close()
    assert cpu.freed == ["model a"] and cpu.cache.names() == set()
