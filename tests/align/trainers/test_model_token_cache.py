"""The cache: exact, resumable, never stale, and mapped rather than read."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_cache import HiddenCache, ModelTokenExamples, build_cache, read_manifest
from align.trainers.model_token_config import ModelTokenError

REPOSITORY = Path(__file__).parents[3]


def examples_of(count, seed=0, longest=12):
    """Prefixes of 1 to `longest` tokens, the last two of which are equal; labels of three models."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count - 1,), generator=generator).tolist()
    prefixes = [torch.randint(0, 96, (length,), generator=generator).tolist() for length in lengths]
    return ModelTokenExamples([*prefixes, prefixes[-1]], [number % 3 for number in range(count)])


@pytest.fixture
def counted(build):
    """A backbone and the prefixes it has computed."""
    backbone, seen = Backbone(build("llama")), []

    class Counting(Backbone):
        def __init__(self):
            self.__dict__ |= backbone.__dict__

        def __call__(self, prefixes, more_inputs=None):
            seen.extend(prefixes)
            return super().__call__(prefixes, more_inputs)

    return Counting(), seen


def everything(cache, **options):
    return cache.gather(torch.arange(len(cache)), **options)


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 10_000])
@pytest.mark.parametrize("part_rows", [1, 4, 100])
def test_holds_what_each_prefix_gives(build, tmp_path, tokens_per_batch, part_rows):
    backbone, examples = Backbone(build("gpt2")), examples_of(11)
    cache = build_cache(tmp_path, backbone, examples, tokens_per_batch=tokens_per_batch, part_rows=part_rows)
    found = everything(cache)
    assert found.labels.tolist() == examples.labels and len(cache) == 11
    alone = [backbone([prefix]) for prefix in examples.prefixes]
    for values, name in ((found.hidden, "hidden"), (found.word_lse, "word_lse"), (found.word_max, "word_max")):
        torch.testing.assert_close(values, torch.cat([getattr(one, name) for one in alone]), rtol=1e-5, atol=1e-5)
    index = torch.tensor([7, 0, 7, 10])
    torch.testing.assert_close(cache.gather(index).hidden, found.hidden[index], rtol=0, atol=0)


def test_equal_prefixes_are_computed_once(counted, tmp_path):
    backbone, seen = counted
    cache = build_cache(tmp_path, backbone, ModelTokenExamples([[5, 6], [7], [5, 6], [5, 6]], [0, 1, 2, 0]))
    assert seen == [[5, 6], [7]]
    found = everything(cache)
    assert found.labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(found.hidden[0], found.hidden[2]) and not torch.equal(found.hidden[0], found.hidden[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_on_disk(build, tmp_path, dtype):
    backbone, examples = Backbone(build("llama")), examples_of(5)
    exact = everything(build_cache(tmp_path / "exact", backbone, examples))
    found = everything(build_cache(tmp_path / dtype, backbone, examples, dtype=dtype))
    assert torch.equal(found.hidden, exact.hidden.to(getattr(torch, dtype)).float())
    assert torch.equal(found.word_lse, exact.word_lse), "rounding these would be another loss"


@pytest.mark.parametrize(("of_model", "auto"), [(torch.bfloat16, "bfloat16"), (torch.float64, "float64")])
def test_auto_type_is_the_models(build, tmp_path, of_model, auto):
    cache = build_cache(tmp_path, Backbone(build("llama", dtype=of_model)), examples_of(5))
    assert cache.manifest.dtype == auto
    lse = cache.gather(torch.arange(5), dtype=torch.float64).word_lse
    assert (lse == lse.float()).all() == (of_model is torch.bfloat16)


def test_complete_cache_is_not_computed_again(counted, tmp_path):
    backbone, seen = counted
    first = everything(build_cache(tmp_path, backbone, examples_of(9), part_rows=3))
    seen.clear()
    again = everything(build_cache(tmp_path, backbone, examples_of(9), part_rows=3))
    assert not seen
    torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 200), lambda path: os.truncate(path, 5)])
def test_only_missing_and_damaged_parts_are_computed(counted, tmp_path, damage):
    backbone, seen = counted
    first = everything(build_cache(tmp_path, backbone, examples_of(9), part_rows=3))
    damage(tmp_path / "part-00001.safetensors")
    with pytest.raises(ModelTokenError, match="part-00001.*build the cache again"):
        HiddenCache(tmp_path)
    seen.clear()
    again = everything(build_cache(tmp_path, backbone, examples_of(9), part_rows=3))
    assert len(seen) == 3
    torch.testing.assert_close(again, first, rtol=0, atol=0)


CHANGES = {
    "backbone": {"build": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}},
    "prefixes": {"examples": examples_of(9, seed=1)},
    "dtype": {"dtype": "bfloat16"},
    "part_rows": {"part_rows": 4},
}


@pytest.mark.parametrize("field", CHANGES)
def test_stale_cache_is_refused_or_replaced(build, tmp_path, caplog, field):
    examples = examples_of(9)
    build_cache(tmp_path, Backbone(build("llama")), examples, part_rows=3)
    change = dict(CHANGES[field])
    backbone = Backbone(build("llama", **change.pop("build", {})))
    options = {"part_rows": 3} | change
    data = options.pop("examples", examples)
    with pytest.raises(ModelTokenError, match=rf"cache\.json .*`{field}` is .*replace_stale_cache: true"):
        build_cache(tmp_path, backbone, data, **options)
    with caplog.at_level(logging.WARNING):
        found = everything(build_cache(tmp_path, backbone, data, replace_stale=True, **options))
    assert f"`{field}`" in caplog.text
    expected = everything(build_cache(tmp_path / "new", backbone, data, **options))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_other_labels_alone_need_no_computation(counted, tmp_path):
    backbone, seen = counted
    examples = examples_of(9)
    key = build_cache(tmp_path, backbone, examples).manifest.key()
    seen.clear()
    cache = build_cache(tmp_path, backbone, ModelTokenExamples(examples.prefixes, [1] * 9))
    assert not seen and cache.manifest.key() != key
    assert everything(cache).labels.tolist() == [1] * 9


def test_parts_without_a_description_are_not_trusted(counted, tmp_path):
    """What is left if a replacement is killed after cache.json is gone."""
    backbone, seen = counted
    build_cache(tmp_path, backbone, examples_of(9, seed=1), part_rows=3)
    (tmp_path / "cache.json").unlink()
    seen.clear()
    build_cache(tmp_path, backbone, examples_of(9), part_rows=3)
    assert len(seen) == 8


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', "{", '{"format": 2}'])
def test_unreadable_description(tmp_path, content):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(ModelTokenError, match=r"cache\.json .*delete it"):
        read_manifest(tmp_path)


def test_no_cache(tmp_path):
    with pytest.raises(ModelTokenError, match="no cache of hidden states"):
        HiddenCache(tmp_path)


def test_hidden_states_that_are_not_finite(build, tmp_path):
    model = build("llama")
    backbone = Backbone(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    with pytest.raises(ModelTokenError, match="Example 1: .*not finite"):
        build_cache(tmp_path, backbone, ModelTokenExamples([[5], [4, 77]], [0, 0]))
    assert not list(tmp_path.glob("part-*"))


def test_type_too_narrow(build, tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    with pytest.raises(ModelTokenError, match="cache_dtype: bfloat16"):
        build_cache(tmp_path, Backbone(model), examples_of(3), dtype="float16")


@pytest.mark.parametrize(
    ("prefixes", "labels", "message"),
    [
        ([[1], []], [0, 0], "Example 1: the prefix is empty"),
        ([[1] * 65], [0], "Example 0: .*65 tokens, but the model's window is 64"),
        ([[1], [2], [96]], [0, 1, 1], "Example 2: token ids must be from 0 to 95"),
        ([[-1]], [0], "Example 0: token ids"),
        ([[1]], [2], "Example 0: `label` must be an index of one of 2 models, is 2"),
        ([[1]], [-1], "`label`.*-1"),
        ([[1]], [float("nan")], "`label`.*nan"),
        ([[1]], [True], "`label`.*True"),
        ([[1], [2]], [0], "a label per prefix, but got 2 and 1"),
        ([], [], "no examples"),
    ],
)
def test_examples_that_cannot_be_used(prefixes, labels, message):
    with pytest.raises(ModelTokenError, match=message):
        ModelTokenExamples(prefixes, labels).check(2, 96, 64)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import rewards.files
from pathlib import Path
from test_model_token_cache import examples_of
from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_cache import build_cache
from transformers import AutoModelForCausalLM

left, replace = [{files}], os.replace
def dying(source, target):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
rewards.files.os.replace = dying
build_cache({folder!r}, Backbone(AutoModelForCausalLM.from_pretrained({model!r})), examples_of(9), part_rows=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 2, 4])
def test_killed_at_any_file(build, counted, tmp_path, files):
    """The process dies with a file written, but not at its place yet."""
    backbone, seen = counted
    build("llama").save_pretrained(tmp_path / "model")
    code = KILLED.format(
        tests=str(Path(__file__).parent), files=files, folder=str(tmp_path / "cache"), model=str(tmp_path / "model")
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "cache").glob(".*.tmp")), "it was killed in the middle"
    assert len(list((tmp_path / "cache").glob("part-*"))) == max(0, files - 2)
    found = everything(build_cache(tmp_path / "cache", backbone, examples_of(9), part_rows=2))
    assert len(seen) == 8 - 2 * max(0, files - 2)
    expected = everything(build_cache(tmp_path / "new", backbone, examples_of(9), part_rows=2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["num_prefixes"] == 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_opening_reads_no_hidden_states(build, tmp_path):
    """A file much larger than what is touched: anonymous memory must not grow with it."""
    model = build("llama", hidden_size=1024, num_attention_heads=4)
    cache = build_cache(
        tmp_path, Backbone(model), ModelTokenExamples([[i, j] for i in range(96) for j in range(96)], [0] * 9216)
    )
    size = sum(path.stat().st_size for path in tmp_path.glob("part-*"))
    del cache
    before = anonymous()
    cache = HiddenCache(tmp_path)
    assert cache.gather(torch.tensor([0, 9000])).hidden.shape == (2, 1024)
    assert size > 36_000_000 and anonymous() - before < 10_000


def anonymous():
    """kB of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
