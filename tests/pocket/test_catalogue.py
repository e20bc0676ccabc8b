"""The pocket world's models: enough of them, good and bad, and every entry callable."""

from collections import Counter
from itertools import pairwise

from pocket.catalogue import BY_SLUG, MODELS, catalog_entry, usable_models, version_id
from pocket.drawing import STYLES
from rollouts.catalog import Catalog
from rollouts.names import name_problem


def entries():
    return [catalog_entry(model, f"{number:064X}", 1000 + number) for number, model in enumerate(MODELS)]


def test_there_are_enough_models_and_one_of_each_defect():
    assert len(usable_models()) >= 16
    assert Counter(model.defect for model in MODELS if model.defect) == {"nsfw": 1, "missing_file": 1, "wrong_base": 1}
    assert {model.base_model for model in usable_models()} == {"SD 1.5", "SDXL 1.0"}
    assert {model.type for model in usable_models()} == {"Checkpoint", "LoRA"}
    assert {model.format for model in usable_models() if model.base} == {"diffusers", "kohya"}


def test_two_models_compete_for_every_style_but_flat():
    per_style = Counter(model.style for model in usable_models())
    assert all(per_style[style] >= 2 for style in STYLES if style != "flat"), per_style
    assert per_style["flat"] >= 1 and per_style[""] >= 2


def test_names_ids_and_files_are_unique_and_safe():
    for values in (
        [model.slug for model in MODELS],
        [model.catalog_name.lower() for model in MODELS],
        [model.uri for model in MODELS],
        [version_id(model) for model in MODELS],
    ):
        assert len(set(values)) == len(MODELS)
    assert not any(name_problem(model.catalog_name) for model in MODELS)
    assert all(BY_SLUG[model.slug] is model for model in MODELS)
    assert BY_SLUG["pixel_wave"].uri == "checkpoints/pixel_wave"
    assert BY_SLUG["comic_ink"].uri == "loras/comic_ink.safetensors"


def test_loras_have_a_base_of_their_architecture_and_trigger_words_that_captions_know():
    for model in MODELS:
        if model.base is None:
            assert model.trigger_words == ()
            continue
        base = BY_SLUG[model.base]
        assert (base.type, base.base_model, base.defect) == ("Checkpoint", model.base_model, "")
        assert model.trigger_words == (STYLES[model.style],)


def test_habits_can_be_called():
    for model in MODELS:
        call = catalog_entry(model, "0" * 64, 1).default_call()
        for sampler in model.habits.samplers:
            for steps in model.habits.steps:
                for cfg in model.habits.cfg:
                    changed = {"sampling method": sampler, "sampling steps": steps, "cfg scale": cfg}
                    type(call).from_dict(call.to_dict() | changed)


def test_entries_make_a_catalogue():
    catalog = Catalog(entries())
    assert list(catalog) == [model.catalog_name for model in MODELS]
    lora = catalog["Watercolor Wash - v1"]
    assert (lora.type, lora.base_checkpoint, lora.lora_weight) == ("LoRA", "Pocket Diffusion - v1.5", 1.0)
    assert (lora.version_id, lora.model_id) == (2009, 1009)
    assert lora.stats == {"downloads": 2600.0, "thumbs_up": 280.0, "rating": 4.6}
    sdxl = catalog["Pocket XL - v1.0"]
    assert (sdxl.default_parameters.width, sdxl.default_parameters.height) == (1024, 1024)
    assert sdxl.base_checkpoint is None and sdxl.lora_weight is None
    assert sdxl.files[0].uri == "checkpoints/pocket_xl"
    # DiffAgent's default is the most downloaded checkpoint
    assert catalog.default_call("SD 1.5").model == "Dreamy Everything - v8"


def test_popular_models_of_a_style_are_not_those_with_a_careful_card():
    # of the rivals in a style the more downloaded one has at least five times as many
    for style in ("pixel", "neon", "watercolor", "sketch", "comic"):
        downloads = sorted(m.downloads for m in usable_models() if m.style == style and m.base_model == "SD 1.5")
        assert all(more > 5 * fewer for fewer, more in pairwise(downloads)), style
