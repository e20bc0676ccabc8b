"""What is drawn, in any company and any order; what is recorded when it can't be; what stays in memory."""

import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rollouts.rendering
from pocket.untrained import catalog_entry, save_checkpoint, save_config, save_lora, save_single_file
from rollouts.catalog import Catalog
from rollouts.rendering import DiffusersRenderer
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.schedulers import Deviation, scheduler_table
from rollouts.weights import WeightFolder

SETTINGS = RenderSettings(resolution_scale=0.125, trigger_words="none")


def make(catalog, folder, settings=SETTINGS, **options):
    return DiffusersRenderer(catalog, WeightFolder(folder), settings, **options)


def job(renderer, model, prompt="a red fox", negative="blurry", seed=0, clip_skip=1, **parameters):
    """A job with a model's default parameters but for those given."""
    given = {"cfg scale": 6.0, "sampling steps": 3} | {
        key.replace("_", " "): value for key, value in parameters.items()
    }
    call = renderer.catalog.reconstruct(model, given)
    return resolve(RenderRequest(call, prompt, negative, seed, clip_skip), renderer.catalog, renderer.settings)


def pixels(result):
    assert result.failure is None
    return np.asarray(result.image).astype(int)


def apart(one, other):
    """Largest difference of two results in grey levels."""
    return np.abs(pixels(one) - pixels(other)).max()


@pytest.fixture(scope="module")
def renderer(toy_world):
    made = make(toy_world.catalog, toy_world.folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def jobs(renderer, toy_world):
    """14 jobs of all models, with prompts of one and of three chunks, in no order."""
    long = "an old lighthouse, " * 60
    made = [
        job(renderer, model, prompt, seed=seed, sampling_method=sampler)
        for model, sampler in (
            (toy_world.sd, "Euler a"),
            (toy_world.kohya_lora, "DPM++ 2M Karras"),
            (toy_world.sdxl, "DPM++ SDE"),
        )
        for prompt in ("a red fox", long)
        for seed in (1, 2)
    ]
    made += [job(renderer, toy_world.diffusers_lora), job(renderer, toy_world.sdxl_lora)]
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


@pytest.fixture(scope="module")
def together(renderer, jobs):
    return renderer.render(jobs)


def test_results_are_in_order_with_sizes_and_times(renderer, jobs, together):
    assert [result.key for result in together] == [one.key for one in jobs]
    for result in together:
        assert result.image.size == (64, 64) and result.image.mode == "RGB" and 0 < result.seconds < 30
        assert pixels(result).std() > 10
    assert len({result.image.tobytes() for result in together}) == len(jobs)


def test_what_was_spent_is_counted(toy_world, jobs):
    fresh = make(toy_world.catalog, toy_world.folder)
    start = time.perf_counter()
    fresh.render(jobs)
    elapsed, spent = time.perf_counter() - start, fresh.spent
    assert (spent.loads, spent.lora_loads, spent.images) == (3, 3, len(jobs))
    assert spent.batches == 8  # 3 batch keys with prompts of 2 lengths, and 2 jobs alone
    names = {toy_world.sd, toy_world.other_sd, toy_world.sdxl}
    assert fresh.cached() == names
    paths = [toy_world.folder / toy_world.catalog[name].files[0].uri for name in names]
    files = [path.stat().st_size for folder in paths for path in folder.rglob("*.safetensors")]
    assert spent.loaded_bytes == sum(files)
    assert 0 < spent.build_seconds < spent.load_seconds and 0 < spent.read_seconds < spent.load_seconds
    assert spent.load_seconds + spent.lora_seconds + spent.draw_seconds < elapsed
    fresh.close()
    assert fresh.cached() == set()


def test_a_job_alone_or_in_other_company_gives_the_same_picture(renderer, jobs, together):
    alone = [renderer.render([one])[0] for one in jobs]
    backwards = renderer.render(jobs[::-1])[::-1]
    half = renderer.render(jobs[::2])
    for found in (alone, backwards):
        assert max(apart(one, other) for one, other in zip(found, together, strict=True)) <= 1
    assert max(apart(one, other) for one, other in zip(half, together[::2], strict=True)) <= 1


def test_padded_batches_give_the_same_bits(toy_world, jobs):
    padding = RenderSettings(resolution_scale=0.125, batch_size=3, pad_batches=True)
    renderer = make(toy_world.catalog, toy_world.folder, padding)
    together = renderer.render(jobs)
    alone = [renderer.render([one])[0] for one in jobs]
    backwards = make(toy_world.catalog, toy_world.folder, padding).render(jobs[::-1])[::-1]
    for found in (alone, backwards):
        assert [one.image.tobytes() for one in found] == [one.image.tobytes() for one in together]
    assert renderer.spent.images == 2 * len(jobs)


def test_batches_are_as_large_as_set(toy_world, renderer):
    jobs = [job(renderer, toy_world.sd, seed=seed) for seed in range(5)]
    before = renderer.spent
    renderer.render(jobs)
    assert renderer.spent.minus(before)[5:7] == (2, 5)
    assert renderer.render([]) == []


def test_seed_prompt_negative_prompt_clip_skip_and_parameters_have_an_effect(renderer, toy_world):
    plain = dict(model=toy_world.sd, sampling_method="Euler")
    changes = [
        {"seed": 1}, {"prompt": "a blue dog"}, {"prompt": "a (red:1.6) fox"}, {"negative": "oil"}, {"clip_skip": 2},
        {"cfg_scale": 2.0}, {"sampling_steps": 4}, {"sampling_method": "Heun"},
    ]  # fmt: skip
    first, *others = renderer.render([job(renderer, **plain), *(job(renderer, **plain | one) for one in changes)])
    for change, other in zip(changes, others, strict=True):
        assert apart(first, other) > 1, change
    wide = renderer.render([job(renderer, toy_world.sd, width=1024, height=512)])[0]
    assert wide.image.size == (128, 64)


SUBSTITUTES = sorted(name for name, spec in scheduler_table().items() if spec.deviation is Deviation.SUBSTITUTE)


@pytest.mark.parametrize("sampler", SUBSTITUTES)
def test_samplers_that_stand_in_for_others_draw_a_picture_too(renderer, toy_world, sampler):
    """Exact ones are compared with diffusers elsewhere; UniPC once gave NaN in its last step."""
    results = renderer.render([job(renderer, toy_world.sd, sampling_method=sampler, sampling_steps=n) for n in (3, 8)])
    assert [result.failure for result in results] == [None, None]
    assert all(pixels(result).std() > 1 for result in results)


def test_lora_weight_and_trigger_words_have_an_effect(toy_world, renderer):
    lora = job(renderer, toy_world.kohya_lora)
    plain, weak, strong = (
        lora._replace(batch_key=lora.batch_key._replace(**new))
        for new in ({"lora": "", "lora_weight": 1.0}, {"lora_weight": 0.2}, {"lora_weight": 1.0})
    )
    first = renderer.render([plain, weak, strong])
    assert min(apart(first[0], first[1]), apart(first[0], first[2]), apart(first[1], first[2])) > 1
    again = renderer.render([strong, plain, weak])
    assert [one.image.tobytes() for one in again] == [first[i].image.tobytes() for i in (2, 0, 1)]
    with_words = make(toy_world.catalog, toy_world.folder, RenderSettings(resolution_scale=0.125))
    request = job(with_words, toy_world.kohya_lora)
    assert request.prompt == "a red fox, ink style"
    assert apart(with_words.render([request])[0], renderer.render([job(renderer, toy_world.kohya_lora)])[0]) > 1


def test_the_checkpoint_is_bit_for_bit_what_it_was_before_a_lora(toy_world):
    renderer = make(toy_world.catalog, toy_world.folder)
    for model, lora in ((toy_world.sd, toy_world.kohya_lora), (toy_world.sdxl, toy_world.sdxl_lora)):
        before = renderer.render([job(renderer, model)])[0]
        changed = renderer.render([job(renderer, lora)])[0]
        after = renderer.render([job(renderer, model)])[0]
        assert apart(before, changed) > 1 and before.image.tobytes() == after.image.tobytes()


# Models that can't be drawn -------------------------------------------------------------------------------------------


@pytest.fixture
def world(toy_world, tmp_path):
    """Function of further entries: a copy of the toy world's weights, and a catalogue with them."""
    folder = shutil.copytree(toy_world.folder, tmp_path / "weights")

    class World:
        def __init__(self):
            self.folder, self.entries = folder, list(toy_world.catalog.values())

        def add(self, uri, base_model="SD 1.5", base_checkpoint=None):
            number = 100 + len(self.entries)
            options = {"name": uri, "number": number, "base_model": base_model, "base_checkpoint": base_checkpoint}
            self.entries.append(catalog_entry(folder, uri, **options))
            return uri

        def renderer(self, settings=SETTINGS, **options):
            return make(Catalog(self.entries), folder, settings, **options)

    return World()


def only_this_fails(renderer, broken, reason, match, good):
    """Draw a good model, the broken one twice, and the good one again."""
    jobs = [
        job(renderer, good), job(renderer, broken), job(renderer, broken, sampling_steps=2), job(renderer, good, seed=1)
    ]  # fmt: skip
    before = renderer.render(jobs[:1])[0]
    results = renderer.render(jobs)
    for result in results[1:3]:
        assert result.image is None and result.failure.reason == reason
    assert re.search(match, results[1].failure.message), results[1].failure.message
    assert apart(results[0], before) <= 1 and results[3].image is not None


def change(path, function):
    save_file({key: function(key, value) for key, value in load_file(path).items()}, path)


def test_files_that_are_missing_wrong_damaged_or_pickled(world, toy_world):
    renderer = world.renderer()
    sd = world.folder / "checkpoints" / "sd_1"
    vae = sd / "vae" / "diffusion_pytorch_model.safetensors"
    content = vae.read_bytes()
    vae.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    only_this_fails(renderer, toy_world.other_sd, "wrong_hash", "has SHA-256 .* but the catalogue says", toy_world.sd)
    vae.write_bytes(content[:-5])
    only_this_fails(world.renderer(), toy_world.other_sd, "corrupt", "truncated or no safetensors", toy_world.sd)
    shutil.rmtree(sd)
    only_this_fails(world.renderer(), toy_world.other_sd, "missing_file", "there is no .*sd_1", toy_world.sd)
    (world.folder / "loras" / "sd_0.safetensors").unlink()
    only_this_fails(world.renderer(), toy_world.kohya_lora, "missing_file", "there is no .*sd_0.safet", toy_world.sd)
    torch.save({"a": torch.zeros(1)}, world.folder / "old.ckpt")
    only_this_fails(world_with(world, "old.ckpt"), "old.ckpt", "pickle", "is a pickle, .* Convert it", toy_world.sdxl)


def world_with(world, uri, **options):
    world.add(uri, **options)
    return world.renderer()


def test_a_checkpoint_of_another_architecture(world, toy_world):
    save_checkpoint(world.folder / "xl_as_sd", base_model="SDXL 1.0")
    renderer = world_with(world, "xl_as_sd")
    only_this_fails(renderer, "xl_as_sd", "wrong_architecture", "is not SD 1.5: its parts are", toy_world.sd)


def test_a_lora_for_another_architecture(world, toy_world):
    save_lora(world.folder / "xl_as_sd.safetensors", base_model="SDXL 1.0", format="kohya")
    renderer = world_with(world, "xl_as_sd.safetensors", base_checkpoint=toy_world.sd)
    only_this_fails(
        renderer, "xl_as_sd.safetensors", "wrong_architecture", "does not fit|not there or of", toy_world.sd
    )
    lora = job(renderer, toy_world.kohya_lora)
    assert apart(renderer.render([lora])[0], make(toy_world.catalog, toy_world.folder).render([lora])[0]) == 0


def test_weights_that_give_nan_or_black(world, toy_world):
    for name, function in (
        ("nan", lambda key, value: value * torch.nan if key == "conv_out.bias" else value),
        ("black", lambda key, value: value * 0 - 5 if key == "decoder.conv_out.bias" else value),
    ):
        folder = shutil.copytree(world.folder / "checkpoints" / "sd_0", world.folder / name)
        change(folder / ("unet" if name == "nan" else "vae") / "diffusion_pytorch_model.safetensors", function)
        world.add(name)
    renderer = world.renderer()
    only_this_fails(renderer, "nan", "not_finite", "12288 of 12288 values are not finite", toy_world.sd)
    only_this_fails(renderer, "black", "black", "All of the picture is black", toy_world.sd)


def test_a_checkpoint_larger_than_the_budget_is_found_out_before_it_is_read(world, toy_world):
    save_checkpoint(world.folder / "large", ballast_mb=30)
    world.add("large")
    renderer = world.renderer(device_bytes=20_000_000)
    renderer.prefetch("large")
    match = r"large takes 0.03\d GB, but the budget is 0.020 GB. Raise `device_bytes`"
    only_this_fails(renderer, "large", "out_of_memory", match, toy_world.sd)
    assert renderer.spent.loads == 1


def test_a_parameter_that_a_model_can_not_have(renderer, toy_world):
    good, bad = job(renderer, toy_world.sd), job(renderer, toy_world.sd, clip_skip=9)
    results = renderer.render([bad, good])
    assert results[0].failure.reason == "error"
    assert "ValueError: `clip_skip` must be from 1 to 3 for this text encoder, but got 9" in results[0].failure.message
    assert results[1].image is not None


# Memory ---------------------------------------------------------------------------------------------------------------


def test_single_files_and_folders_give_the_same_pictures(world, tmp_path):
    configs = {}
    for base_model, short in (("SD 1.5", "sd"), ("SDXL 1.0", "xl")):
        save_checkpoint(world.folder / short, base_model=base_model, seed=5, full=True)
        save_single_file(world.folder / f"{short}.safetensors", base_model=base_model, seed=5)
        configs[base_model] = save_config(tmp_path / short, base_model=base_model)
        world.add(short, base_model)
        world.add(f"{short}.safetensors", base_model)
    renderer = world.renderer(configs=configs)
    for short in ("sd", "xl"):
        names = (short, f"{short}.safetensors")
        one, other = renderer.render([job(renderer, name, sampling_method="Euler") for name in names])
        assert apart(one, other) == 0
    failure = world.renderer().render([job(renderer, "sd.safetensors")])[0].failure
    assert failure.reason == "error" and "Name in `configs` a folder" in failure.message


def test_a_prefetched_checkpoint_is_read_once_and_waited_for_less(world):
    for name in ("first", "second"):
        save_checkpoint(world.folder / name, ballast_mb=150)
        world.add(name)
    renderer = world.renderer()
    renderer.render([job(renderer, "first")])
    before = renderer.spent
    renderer.prefetch("second")
    renderer.prefetch("second")
    assert "second" not in renderer.cached()
    deadline = time.monotonic() + 30
    while "second" not in renderer.cached():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    renderer.render([job(renderer, "second")])
    spent = renderer.spent.minus(before)
    assert spent.loads == 1 and spent.load_seconds - spent.build_seconds < 0.5 * spent.read_seconds


def test_what_fails_to_be_read_ahead_fails_when_it_is_drawn(world, toy_world):
    shutil.rmtree(world.folder / "checkpoints" / "sd_1" / "unet")
    renderer = world.renderer()
    for name in (toy_world.other_sd, "no such model"):
        renderer.prefetch(name)
    results = renderer.render([job(renderer, toy_world.other_sd), job(renderer, toy_world.sd)])
    assert "has no weights for its unet" in results[0].failure.message and results[1].image is not None


def test_with_room_for_one_checkpoint_pictures_are_the_same_and_only_one_is_in_memory(toy_world, jobs, together):
    renderer = make(toy_world.catalog, toy_world.folder, device_bytes=2_500_000)
    for _ in range(2):
        for one, expected in zip(jobs, together, strict=True):
            assert apart(renderer.render([one])[0], expected) <= 1
            assert renderer.cached() == {one.batch_key.checkpoint}
    first = [renderer.render([one])[0].image.tobytes() for one in jobs]
    assert [renderer.render([one])[0].image.tobytes() for one in jobs] == first


def test_a_device_of_another_type_than_the_keys_say_is_refused(toy_world):
    with pytest.raises(ValueError, match="`device` is meta, but `device_type` of the settings is cpu"):
        make(toy_world.catalog, toy_world.folder, device="meta")


# Faults of the device, which have to be injected ----------------------------------------------------------------------


@pytest.fixture
def memory_for_two(monkeypatch):
    """Drawing more than two pictures at once fails as on a GPU that is full."""
    draw, sizes = rollouts.rendering._draw, []

    def limited(loaded, key, seeds, embeddings):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(loaded, key, seeds, embeddings)

    monkeypatch.setattr(rollouts.rendering, "_draw", limited)
    return sizes


def test_a_batch_that_does_not_fit_is_halved_for_good(toy_world, memory_for_two):
    settings = RenderSettings(resolution_scale=0.125, batch_size=8)
    renderer = make(toy_world.catalog, toy_world.folder, settings)
    results = renderer.render([job(renderer, toy_world.sd, seed=seed) for seed in range(8)])
    assert all(result.image is not None for result in results)
    assert memory_for_two == [8, 4, 2, 2, 2, 2]
    renderer.render([job(renderer, toy_world.sd, seed=seed) for seed in range(3)])
    assert memory_for_two[6:] == [2, 1]


def test_a_padded_batch_that_does_not_fit_is_recorded(toy_world, memory_for_two):
    settings = RenderSettings(resolution_scale=0.125, batch_size=4, pad_batches=True)
    renderer = make(toy_world.catalog, toy_world.folder, settings)
    [result] = renderer.render([job(renderer, toy_world.sd)])
    assert result.failure.reason == "out_of_memory" and "lower `batch_size`" in result.failure.message
    assert memory_for_two == [4]


def test_a_broken_device_is_not_taken_for_the_fault_of_a_job(toy_world, monkeypatch):
    renderer = make(toy_world.catalog, toy_world.folder)

    def broken(*args):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(rollouts.rendering, "_draw", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        renderer.render([job(renderer, toy_world.sd)])


# Precision and other settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_gives_nearly_the_same_picture(toy_world, renderer, dtype):
    low = make(toy_world.catalog, toy_world.folder, RenderSettings(resolution_scale=0.125, dtype=dtype))
    for model in (toy_world.sd, toy_world.sdxl, toy_world.kohya_lora, toy_world.sdxl_lora):
        options = {"sampling_method": "DDIM"}
        expected, found = (
            renderer.render([job(renderer, model, **options)])[0],
            low.render([job(renderer, model, **options)])[0],
        )
        difference = np.abs(pixels(found) - pixels(expected)).mean()
        assert 0 < difference < 4


def test_tiles_change_nothing_in_a_picture_of_one_tile(toy_world, renderer):
    tiled = make(toy_world.catalog, toy_world.folder, RenderSettings(resolution_scale=0.125, vae_tiling=True))
    one = job(renderer, toy_world.sd)
    assert apart(tiled.render([one])[0], renderer.render([one])[0]) == 0
    assert tiled._cache.get(toy_world.sd).pipeline.vae.use_tiling


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_denoiser_gives_the_same_picture_and_serves_the_next_checkpoint(toy_world, renderer):
    options = {"resolution_scale": 0.125, "trigger_words": "none", "batch_size": 1}
    compiled = make(
        toy_world.catalog, toy_world.folder, RenderSettings(**options, compile_unet=True), device_bytes=2**21
    )
    seconds = []
    for name in (toy_world.sd, toy_world.other_sd, toy_world.sd):
        one = job(renderer, name, sampling_method="DDIM")
        result = compiled.render([one])[0]
        assert apart(result, renderer.render([one])[0]) <= 1
        seconds.append(result.seconds)
    assert compiled.spent.loads == 3
    assert seconds[2] < 0.1 * seconds[0]  # compiled once for both


@pytest.mark.slow
def test_memory_stays_what_it_was_after_the_first_cycle(tmp_path):
    """150 switches between 12 checkpoints of which two fit, in a process of its own."""
    script = tmp_path / "switch.py"
    script.write_text(SWITCH)
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "models")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    resident = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert len(resident) >= 8
    assert max(resident) < 1.02 * resident[0]


SWITCH = """
import os, sys
from pocket.untrained import save_catalog
from rollouts.rendering import DiffusersRenderer
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.weights import WeightFolder

catalog = save_catalog(sys.argv[1], sd15=9, sdxl=3, loras=3, sdxl_loras=1, width=32, ballast_mb=5)
settings = RenderSettings(resolution_scale=0.125)
renderer = DiffusersRenderer(catalog, WeightFolder(sys.argv[1]), settings, device_bytes=25_000_000)
jobs = [resolve(RenderRequest(entry.default_call(), "a red fox"), catalog, settings) for entry in catalog.values()]
while renderer.spent.loads < 150:
    for job, later in zip(jobs, jobs[1:] + jobs[:1]):
        renderer.prefetch(later.batch_key.checkpoint)
        assert renderer.render([job])[0].image is not None
    print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""
