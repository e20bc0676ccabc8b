"""The table against k-diffusion, which A1111 samples with, on a problem whose denoiser is known in closed form."""

import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats

from rollouts.samplers import KNOWN_SAMPLERS, SCHEDULES
from rollouts.schedulers import (
    Deviation,
    SamplerError,
    render_table,
    scheduler_spec,
    scheduler_table,
    time_steps,
)

NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)
SIGMAS = ((1 - ALPHAS) / ALPHAS) ** 0.5
MEAN, DEVIATION = torch.tensor([0.3, -0.7, 1.2, 0.0]), torch.tensor([0.5, 0.2, 0.9, 0.05])
NOISES = [torch.randn(1, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(100)]


@pytest.fixture(scope="module")
def sampling():
    """k_diffusion.sampling, without the package's own imports of everything that training takes."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or importlib.util.find_spec("torchdiffeq") is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion torchdiffeq")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    yield importlib.import_module("k_diffusion.sampling")
    for name in [name for name in sys.modules if name.split(".")[0] == "k_diffusion"]:
        del sys.modules[name]


def denoise(x, sigma):
    """What the best denoiser answers if pictures are drawn from N(MEAN, DEVIATION²)."""
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def sigma_at(steps):
    """A1111's noise level at a time step, between the trained ones on a logarithmic scale."""
    steps = torch.as_tensor(steps, dtype=torch.float64)
    low, high, part = steps.floor().long(), steps.ceil().long(), steps.frac()
    return ((1 - part) * SIGMAS.log()[low] + part * SIGMAS.log()[high]).exp()


def a1111_sigmas(schedule, n, sampling):
    """A1111's modules/sd_schedulers.py, in short."""
    low, high = SIGMAS[0].item(), SIGMAS[-1].item()
    if schedule == "Karras":
        return sampling.get_sigmas_karras(n, low, high).double()
    if schedule == "Exponential":
        return sampling.get_sigmas_exponential(n, low, high).double()
    if schedule == "Polyexponential":
        return sampling.get_sigmas_polyexponential(n, low, high).double()
    if schedule == "Beta":
        levels = torch.tensor([low + stats.beta.ppf(x, 0.6, 0.6) * (high - low) for x in 1 - np.linspace(0, 1, n)])
    elif schedule == "SGM Uniform":
        levels = sigma_at(torch.linspace(999, 0, n + 1, dtype=torch.float64)[:-1])
    elif schedule == "Simple":
        levels = torch.tensor([SIGMAS[-(1 + int(x * 1000 / n))].item() for x in range(n)])
    else:
        levels = sigma_at(torch.linspace(999, 0, n, dtype=torch.float64))
    return sampling.append_zero(levels.double())


def draw(spec, n, monkeypatch):
    """Run diffusers' scheduler on the denoiser; returns the picture and the number of calls of the model."""
    scheduler = getattr(diffusers, spec.scheduler)(**NOISE_SCHEDULE, **spec.config)
    if spec.time_steps:
        scheduler.set_timesteps(timesteps=time_steps(spec.time_steps, n))
    else:
        scheduler.set_timesteps(n)
    # Beta's levels crowd at both ends, where rounded time steps repeat and diffusers would begin at the second of two.
    scheduler.set_begin_index(0)
    noises = iter(NOISES[1:])
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: next(noises))
    x, calls = NOISES[0] * scheduler.init_noise_sigma, 0
    for step in scheduler.timesteps:
        shrunk = (x / scheduler.scale_model_input(x, step)).mean()
        if shrunk > 1 + 1e-9:  # x has variance 1 + sigma²
            sigma, unscaled = (shrunk**2 - 1).sqrt(), x
        else:  # x has variance 1
            if scheduler.step_index is None:
                scheduler._init_step_index(step)
            sigma = scheduler.sigmas[scheduler.step_index].double()
            unscaled = x * (sigma**2 + 1).sqrt()
        x = scheduler.step((unscaled - denoise(unscaled, sigma)) / sigma, step, x).prev_sample
        calls += 1
    return x, calls


def reference(sampler, sigmas, sampling):
    """Run k-diffusion on the denoiser with the same noise."""
    function, stochastic, options = {
        "Euler": (sampling.sample_euler, False, {}),
        "Euler a": (sampling.sample_euler_ancestral, True, {}),
        "LMS": (sampling.sample_lms, False, {}),
        "Heun": (sampling.sample_heun, False, {}),
        "DPM++ 2M": (sampling.sample_dpmpp_2m, False, {}),
        "DPM++ 2M SDE": (sampling.sample_dpmpp_2m_sde, True, {}),
        "DPM++ 2M SDE Heun": (sampling.sample_dpmpp_2m_sde, True, {"solver_type": "heun"}),
    }[sampler]
    noises = iter(NOISES[1:])
    if stochastic:
        options |= {"noise_sampler": lambda *levels: next(noises)}
    # Where diffusers begins with variance 1, that is 0.2% more noise than A1111's.
    start = NOISES[0] * ((sigmas[0] ** 2 + 1).sqrt() if sampler.startswith("DPM++") else sigmas[0])
    if sampler == "LMS":
        sigmas = sigmas.float()  # its coefficients are integrated by numpy, element by element
    return function(lambda x, s, **_: denoise(x, s.view(-1, 1, 1, 1)), start, sigmas, disable=True, **options)


ALIKE = ("Euler", "LMS", "Heun", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun")


@pytest.mark.parametrize("steps", [20, 25, 40])
@pytest.mark.parametrize("schedule", ["Uniform", *(s for s in SCHEDULES if s not in ("KL Optimal", "Normal"))])
@pytest.mark.parametrize("sampler", ALIKE)
def test_exact_rows_and_rows_with_equal_noise_give_k_diffusions_picture(
    sampling, monkeypatch, sampler, schedule, steps
):
    spec = scheduler_table()[sampler if schedule == "Uniform" else f"{sampler} {schedule}"]
    assert spec.deviation == (Deviation.DISTRIBUTION if "SDE" in sampler else Deviation.EXACT)
    found, calls = draw(spec, steps, monkeypatch)
    expected = reference(sampler, a1111_sigmas(schedule, steps, sampling), sampling)
    # Rounding time steps to trained ones moves a noise level by half a step at most.
    tolerance = 3e-2 if schedule in ("SGM Uniform", "Uniform") else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, check_dtype=False)
    assert calls == (2 * steps - 1 if spec.calls_per_step == 2 else steps)


@pytest.mark.parametrize("schedule", ["Uniform", "Simple"])
def test_euler_a_with_equal_noise_gives_k_diffusions_picture(sampling, monkeypatch, schedule):
    spec = scheduler_table()["Euler a" if schedule == "Uniform" else f"Euler a {schedule}"]
    assert spec.deviation == Deviation.DISTRIBUTION
    found, _ = draw(spec, 25, monkeypatch)
    expected = reference("Euler a", a1111_sigmas(schedule, 25, sampling), sampling)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, check_dtype=False)


def test_a_wrong_row_would_be_noticed(sampling, monkeypatch):
    """The tolerance is far below the difference between samplers."""
    expected = reference("DPM++ 2M", a1111_sigmas("Karras", 20, sampling), sampling)
    for wrong in ("DPM++ 2M", "Euler Karras", "DPM++ 2M Exponential", "DPM++ 2M SDE Karras"):
        found, _ = draw(scheduler_table()[wrong], 20, monkeypatch)
        assert (found - expected).abs().max() > 3e-3, wrong


def test_ddim_is_ddim(monkeypatch):
    """Song et al. 2020, Eq. 12 with sigma 0, on A1111's time steps: range(0, 1000, 1000 // n) + 1."""
    n = 20
    steps = [step + 1 for step in range(0, 1000, 1000 // n)]
    x = NOISES[0]
    for step, before in zip(reversed(steps), [*reversed(steps[:-1]), 0], strict=True):
        alpha, alpha_before = ALPHAS[step], ALPHAS[before]
        sigma = ((1 - alpha) / alpha).sqrt()
        noise = (x / alpha.sqrt() - denoise(x / alpha.sqrt(), sigma)) / sigma
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        x = alpha_before.sqrt() * clean + (1 - alpha_before).sqrt() * noise
    spec = scheduler_spec("DDIM")
    scheduler = getattr(diffusers, spec.scheduler)(**NOISE_SCHEDULE, **spec.config)
    scheduler.set_timesteps(n)
    found = NOISES[0]
    for step in scheduler.timesteps:
        alpha = ALPHAS[step]
        sigma, unscaled = ((1 - alpha) / alpha).sqrt(), found / alpha.sqrt()
        found = scheduler.step((unscaled - denoise(unscaled, sigma)) / sigma, step, found).prev_sample
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", sorted(KNOWN_SAMPLERS))
def test_every_known_sampler_has_a_row_that_diffusers_can_make(name):
    spec = scheduler_table()[name]
    assert spec.sampler == name
    if spec.deviation == Deviation.NONE:
        assert spec.scheduler is None and spec.reason
        with pytest.raises(SamplerError, match=re.escape(f"{name!r} can't be rendered: {spec.reason}")):
            scheduler_spec(name)
        return
    if spec.scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, spec.scheduler)(**NOISE_SCHEDULE, **spec.config)
    for key, value in spec.config.items():
        assert scheduler.config[key] == value
    if spec.deviation != Deviation.EXACT:
        assert spec.reason
    if spec.time_steps:
        scheduler.set_timesteps(timesteps=time_steps(spec.time_steps, 7))
        assert len(scheduler.timesteps) == 7
    else:
        scheduler.set_timesteps(7)


def test_a_schedule_that_a_class_lacks_is_a_substitute():
    row = scheduler_table()["Euler a Karras"]
    assert row.deviation == Deviation.SUBSTITUTE and "Karras is not in diffusers' class; uniform instead" in row.reason
    assert scheduler_table()["DPM++ 2M KL Optimal"].deviation == Deviation.SUBSTITUTE


def test_explicit_time_steps_by_hand():
    assert time_steps("uniform", 4) == [999, 666, 333, 0]
    assert time_steps("sgm_uniform", 4) == [999, 749, 500, 250]
    assert time_steps("simple", 4) == [999, 749, 499, 249]
    assert time_steps("uniform", 1) == [999]
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="`num_steps` must be from 1 to 1000"):
            time_steps("uniform", wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPM++ 2N Karras", "did you mean 'DPM\\+\\+ 2M Karras'"),
        ("x" * 500, "There is no sampler"),
        ("", "no sampler ''"),
    ],
)
def test_an_unknown_sampler_suggests_the_nearest(name, message):
    with pytest.raises(SamplerError, match=message) as caught:
        scheduler_spec(name)
    assert len(str(caught.value)) < 200


def test_both_spellings_find_the_row():
    assert scheduler_spec("dpm++ 2m karras") is scheduler_table()["DPM++ 2M Karras"]


def test_the_page_in_docs_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "samplers.md"
    assert page.read_text() == render_table()
