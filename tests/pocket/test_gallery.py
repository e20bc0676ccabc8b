"""The gallery of a small untrained world: pictures are the renderer's, failures are cells."""

import shutil

import numpy as np
import pytest
from PIL import Image

from pocket.contact_sheet import GAP, contact_sheet, stack
from pocket.drawing import STYLES, Scene, caption, is_held_out
from pocket.gallery import PROMPTS, Gallery, GalleryConfig, main
from pocket.untrained import save_catalog
from pocket.wording import mentioned
from rewards.commandline import parse_config
from rollouts.api import APICallError
from rollouts.catalog import Catalog, CatalogError
from rollouts.rendering import DiffusersRenderer
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.weights import WeightFolder

SD, LORA = "Toy SD 0 - v1", "Toy SD LoRA 0 - v1"
PROMPT = "a red cat"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint and a LoRA."""
    folder = tmp_path_factory.mktemp("world")
    save_catalog(folder, sd15=1, sdxl=0, loras=1, sdxl_loras=0)
    return folder


def picture(world, name, prompt, *, seed=0, **changes):
    """Drawn without the gallery."""
    catalog, settings = Catalog.load(world / "catalog.jsonl"), RenderSettings(native_side=32)
    call = catalog[name].default_call().model_copy(update=changes)
    renderer = DiffusersRenderer(catalog, WeightFolder(world), settings)
    (result,) = renderer.render([resolve(RenderRequest(call, prompt, seed=seed), catalog, settings)])
    return np.asarray(result.image).astype(int)


def cell(sheet, row, column, rows, columns, side):
    """A cell's pixels, counted from the bottom right corner."""
    right = sheet.width - GAP - (columns - 1 - column) * (side + GAP)
    bottom = sheet.height - GAP - (rows - 1 - row) * (side + GAP)
    return np.asarray(sheet.crop((right - side, bottom - side, right, bottom))).astype(int)


def test_models_by_prompts(world):
    prompts = [PROMPT, "a blue house", "a tree"]
    sheet = Gallery(world, native_side=32, seed=5).models_by_prompts([SD, LORA], prompts)
    for row, name in enumerate((SD, LORA)):
        for column in (0, 2):
            expected = picture(world, name, prompts[column], seed=5)
            assert np.abs(cell(sheet, row, column, 2, 3, 32) - expected).max() <= 1


def test_steps_by_cfg(world):
    sheet = Gallery(world, native_side=32).steps_by_cfg(SD, PROMPT, [1, 3], [1.0, 7.5], "DDIM")
    for row, column, steps, cfg in ((0, 0, 1, 1.0), (1, 1, 3, 7.5), (0, 1, 1, 7.5)):
        expected = picture(world, SD, PROMPT, sampling_method="DDIM", sampling_steps=steps, cfg_scale=cfg)
        assert np.abs(cell(sheet, row, column, 2, 2, 32) - expected).max() <= 1
    with pytest.raises(APICallError, match="sampling steps"):
        Gallery(world).steps_by_cfg(SD, PROMPT, [500], [7.0])


@pytest.fixture
def broken_world(world, tmp_path):
    """Its LoRA is not there."""
    folder = tmp_path / "broken"
    shutil.copytree(world, folder)
    (folder / "loras" / "sd_0.safetensors").unlink()
    return folder


def test_a_model_that_fails_is_crossed_out_and_the_others_are_drawn(broken_world):
    output = broken_world / "sheets" / "sheet.png"
    options = {"prompts": [PROMPT], "native_side": 32, "scale": 1, "steps": [1], "cfg": [1.0]}
    main(GalleryConfig(str(broken_world), str(output), **options))
    sheet = Image.open(output)
    # the grid of steps and cfg stands below the models
    gallery = Gallery(broken_world, native_side=32)
    models, grid = gallery.models_by_prompts([SD, LORA], [PROMPT]), gallery.steps_by_cfg(SD, PROMPT, [1], [1.0])
    assert sheet.size == (max(models.width, grid.width), models.height + 3 * GAP + grid.height)
    assert (np.asarray(sheet)[: models.height, : models.width] == np.asarray(models)).all()
    assert np.abs(cell(models, 0, 0, 2, 1, 32) - picture(broken_world, SD, PROMPT)).max() <= 1
    why = f"missing_file: {LORA}: there is no {broken_world / 'loras' / 'sd_0.safetensors'}."
    expected = contact_sheet([[Image.new("RGB", (32, 32))], [why]], ["", ""], [""])
    assert (cell(models, 1, 0, 2, 1, 32) == cell(expected, 1, 0, 2, 1, 32)).all()


def test_a_catalogue_that_lists_no_file(broken_world):
    catalog = Catalog.load(broken_world / "catalog.jsonl")
    entries = [entry.model_copy(update={"files": []} if name == LORA else {}) for name, entry in catalog.items()]
    Catalog(entries).save(broken_world / "catalog.jsonl")
    sheet = Gallery(broken_world, native_side=32).models_by_prompts([SD, LORA], [PROMPT])
    why = f"no_file: {LORA}: the catalogue lists no file."
    expected = contact_sheet([[Image.new("RGB", (32, 32))], [why]], ["", ""], [""])
    assert (cell(sheet, 1, 0, 2, 1, 32) == cell(expected, 1, 0, 2, 1, 32)).all()


def test_default_prompts_are_captions_of_each_style_that_were_trained():
    scenes = [Scene(**{name: values.pop() for name, values in mentioned(prompt).items()}) for prompt in PROMPTS]
    assert [caption(scene) for scene in scenes] == list(PROMPTS)
    assert [scene.style for scene in scenes] == list(STYLES)
    assert not any(map(is_held_out, scenes))


def test_command_line(world, tmp_path):
    flags = ["--world", str(world), "--output", str(tmp_path / "sheet.png"), "--models", SD]
    flags += [
        "--prompts",
        PROMPT,
        "a tree",
        "--grid_models",
        SD,
        LORA,
        "--steps",
        "1",
        "2",
        "--cfg",
        "1",
        "7.5",
        "--samplers",
        "Euler a",
        "DDIM",
    ]
    main(parse_config(GalleryConfig, args=[*flags, "--scale", "3", "--native_side", "16"]))
    gallery = Gallery(world, native_side=16)
    sheets = [gallery.models_by_prompts([SD], [PROMPT, "a tree"], scale=3)]
    for name in (SD, LORA):
        for sampler in ("Euler a", "DDIM"):
            sheets.append(gallery.steps_by_cfg(name, PROMPT, [1, 2], [1.0, 7.5], sampler, scale=3))
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == np.asarray(stack(sheets))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0, 500]}, r"`steps` must lie in \[1, 150\], but has \[0, 500\]"),
        ({"cfg": [0.5]}, r"`cfg` must lie in \[1.0, 30.0\], but has \[0.5\]"),
        ({"samplers": ["Euler z"]}, r"`samplers` may hold .* but has \['Euler z'\]"),
        ({"prompts": []}, "`prompts` needs at least one value"),
        ({"scale": 0}, "`scale` must be at least 1, but is 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        GalleryConfig("world", "sheet.png", **options)


def test_unknown_models_are_told_before_anything_is_drawn(world, tmp_path):
    for options in ({"models": [SD, "Nobody"]}, {"grid_models": ["Nobody"]}):
        with pytest.raises(CatalogError, match=f"has no model 'Nobody', but {SD}, {LORA}"):
            main(GalleryConfig(str(world), str(tmp_path / "sheet.png"), **options))
    with pytest.raises(CatalogError, match="no catalogue file"):
        main(GalleryConfig(str(tmp_path), str(tmp_path / "sheet.png")))
    assert not (tmp_path / "sheet.png").exists()
