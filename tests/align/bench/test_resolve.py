"""Which version an image demonstrates: one hand-made image per rule.

The index below holds checkpoints of two models, a re-upload, a pair whose short hashes collide, an SDXL checkpoint and
LoRAs; `image` is a sound picture of nothing yet.
"""

import pytest

from align.bench.resolve import Demonstration, Dropped, VersionIndex

DREAM_1, DREAM_2, WAVE, REUPLOAD, XL, POOR = 11, 12, 20, 31, 40, 50
FOX_1, FOX_2, OWL, FOX_XL, POOR_LORA = 101, 102, 110, 120, 130


def sha(number):
    return f"{number:02X}" * 32


def checkpoint(version_id, model_id, stems, *, shas=None, short=None, base_model="SD 1.5"):
    shas = shas or [sha(version_id)]
    hashes = [*shas, *(value[:10] for value in shas), *([short] if short else [])]
    return {"version_id": version_id, "model_id": model_id, "type": "Checkpoint", "base_model": base_model,
            "hashes": hashes, "sha256": shas, "stems": stems}  # fmt: skip


def lora(version_id, model_id, stems, base_model="SD 1.5"):
    return {"version_id": version_id, "model_id": model_id, "type": "LoRA", "base_model": base_model,
            "hashes": [sha(version_id)], "sha256": [sha(version_id)], "stems": stems}  # fmt: skip


@pytest.fixture
def index():
    index = VersionIndex()
    for draft in (
        checkpoint(REUPLOAD, 30, ["dream_one_copy"], shas=[sha(DREAM_1), sha(99)], short="AAAA1111"),
        checkpoint(DREAM_1, 10, ["dream_v1"], short="AAAA1111"),
        checkpoint(DREAM_2, 10, ["dream_v2"], short="BBBB2222"),
        checkpoint(WAVE, 21, ["wave"], short="BBBB2222"),
        checkpoint(XL, 41, ["big"], base_model="SDXL 1.0"),
        lora(FOX_1, 100, ["fox_v1", "fox"]),
        lora(FOX_2, 100, ["fox_v2"]),
        lora(OWL, 111, ["owl"]),
        lora(FOX_XL, 121, ["fox_xl"], base_model="SDXL 1.0"),
    ):
        index.add(draft, good=True)
    index.add(checkpoint(POOR, 51, ["poor"]), good=False)
    index.add(lora(POOR_LORA, 131, ["poor_lora"]), good=False)
    index.add_unavailable([sha(77), sha(77)[:10]])
    return index


def image(*hashes, name=None, loras=(), stated=None, networks=(), size=(512, 768)):
    return {"checkpoint_hashes": hashes, "checkpoint_name": name, "checkpoint_version_id": stated, "loras": loras,
            "other_networks": networks, "width": size[0], "height": size[1]}  # fmt: skip


FOX = ("fox_v1", 0.8, None)
CHECKPOINT_IMAGES = [
    ("own", image(sha(DREAM_1)[:10]), DREAM_1, DREAM_1),
    ("own, by its full hash", image(sha(DREAM_2)), DREAM_2, DREAM_2),
    ("a sibling's picture", image(sha(DREAM_2)[:10]), DREAM_1, DREAM_2),
    ("another model's picture", image(sha(WAVE)[:10]), DREAM_1, WAVE),
    ("the gallery wins over its re-upload", image(sha(DREAM_1)[:10]), REUPLOAD, REUPLOAD),
    ("a re-upload, seen from elsewhere: the oldest", image(sha(DREAM_1)[:10]), WAVE, DREAM_1),
    ("a short hash of two files: the gallery", image("BBBB2222"), WAVE, WAVE),
    ("a short hash of two files: the name", image("BBBB2222", name="Wave"), DREAM_1, WAVE),
    ("a short hash of two files, no help", image("BBBB2222"), DREAM_1, Dropped("base_ambiguous", "BBBB2222")),
    ("a short hash of two files, another name", image("BBBB2222", name="x"), XL, Dropped("base_ambiguous", "BBBB2222")),
    ("a long hash before a short one", image(sha(WAVE)[:10], "AAAA1111"), DREAM_1, WAVE),
    ("an unknown hash before a known one", image("0" * 10, "BBBB2222"), WAVE, WAVE),
    ("unknown", image("0" * 10), WAVE, Dropped("base_unresolved", "0" * 10)),
    ("unavailable", image(sha(77)[:10]), WAVE, Dropped("base_unavailable", sha(77)[:10])),
    ("no hash", image(), WAVE, Dropped("checkpoint_hash_missing", None)),
    ("no hash, only a name", image(name="wave"), WAVE, Dropped("checkpoint_hash_missing", None)),
    ("stated by the site", image(stated=WAVE), DREAM_1, WAVE),
    ("stated, against its hash", image(sha(DREAM_1), stated=WAVE), DREAM_1, WAVE),
    ("stated, but not there", image(stated=999), WAVE, Dropped("base_unresolved", 999)),
    ("stated, but a LoRA", image(stated=OWL), WAVE, Dropped("base_unresolved", OWL)),
    ("with a LoRA", image(sha(WAVE), loras=[FOX]), WAVE, Dropped("checkpoint_with_lora", "fox_v1")),
    ("below quality", image(sha(POOR)), POOR, Dropped("below_quality", POOR)),
    ("below quality, in a good gallery", image(sha(POOR)), WAVE, Dropped("below_quality", POOR)),
    ("good, in a gallery below quality", image(sha(WAVE)), POOR, WAVE),
    ("with a hypernetwork", image(sha(WAVE), networks=("hypernet:x",)), WAVE, Dropped("other_network", "hypernet:x")),
    ("of the other architecture", image(sha(XL), size=(1024, 1024)), WAVE, XL),
]


def cases(named):
    return [pytest.param(*case[1:], id=case[0]) for case in named]


@pytest.mark.parametrize(("made", "gallery", "expected"), cases(CHECKPOINT_IMAGES))
def test_images_of_checkpoints(index, made, gallery, expected):
    wanted = expected if isinstance(expected, Dropped) else Demonstration(expected, None, None)
    assert index.demonstration(made, gallery) == wanted


BASE = sha(DREAM_1)[:10]
LORA_IMAGES = [
    ("own", image(BASE, loras=[FOX]), FOX_1, (FOX_1, DREAM_1, 0.8)),
    ("own, any case", image(BASE, loras=[("FOX", 1.0, None)]), FOX_1, (FOX_1, DREAM_1, 1.0)),
    ("a sibling's picture", image(BASE, loras=[("fox_v2", 0.5, None)]), FOX_1, (FOX_2, DREAM_1, 0.5)),
    ("renamed by its author", image(BASE, loras=[("my fox", 0.5, None)]), FOX_1, (FOX_1, DREAM_1, 0.5)),
    ("another LoRA", image(BASE, loras=[("owl", 0.5, None)]), FOX_1, Dropped("other_lora", "owl")),
    ("stated by the site", image(BASE, loras=[(None, 0.5, OWL)]), FOX_1, (OWL, DREAM_1, 0.5)),
    ("stated, but not there", image(BASE, loras=[(None, 0.5, 999)]), FOX_1, Dropped("other_lora", 999)),
    ("stated, but a checkpoint", image(BASE, loras=[(None, 0.5, WAVE)]), FOX_1, Dropped("other_lora", WAVE)),
    ("two", image(BASE, loras=[FOX, ("owl", 1.0, None)]), FOX_1, Dropped("several_loras", ["fox_v1", "owl"])),
    ("untagged", image(BASE), FOX_1, (FOX_1, DREAM_1, None)),
    ("base is a re-upload: the oldest", image(BASE, name="dream_one_copy", loras=[FOX]), FOX_1,
     (FOX_1, DREAM_1, 0.8)),
    ("a short hash of two uploads: the name", image("AAAA1111", name="dream_v1", loras=[FOX]), FOX_1,
     (FOX_1, DREAM_1, 0.8)),
    ("base is ambiguous", image("BBBB2222", loras=[FOX]), FOX_1, Dropped("base_ambiguous", "BBBB2222")),
    ("base is named", image("BBBB2222", name="dream_v2", loras=[FOX]), FOX_1, (FOX_1, DREAM_2, 0.8)),
    ("base is unavailable", image(sha(77), loras=[FOX]), FOX_1, Dropped("base_unavailable", sha(77))),
    ("base is unknown", image("0" * 10, loras=[FOX]), FOX_1, Dropped("base_unresolved", "0" * 10)),
    ("base is not said", image(loras=[FOX]), FOX_1, Dropped("checkpoint_hash_missing", None)),
    ("base is stated", image(stated=DREAM_2, loras=[FOX]), FOX_1, (FOX_1, DREAM_2, 0.8)),
    ("base is a LoRA's file", image(sha(OWL), loras=[FOX]), FOX_1, Dropped("base_unresolved", sha(OWL))),
    ("base of another architecture", image(sha(XL), loras=[FOX]), FOX_1,
     Dropped("base_of_other_architecture", "SDXL 1.0")),
    ("SDXL on SD 1.5", image(BASE, loras=[("fox_xl", 1.0, None)]), FOX_XL,
     Dropped("base_of_other_architecture", "SD 1.5")),
    ("SDXL on SDXL", image(sha(XL), loras=[("fox_xl", 1.0, None)], size=(1024, 1024)), FOX_XL, (FOX_XL, XL, 1.0)),
    ("below quality", image(BASE, loras=[("poor_lora", 1.0, None)]), POOR_LORA, Dropped("below_quality", POOR_LORA)),
    ("base below quality is a base", image(sha(POOR), loras=[FOX]), FOX_1, (FOX_1, POOR, 0.8)),
    ("with a hypernetwork", image(BASE, loras=[FOX], networks=("a:b",)), FOX_1, Dropped("other_network", "a:b")),
]  # fmt: skip


@pytest.mark.parametrize(("made", "gallery", "expected"), cases(LORA_IMAGES))
def test_images_of_loras(index, made, gallery, expected):
    wanted = expected if isinstance(expected, Dropped) else Demonstration(*expected)
    assert index.demonstration(made, gallery) == wanted


def test_untagged_images_can_be_refused(index):
    assert index.demonstration(image(BASE), FOX_1, keep_untagged=False) == Dropped("lora_not_named", None)
    assert index.demonstration(image(BASE, loras=[FOX]), FOX_1, keep_untagged=False).version_id == FOX_1


def test_a_short_hash_of_one_file_published_twice_is_not_ambiguous(index):
    # Both versions' only file, published twice under different models: no name needed.
    for version_id, model_id in ((61, 60), (63, 62)):
        index.add(checkpoint(version_id, model_id, [f"copy_{version_id}"], shas=[sha(88)], short="CCCC3333"), good=True)
    assert index.checkpoint(image("CCCC3333"), WAVE) == 61


@pytest.mark.parametrize(
    ("size", "field"), [((0, 512), "width"), ((512, 248), "height"), ((1544, 512), "width"), ((512, 99_992), "height")]
)
def test_sizes_the_architecture_cannot_draw_are_dropped(index, size, field):
    dropped = index.demonstration(image(sha(WAVE), size=size), WAVE)
    assert dropped.rule == "size_out_of_range" and f"`{field}` must be 256 to 1536 pixels" in dropped.value


def test_a_version_is_known_by_its_first_record(index):
    index.add(lora(WAVE, 999, ["impostor"]), good=False)
    assert index.known[WAVE].type == "Checkpoint" and index.known[WAVE].good
    assert index.demonstration(image(sha(WAVE)), WAVE) == Demonstration(WAVE, None, None)
