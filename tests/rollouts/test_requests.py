"""What a request means for a catalogue, and what its key depends on."""

import pytest

from rollouts.api import APICall
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.requests import RenderError, RenderRequest, RenderSettings, Spent, resolve, with_trigger_words

PARAMETERS = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0}


def entry(name, number, **changes):
    file = {"uri": f"{number}.safetensors", "format": "SafeTensor", "sha256": f"{number:064X}"}
    fields = {"name": name, "version_id": number, "model_id": number, "type": "Checkpoint", "base_model": "SD 1.5",
              "files": [file], "default_parameters": PARAMETERS, "description": f"About {name}."}  # fmt: skip
    return CatalogEntry.model_validate(fields | changes)


def lora(name, number, **changes):
    return entry(name, number, **({"type": "LoRA", "base_checkpoint": "Plain - v1"} | changes))


CATALOG = Catalog(
    [
        entry("Plain - v1", 1),
        entry("Trained - v1", 2, trigger_words=["inkpunk style", "moody"]),
        lora("Fox - v1", 3, lora_weight=0.6, trigger_words=["foxy"]),
        entry("Gone - v1", 4, files=[]),
    ]
)


def request(model="Plain - v1", prompt="a cat", **changes):
    call = CATALOG[model].default_call().to_dict()
    call |= {key: changes.pop(key) for key in list(changes) if key in call}
    return RenderRequest(APICall.from_dict(call), prompt, **changes)


def job(*args, settings=None, **changes):
    return resolve(request(*args, **changes), CATALOG, settings or RenderSettings())


def test_a_checkpoint_call():
    found = job(negative_prompt="blurry", seed=3, clip_skip=2)
    assert found.batch_key == ("SD 1.5", "Plain - v1", "", 1.0, "Euler a", 512, 512, 20, 7.0, 2)
    assert (found.prompt, found.negative_prompt, found.seed) == ("a cat", "blurry", 3)
    assert len(found.key) == 64


def test_a_lora_call_names_its_checkpoint_weight_and_trigger_word():
    found = job("Fox - v1")
    assert (found.batch_key.checkpoint, found.batch_key.lora, found.batch_key.lora_weight) == (
        "Plain - v1", "Fox - v1", 0.6,
    )  # fmt: skip
    assert found.prompt == "a cat, foxy"


@pytest.mark.parametrize(
    ("prompt", "policy", "expected"),
    [
        ("a cat", "first", "a cat, inkpunk style"),
        ("a cat, ", "all", "a cat, inkpunk style, moody"),
        ("a cat", "none", "a cat"),
        ("a MOODY cat", "all", "a MOODY cat"),
        ("", "first", "inkpunk style"),
    ],
)
def test_trigger_words(prompt, policy, expected):
    assert job("Trained - v1", prompt, settings=RenderSettings(trigger_words=policy)).prompt == expected


def test_empty_trigger_words_add_nothing():
    assert with_trigger_words("a cat", [" ,", ""], "all") == "a cat"


def test_pictures_can_be_drawn_smaller():
    found = job(width=512, height=768, settings=RenderSettings(resolution_scale=0.13)).batch_key
    assert (found.width, found.height) == (64, 96)  # 66.6 and 99.8, to the nearest multiple of 8


def test_small_models_draw_their_own_size_for_each_architecture():
    settings = RenderSettings(native_side=64)
    assert (settings.scaled(512, "SD 1.5"), settings.scaled(768, "SD 1.5")) == (64, 96)
    assert (settings.scaled(1024, "SDXL 1.0"), settings.scaled(1536, "SDXL 1.0")) == (64, 96)
    found = job(width=512, height=768, settings=settings)
    assert (found.batch_key.width, found.batch_key.height) == (64, 96)
    # another setting, so another key; left alone it is not in the key at all
    assert found.key != job(width=512, height=768, settings=RenderSettings(resolution_scale=0.125)).key
    assert "native_side" not in RenderSettings().fingerprint()


def test_two_scales_at_once_are_refused():
    with pytest.raises(ValueError, match="`native_side` must be at least 8 and stand without `resolution_scale`"):
        RenderSettings(native_side=64, resolution_scale=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a dog"},
        {"negative_prompt": "x"},
        {"seed": 1},
        {"clip_skip": 2},
        {"width": 640},
        {"sampling method": "Euler"},
        {"sampling steps": 21},
        {"cfg scale": 7.5},
        {"model": "Trained - v1"},
    ],
)
def test_whatever_changes_the_picture_changes_the_key(changes):
    assert job(**changes).key != job().key


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"device_type": "cuda"},
        {"pad_batches": True},
        {"resolution_scale": 0.5},
        {"vae_tiling": True},
        {"compile_unet": True},
    ],
)
def test_how_it_is_drawn_is_part_of_the_key(changes):
    assert job(settings=RenderSettings(**changes)).key != job().key


def test_the_batch_size_counts_only_where_it_is_always_the_same():
    def key(**settings):
        return job(settings=RenderSettings(**settings)).key

    assert key(batch_size=2) == key(batch_size=8)
    assert key(batch_size=2, pad_batches=True) != key(batch_size=8, pad_batches=True)


def test_the_weights_count_and_not_their_name():
    changed = {"sha256": f"{9:064X}", "uri": "x.safetensors", "format": "SafeTensor"}
    renamed = Catalog([entry("Plain - v1", 7), entry("Other - v1", 1)])
    swapped = Catalog([entry("Plain - v1", 1, files=[changed])])
    plain = resolve(request(), CATALOG, RenderSettings())
    assert resolve(request(), swapped, RenderSettings()).key != plain.key
    call = request().call.model_copy(update={"model": "Other - v1"})
    other = resolve(RenderRequest(call, "a cat"), renamed, RenderSettings())
    assert other.batch_key.checkpoint == "Other - v1"
    # The name is in the batch key, which says what is loaded, so it must not be hashed from there.
    assert other.key == plain.key


def test_a_word_that_was_asked_for_is_another_request_than_one_that_was_added():
    """Both are drawn from the same prompt, but scored for what was asked."""
    added, asked = job("Fox - v1", "a cat"), job("Fox - v1", "a cat, foxy")
    assert added.prompt == asked.prompt and added.key != asked.key


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"model": "Nobody - v1"}, "unknown_model", "not in the catalogue"),
        ({"type": "LoRA"}, "unknown_model", "is Checkpoint for SD 1.5 there"),
        ({"sampling_method": "Restart"}, "unknown_sampler", "no such sampler"),
    ],
)
def test_calls_that_cannot_be_drawn(changes, reason, message):
    call = request().call.model_copy(update=changes)
    with pytest.raises(RenderError, match=message) as caught:
        resolve(RenderRequest(call, "a cat"), CATALOG, RenderSettings())
    assert caught.value.failure.reason == reason


def test_a_model_without_a_file():
    with pytest.raises(RenderError, match="Gone - v1: the catalogue lists no file") as caught:
        job("Gone - v1")
    assert caught.value.failure.reason == "no_file"


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int8"},
        {"batch_size": 0},
        {"resolution_scale": 0},
        {"resolution_scale": 5},
        {"native_side": 4},
        {"trigger_words": "some"},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        RenderSettings(**wrong)


def test_spent_adds_up():
    one, two = Spent(loads=1, load_seconds=0.5), Spent(loads=2, images=3)
    assert one.plus(two) == Spent(loads=3, load_seconds=0.5, images=3)
    assert one.plus(two).minus(two) == one
