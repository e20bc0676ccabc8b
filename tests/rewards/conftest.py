"""Tiny real scorers, odd pictures, and where the answers of the official code are."""

import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens" / "rewards"

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY_BLIP = {
    "vision": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "med": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "vocab_size": 120,
        "max_position_embeddings": 64,
    },
    "mlp_input_size": 16,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), ",", "."]


@pytest.fixture(scope="session")
def goldens():
    """Folder with scores of the official packages."""
    if not GOLDENS.is_dir():
        pytest.skip(f"the answers of the official code are not at {GOLDENS}")
    return GOLDENS


@pytest.fixture(scope="session")
def pseudo_weights(goldens):
    """The rule that fills a list of keys with reproducible numbers."""
    sys.path.insert(0, str(goldens))
    try:
        import pseudo_weights
    finally:
        sys.path.remove(str(goldens))
    return lambda name: pseudo_weights.from_keys(json.loads((goldens / name).read_text()))


def randomize(module, seed=0):
    """Weights with some spread, so that no part of a model is without influence."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            norm = any(part in name.lower() for part in ("norm", "ln_"))
            offset = 1.0 if norm and name.endswith("weight") else 0.0
            scale = 1.5 * value[0].numel() ** -0.5 if value.ndim > 1 and "embed" not in name else 0.3
            value.copy_(offset + scale * torch.randn(value.shape, generator=generator))
    return module


@pytest.fixture(scope="session", name="randomize")
def randomize_fixture():
    """`randomize(module, seed)`: fill a module with reproducible weights."""
    return randomize


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """Path of the weights of an open_clip model of configuration TINY_CLIP."""
    import open_clip

    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file(randomize(open_clip.CLIP(**TINY_CLIP)).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """Folder with a BERT vocabulary of single letters."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return folder


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory):
    """Path of the weights of an ImageReward model of configuration TINY_BLIP."""
    from rewards.blip import TextConfig, VisionConfig
    from rewards.image_reward import ImageRewardModel

    model = ImageRewardModel(VisionConfig(**TINY_BLIP["vision"]), TextConfig(**TINY_BLIP["med"]), 16)
    path = tmp_path_factory.mktemp("blip") / "image_reward.pt"
    torch.save(randomize(model).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def hps(tiny_clip):
    """A tiny HPS v2."""
    from rewards import load_scorer

    return load_scorer("hps_v2", checkpoint=tiny_clip, config=TINY_CLIP, device="cpu", num_workers=2)


@pytest.fixture(scope="session")
def image_reward(tiny_blip, vocabulary):
    """A tiny ImageReward that reads letters."""
    from rewards import load_scorer

    return load_scorer(
        "image_reward", checkpoint=tiny_blip, config=TINY_BLIP, tokenizer=vocabulary, device="cpu", num_workers=2
    )


def picture(width=48, height=40, seed=0, mode="RGB"):
    """A picture of soft blobs, different for each seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 4), dtype=np.uint8)
    image = Image.fromarray(small, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.fixture(scope="session")
def serve_on_thread():
    """`with serve_on_thread(service) as url`: a RewardService behind a real socket of this machine."""
    return running


@contextmanager
def running(service):
    import uvicorn

    from rewards.serve import bind
    from rewards.service import build_app

    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(service), log_config=None, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def make_picture():
    """`make_picture(width, height, seed, mode)`: a picture of soft blobs, different for each seed."""
    return picture


@pytest.fixture(scope="session")
def tiny_clip_config():
    """open_clip configuration of `tiny_clip`."""
    return TINY_CLIP


@pytest.fixture(scope="session")
def tiny_blip_config():
    """ImageReward configuration of `tiny_blip`."""
    return TINY_BLIP


@pytest.fixture
def pictures():
    """Five pictures of different sizes and modes."""
    return [
        picture(48, 40, 0),
        picture(64, 64, 1, "L"),
        picture(20, 90, 2, "RGBA"),
        picture(32, 32, 3),
        picture(7, 5, 4, "P"),
    ]
