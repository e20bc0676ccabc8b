"""Checkpoints from files: what is found, read and built. Pictures are compared in test_rendering_against_diffusers."""

import inspect
import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from pocket.untrained import save_checkpoint, save_config, save_single_file
from rollouts.pipelines import PipelineFactory, checkpoint_bytes, find_checkpoint, make_scheduler, read_checkpoint
from rollouts.requests import RenderError, RenderSettings
from rollouts.schedulers import scheduler_spec, scheduler_table

CPU, FLOAT32 = torch.device("cpu"), RenderSettings()
CLASSES = {"SD 1.5": StableDiffusionPipeline, "SDXL 1.0": StableDiffusionXLPipeline}
EARLY_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def find(path, base_model="SD 1.5", configs=None):
    return find_checkpoint(path, name="Ink", base_model=base_model, configs=configs or {})


def build(path, base_model="SD 1.5", configs=None, settings=FLOAT32, factory=None):
    files = find(path, base_model, configs)
    return (factory or PipelineFactory(settings, CPU)).build(files, read_checkpoint(files, settings))


def weights(pipeline):
    """Of all components, by name."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}


def assert_equal_weights(found, expected):
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each architecture."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {base: save_checkpoint(folder / base, base_model=base, seed=4) for base in CLASSES}


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the SD 1.5 checkpoint, to be changed."""
    return shutil.copytree(folders["SD 1.5"], tmp_path / "copy")


@pytest.mark.parametrize("base_model", CLASSES)
def test_a_folder_is_loaded_as_diffusers_does(folders, base_model):
    expected = CLASSES[base_model].from_pretrained(folders[base_model], safety_checker=None)
    made = build(folders[base_model], base_model)
    assert type(made.pipeline) is CLASSES[base_model]
    assert_equal_weights(made.pipeline, expected)
    assert made.noise_schedule["beta_schedule"] == "scaled_linear"
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(made.pipeline, name)
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("base_model", CLASSES)
def test_a_single_file_is_loaded_as_diffusers_does(tmp_path, base_model):
    path = save_single_file(tmp_path / "one.safetensors", base_model=base_model, seed=4)
    config = save_config(tmp_path / "config", base_model=base_model)
    expected = CLASSES[base_model].from_single_file(str(path), config=str(config), local_files_only=True)
    assert_equal_weights(build(path, base_model, {base_model: config}).pipeline, expected)


def test_a_single_file_needs_a_configuration(tmp_path):
    path = save_single_file(tmp_path / "one.safetensors")
    with pytest.raises(
        RenderError, match="is a single file. Name in `configs` a folder with the configuration of SD 1"
    ):
        find(path)
    with pytest.raises(RenderError, match="model_index.json can't be read"):
        find(path, configs={"SD 1.5": tmp_path})


def unfit(match, *args, **options):
    with pytest.raises(RenderError, match=match) as caught:
        build(*args, **options)
    assert caught.value.failure.reason == "wrong_architecture"
    assert str(caught.value).startswith("Ink: ")


def test_another_architecture_is_refused(folders, tmp_path):
    unfit("has no weights for its text_encoder_2", folders["SD 1.5"], "SDXL 1.0")
    unfit("is not SD 1.5: its parts are .*StableDiffusionXLPipeline", folders["SDXL 1.0"], "SD 1.5")
    configs = {base: save_config(tmp_path / base, base_model=base) for base in CLASSES}
    sd = save_single_file(tmp_path / "sd.safetensors")
    xl = save_single_file(tmp_path / "xl.safetensors", base_model="SDXL 1.0")
    unfit("the catalogue says SDXL 1.0, but .* is SD 1.5", sd, "SDXL 1.0", configs)
    unfit("the catalogue says SD 1.5, but .* is SDXL 1.0", xl, "SD 1.5", configs)
    unfit("is not SD 1.5: its parts", sd, "SD 1.5", {"SD 1.5": configs["SDXL 1.0"]})
    wide = save_single_file(tmp_path / "wide.safetensors", width=32)
    unfit(
        r"of the unet in .* don't fit the configuration .* should be \(16, 4, 3, 3\), but is \(32,",
        wide,
        "SD 1.5",
        configs,
    )
    save_file({"lora.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    unfit("lacks a denoiser, an autoencoder or a text", tmp_path / "other.safetensors", "SD 1.5", configs)


def test_missing_weights_are_noticed(folder, tmp_path):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["decoder.conv_out.bias"]
    save_file(state, path)
    unfit("1 of .* weights of the vae .*: decoder.conv_out.bias should be .*, but is missing", folder)
    single, config = save_single_file(tmp_path / "a.safetensors"), save_config(tmp_path / "config")
    state = load_file(single)
    del state["model.diffusion_model.out.2.weight"]
    save_file(state, single)
    unfit("1 of .* weights of the unet", single, configs={"SD 1.5": config})
    path.unlink()
    unfit("has no weights for its vae", folder)


def test_a_file_that_was_truncated_after_it_was_found_is_corrupt(folder):
    files = find(folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RenderError, match="Ink: .*diffusion_pytorch_model.safetensors ends in the middle") as caught:
        read_checkpoint(files, FLOAT32)
    assert caught.value.failure.reason == "corrupt"


def test_names_of_early_checkpoints_are_understood(folders, folder):
    """As in the folder of Stable Diffusion 1.5 itself, whose text encoder has a buffer more, too."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    early = {}
    for key, value in load_file(path).items():
        for now, then in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            key = key.replace(now, then)
        early[key] = value
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in early
    save_file(early, path)
    path = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    assert_equal_weights(build(folder).pipeline, build(folders["SD 1.5"]).pipeline)


def test_half_precision_files_and_shards_are_read(folders, folder):
    expected = weights(build(folders["SD 1.5"]).pipeline)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    path.unlink()
    for number in (0, 1):
        shard = dict(list(state.items())[number::2])
        save_file(shard, path.with_name(f"{path.stem}-0000{number + 1}-of-00002.safetensors"))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
    path.unlink()
    found = weights(build(folder).pipeline)
    for key, value in expected.items():
        assert torch.equal(found[key], value.half().float() if key.startswith("vae.") else value)


@pytest.mark.parametrize("base_model", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_are_those_that_will_be_taken_in_each_precision(folders, base_model, dtype):
    settings = RenderSettings(dtype=dtype)
    pipeline = build(folders[base_model], base_model, settings=settings).pipeline
    taken = sum(value.nbytes for value in weights(pipeline).values())
    assert checkpoint_bytes(find(folders[base_model], base_model), settings) == taken
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == getattr(torch, dtype)
    overflows = dtype == "float16" and base_model == "SDXL 1.0"
    assert pipeline.vae.dtype == (torch.float32 if overflows else getattr(torch, dtype))


def test_the_next_checkpoint_of_a_kind_gets_the_modules_of_the_one_that_was_freed(folders, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=9)
    config = json.loads((other / "unet" / "config.json").read_text())
    config |= {"_name_or_path": "elsewhere", "_diffusers_version": "0.1"}
    (other / "unet" / "config.json").write_text(json.dumps(config))
    factory = PipelineFactory(FLOAT32, CPU)
    first = build(folders["SD 1.5"], factory=factory)
    second = build(other, factory=factory)
    assert second.pipeline is not first.pipeline  # the first is in use
    factory.free(first)
    assert sum(parameter.nbytes for parameter in first.pipeline.unet.parameters()) == 0
    parameter = first.pipeline.unet.conv_in.weight
    third = build(other, factory=factory)
    assert third.pipeline is first.pipeline and third.pipeline.unet.conv_in.weight is parameter
    assert_equal_weights(third.pipeline, second.pipeline)


def test_another_configuration_is_another_kind(folders, folder):
    factory = PipelineFactory(FLOAT32, CPU)
    factory.free(build(folders["SD 1.5"], factory=factory))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    made = build(folder, factory=factory)
    assert made.noise_schedule["prediction_type"] == "v_prediction"
    assert build(folders["SD 1.5"], factory=factory).noise_schedule["prediction_type"] == "epsilon"


def test_a_checkpoint_that_does_not_fit_leaves_the_spare_modules_as_they_were(folders, folder):
    factory = PipelineFactory(FLOAT32, CPU)
    first = build(folders["SD 1.5"], factory=factory)
    factory.free(first)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value[:1].clone() for key, value in load_file(path).items()}, path)
    unfit("of the vae", folder, factory=factory)
    again = build(folders["SD 1.5"], factory=factory)
    assert again.pipeline is first.pipeline
    assert_equal_weights(
        again.pipeline, StableDiffusionPipeline.from_pretrained(folders["SD 1.5"], safety_checker=None)
    )


def test_spare_modules_are_limited(folders):
    factory = PipelineFactory(FLOAT32, CPU, max_spares=1)
    made = [build(folders[base], base, factory=factory) for base in CLASSES]
    for one in made:
        factory.free(one)
    assert list(factory._spares) == [made[1].kind]


def test_a_scheduler_has_the_noise_schedule_of_the_checkpoint_and_nothing_else_of_its_scheduler():
    trained = {
        "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True,
    }  # fmt: skip
    scheduler = make_scheduler(scheduler_spec("Euler"), trained, 5, [0])
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr"):
        assert scheduler.config[key] == trained[key]
    assert scheduler.config.timestep_spacing == "linspace" and scheduler.config.use_karras_sigmas is False
    assert scheduler.config.steps_offset == 0
    lms = make_scheduler(scheduler_spec("LMS"), trained, 5, [0])  # it has no rescale_betas_zero_snr
    assert lms.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("sampler", [row.sampler for row in scheduler_table().values() if row.scheduler])
def test_every_scheduler_steps_from_the_first_level_as_often_as_asked(sampler):
    spec = scheduler_table()[sampler]
    if spec.seeded:
        pytest.importorskip("torchsde")
    scheduler = make_scheduler(spec, {"beta_schedule": "scaled_linear"}, 6, [1, 2])
    assert "timesteps" in inspect.signature(scheduler.set_timesteps).parameters or not spec.time_steps
    scheduler.set_timesteps(6, device="cpu")
    assert getattr(scheduler, "begin_index", 0) == 0
    calls = len(scheduler.timesteps)
    assert calls == (11 if spec.calls_per_step == 2 else 7 if sampler.startswith("PLMS") else 6)
