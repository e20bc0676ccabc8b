"""Generation data as the WebUI and Civitai write it: what is read out of it, and that nothing in it raises."""

import json
import random
import re
import time
from dataclasses import asdict

import pytest

from align.bench.infotext import (
    Generation,
    Lora,
    Unusable,
    is_image_to_image,
    parse_infotext,
    parse_prompt,
    parse_size,
    plain_prompt,
    read_generation,
)

META = {
    "prompt": "a fox",
    "negativePrompt": "blurry",
    "sampler": "Euler a",
    "steps": 20,
    "cfgScale": 7,
    "Size": "512x768",
}


def read(**changes):
    """`read_generation` of a sound meta with these changes; None removes a field."""
    return read_generation({key: value for key, value in (META | changes).items() if value is not None})


def read_well(**changes):
    generation = read(**changes)
    assert isinstance(generation, Generation), generation
    return generation


def test_a_sound_meta_is_read_in_our_units():
    assert read() == Generation("a fox", "blurry", "Euler a", 20, 7.0, 512, 768, None, (), None, None, (), ())


# Tags


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a <lora:fox_v1:0.8> b", "a b", [("fox_v1", 0.8)]),
        ("<lora:fox_v1:0.8>, a", "a", [("fox_v1", 0.8)]),
        ("a, <lora:fox>, b", "a, b", [("fox", 1.0)]),
        ("a <LyCO:fox:-1.5>", "a", [("fox", -1.5)]),
        ("a < lora : fox v1 : .5 >", "a", [("fox v1", 0.5)]),
        ("a <lora:fox:1:0.5>", "a", [("fox", 1.0)]),  # text encoder, UNet
        ("a <lora:fox:0:0.5>", "a", [("fox", 0.5)]),  # UNet only
        ("a <lora:fox:te=0.7:unet=0.5>", "a", [("fox", 0.7)]),
        ("a <lora:fox:0.7:lbw=1,0,0>", "a", [("fox", 0.7)]),
        ("a <lora:fox:strong>", "a", [("fox", 1.0)]),
        ("a <lora:fox:0> b", "a b", []),
        ("a <lora:fox:0:0> b", "a b", []),
        ("a <lora:fox:0.5><lora:owl:1>", "a", [("fox", 0.5), ("owl", 1.0)]),
        ("a <lora:fox:0.5> <lora:FOX:0.6>", "a", [("FOX", 0.6)]),
        ("<<lora:fox:1>lora:owl:0.4> a", "a", [("fox", 1.0), ("owl", 0.4)]),
    ],
)
def test_lora_tags_leave_the_prompt_and_are_named(prompt, text, loras):
    parsed = parse_prompt(prompt)
    assert (parsed.text, parsed.loras) == (text, tuple(Lora(name, weight) for name, weight in loras))
    assert parsed.other_networks == ()


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a <lora:fox:0.8, b", "a, b"),
        ("a <lora:fox", "a"),
        ("a lora:fox:0.8> b", "a b"),
        ("a <lora::0.8> b", "a b"),
        ("a <lora> b", "a b"),
        ("a <lyco fox>\nb", "a b"),
        ("Lora: a girl", "Lora: a girl"),
        ("explora:1 >_<", "explora:1 >_<"),
    ],
)
def test_broken_tags_leave_the_prompt_but_name_nothing(prompt, text):
    assert parse_prompt(prompt) == (text, (), ())


def test_other_networks_are_named_apart():
    parsed = parse_prompt("a <hypernet:thick_v2:0.5> <b:c> fox")
    assert (parsed.text, parsed.loras, parsed.other_networks) == ("a fox", (), ("hypernet:thick_v2", "b:c"))


# Attention


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("(fox:1.2), ((red)), [small], {big}", "fox, red, small, big"),
        ("(a fox, (red:1.1) fur:1.3)", "a fox, red fur"),
        ("(fox : 1)", "fox"),
        ("(fox:.5) (owl:1.) (hen:-1.5)", "fox owl hen"),
        (r"fox \(animal\), (red_\(colour\):1.2)", "fox (animal), red_(colour)"),
        (r"\[a\] \{b\}", "[a] {b}"),
        ("a BREAK b, BREAK, c BREAKFAST break", "a, b, c BREAKFAST break"),
        ("[cat:dog:0.5] [tail:10] [(white fur:1.4)::5]", "cat:dog tail white fur"),
        ("(masterpiece:1.2, best quality), (fox:1.1", "masterpiece, best quality, fox"),
        ("16:9, ratio 1:1.5, at 10:30, :3, f/1.8", "16:9, ratio 1:1.5, at 10:30, :3, f/1.8"),
        ("a ,, ,b\t\n c ,", "a,b c"),
        ("a\0b\1c", "a b c"),
        ("", ""),
        ("((()))", ""),
    ],
)
def test_attention_syntax_vanishes(prompt, plain):
    assert plain_prompt(prompt) == plain


def test_attention_can_be_kept():
    generation = read_generation(META | {"prompt": "(fox:1.2) BREAK [red] <lora:x:1>"}, keep_attention=True)
    assert isinstance(generation, Generation)
    assert generation.prompt == "(fox:1.2) BREAK [red]"


def random_texts(count, alphabet):
    rng = random.Random(0)
    return ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(count)]


PIECES = [
    *"()[]{}<>:,.|\\ \n\t\0\x1f\"'~-_09", "lora", "lyco:", "<lora:", "x:0.8>", ":1.2", "::5", " BREAK ", "1.3)",
    "狐", "🦊", "\ud800", "é", "AND", "Steps: 20, ",
]  # fmt: skip


def test_any_text_can_be_read_and_reading_twice_changes_nothing():
    for prompt in random_texts(4000, PIECES):
        parsed = parse_prompt(prompt)
        again = parse_prompt(parsed.text)
        assert again == (parsed.text, (), ())
        assert not re.search(r"<\s*(?:lora|lyco)\b", parsed.text)
        plain = plain_prompt(parsed.text)
        assert not re.search(r"(?<!\\)[()\[\]{}]", plain) or "\\" in parsed.text
        if "\\" not in prompt:  # an escaped bracket is a bracket afterwards
            assert plain_prompt(plain) == plain
        assert isinstance(read_generation(META | {"prompt": prompt, "negativePrompt": prompt}), Generation | Unusable)
        parse_infotext(prompt)


@pytest.mark.parametrize(
    "text",
    ["<a:" + " " * 20_000, "<" * 20_000, "<lora:" * 3000, ":" * 20_000, ": " * 9000, "a:" + "1" * 20_000, "(" * 20_000,
     "a:1.1" * 4000, "\\" * 20_000, " ," * 9000, "<lora" * 3000 + ":x>" * 1000, 'a:"' * 6000, "a " * 9000],
)  # fmt: skip
def test_no_text_takes_long(text):
    start = time.perf_counter()
    parse_prompt(text)
    plain_prompt(text)
    parse_infotext("a fox\nSteps: 20, " + text)
    assert time.perf_counter() - start < 2


# Sizes and numbers


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("512x768", (512, 768)),
        (" 512 X 768 ", (512, 768)),
        ("512×768", (512, 768)),
        ("515x775", (512, 768)),  # floored to 8 pixels, as the autoencoder does
        ("7x9", (0, 8)),
        ("99999x1", (99992, 0)),
        ("100000x512", None),
        ("512", None),
        ("512x768x1", None),
        ("-512x768", None),
        ("", None),
        (None, None),
        (512, None),
        ([512, 768], None),
        ("9" * 100_000, None),
    ],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("steps", [20, "20", 20.0, " 20 "])
def test_numbers_may_be_text(steps):
    assert read_well(steps=steps, cfgScale="7.5").steps == 20


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        *[("steps", value, "steps_invalid") for value in
          (float("nan"), float("inf"), "nan", "1e999", -1, 0, 151, 20.5, "many", True, [], {}, 10**400, "")],
        *[("cfgScale", value, "cfg_invalid") for value in (float("nan"), 0.99, 30.01, "high", False, [7], 10**400)],
        *[("Size", value, "size_missing") for value in ("big", 512, {}, "100000x100000")],
        *[("prompt", value, "prompt_missing") for value in (5, ["a fox"], {"text": "a fox"}, "", " \n", ",,((", True)],
        ("prompt", "<lora:fox:1>", "prompt_missing"),
        ("prompt", "fox " * 5001, "prompt_too_long"),
        ("negativePrompt", "fox " * 5001, "prompt_too_long"),
        *[("sampler", value, "sampler_missing") for value in ("", "None", "undefined", 3, ["Euler a"])],
        ("sampler", "My Sampler", "sampler_unknown"),
        ("Schedule type", "Turbo", "sampler_unknown"),
    ],
)  # fmt: skip
def test_bad_values_name_their_rule(field, value, rule):
    found = read(**{field: value})
    assert isinstance(found, Unusable) and found.rule == rule


@pytest.mark.parametrize(
    ("field", "rule"),
    [("prompt", "prompt_missing"), ("sampler", "sampler_missing"), ("steps", "steps_invalid"),
     ("cfgScale", "cfg_invalid"), ("Size", "size_missing")],
)  # fmt: skip
def test_missing_fields_name_their_rule(field, rule):
    assert read(**{field: None}) == Unusable(rule, None)


@pytest.mark.parametrize("meta", [None, {}, [], [META], 5, True])
def test_what_is_no_meta_is_missing(meta):
    assert read_generation(meta) == Unusable("meta_missing", None)


@pytest.mark.parametrize("negative", [None, 5, ["blurry"], ""])
def test_a_negative_prompt_that_is_no_text_is_none(negative):
    assert read_well(negativePrompt=negative).negative_prompt == ""


def test_a_nested_meta_is_read():
    assert read_generation({"id": 3, "meta": META}) == read()


# Samplers


@pytest.mark.parametrize(
    ("sampler", "schedule", "version", "name"),
    [
        ("DPM++ 2M Karras", None, None, "DPM++ 2M Karras"),
        ("dpm++ 2m karras", None, None, "DPM++ 2M Karras"),
        ("DPM++ 2M", "Karras", "v1.9.0", "DPM++ 2M Karras"),
        ("DPM++ 2M", "Automatic", "v1.9.4", "DPM++ 2M Karras"),
        ("DPM++ 2M SDE", "Automatic", "v1.10.1", "DPM++ 2M SDE Exponential"),
        ("DPM++ 2M", None, "v1.9.4", "DPM++ 2M Karras"),
        ("DPM++ 2M", None, "v1.6.0", "DPM++ 2M"),
        ("DPM++ 2M", None, None, "DPM++ 2M"),
        ("DPM++ 2M", "Uniform", "v1.10.0", "DPM++ 2M"),
        ("DPM++ 2M Karras", "Automatic", "v1.10.0", "DPM++ 2M Karras"),
        ("DPM++ 2M", 5, ["v1.9"], "DPM++ 2M"),  # fields of the wrong type are as good as missing
    ],
)
def test_both_sampler_conventions(sampler, schedule, version, name):
    assert read_well(sampler=sampler, **{"Schedule type": schedule, "Version": version}).sampler == name


# What it was made with


def test_hashes_of_the_checkpoint_long_ones_first():
    generation = read_well(
        Model="dream_8",
        **{"Model hash": "abcdef12"},
        hashes={"model": "0123456789", "vae": "1111111111"},
        resources=[{"type": "model", "hash": "ABCDEF12"}, {"type": "lora", "hash": "2222222222"}, "odd", None],
    )
    assert generation.checkpoint_hashes == ("0123456789", "ABCDEF12")
    assert generation.checkpoint_name == "dream_8"


@pytest.mark.parametrize("value", ["None", "xyz", "12345", "g" * 10, 12345678, None, ["abcdef12"], "a" * 65])
def test_what_is_no_hash_is_ignored(value):
    generation = read_well(**{"Model hash": value, "Model": 5}, hashes={"model": value}, resources={"type": "model"})
    assert (generation.checkpoint_hashes, generation.checkpoint_name) == ((), None)


def test_loras_of_resources_and_addnet_count_once_each():
    generation = read_well(
        prompt="a fox <lora:Fox:0.8>",
        resources=[
            {"type": "lora", "name": "fox", "weight": 0.8},
            {"type": "locon", "name": "owl", "weight": None},
            {"type": "lora", "name": "off", "weight": 0},
            {"type": "lora", "name": 5},
            {"type": ["lora"], "name": "odd"},
            {"type": {"a": 1}, "name": "odd"},
        ],
        **{"AddNet Model 1": "hen_v2(0a1b2c)", "AddNet Weight A 1": "0.6", "AddNet Model 2": "None"},
        **{"AddNet Model 3": "off_v1(00)", "AddNet Weight A 3": "0", "AddNet Model 6": "sixth(00)"},
    )
    assert generation.loras == (Lora("Fox", 0.8), Lora("owl", 1.0), Lora("hen_v2", 0.6))


def test_civitais_own_generator_names_versions():
    generation = read_well(
        civitaiResources=[
            {"type": "checkpoint", "modelVersionId": 11},
            {"type": "lora", "modelVersionId": 22, "weight": 0.7},
            {"type": "LoCon", "modelVersionId": "33"},
            {"type": "lora", "modelVersionId": 44, "weight": 0},
        ]
    )
    assert generation.checkpoint_version_id == 11
    assert generation.loras == (Lora(None, 0.7, 22),)


def test_two_checkpoints_are_none():
    resources = [{"type": "checkpoint", "modelVersionId": number} for number in (11, 12)]
    assert read_well(civitaiResources=resources).checkpoint_version_id is None


def test_civitais_resources_do_not_repeat_tags():
    generation = read_well(
        prompt="a fox <lora:fox:0.8>", civitaiResources=[{"type": "lora", "modelVersionId": 22, "weight": 0.8}]
    )
    assert generation.loras == (Lora("fox", 0.8),)


# Image to image


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"Denoising strength": "0.5"}, True),
        ({"Denoising strength": "0.5", "Hires upscale": "2"}, False),
        ({"Denoising strength": "0.5", "Hires upscaler": "Latent"}, False),
        ({"Denoising strength": "0.5", "Hires resize": "1024x1024"}, False),
        ({"Denoising strength": "0", "First pass size": "0x0"}, False),
        ({"Denoising strength": "0.5", "Mask blur": "4"}, True),
    ],
)
def test_a_denoising_strength_without_hires_fix_is_image_to_image(fields, expected):
    assert is_image_to_image(fields) is expected
    found = read_generation(META | fields, allow_image_to_image=False)
    assert isinstance(found, Unusable) == expected
    assert isinstance(read_generation(META | fields), Generation)


# Raw infotext

INFOTEXT = """a fox, (red:1.2)
in the snow <lora:fox_v1:0.8>
Negative prompt: blurry, text
ugly
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1, Size: 512x768, Model hash: 0123456789, \
Model: dream_8, Denoising strength: 0.4, Hires upscale: 2, ENSD: 31337, Lora hashes: "fox_v1: aa, owl: bb", \
Version: v1.9.4"""


def test_raw_infotext():
    meta = parse_infotext(INFOTEXT)
    assert meta["prompt"] == "a fox, (red:1.2)\nin the snow <lora:fox_v1:0.8>"
    assert meta["negativePrompt"] == "blurry, text\nugly"
    assert meta["Lora hashes"] == "fox_v1: aa, owl: bb"
    assert (meta["steps"], meta["seed"], meta["ENSD"]) == ("25", "1", "31337")
    assert read_generation(INFOTEXT, allow_image_to_image=False) == Generation(
        prompt="a fox, red in the snow",
        negative_prompt="blurry, text ugly",
        sampler="DPM++ 2M Karras",
        steps=25,
        cfg_scale=7.5,
        width=512,
        height=768,
        clip_skip=None,
        checkpoint_hashes=("0123456789",),
        checkpoint_name="dream_8",
        checkpoint_version_id=None,
        loras=(Lora("fox_v1", 0.8),),
        other_networks=(),
    )


@pytest.mark.parametrize(
    ("text", "prompt", "negative"),
    [("a fox", "a fox", ""), ("Negative prompt: blurry", "", "blurry"), ("", "", ""),
     ("Steps: 20, Sampler: Euler", "", ""), ("a fox\nNegative prompt: blurry\n", "a fox", "blurry")],
)  # fmt: skip
def test_infotext_may_lack_parts(text, prompt, negative):
    meta = parse_infotext(text)
    assert (meta["prompt"], meta["negativePrompt"]) == (prompt, negative)


def test_generations_can_be_stored():
    generation = read_well(prompt="a fox \ud800 <lora:f\udfff:1>")
    assert json.loads(json.dumps(asdict(generation)))["loras"] == [["f\udfff", 1.0, None]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2", 2), (1, 1), ("2,", 2), ("2.0", 2), (12, 12), ("0", None), (13, None), ("1.5", None), ("two", None),
     (None, None), (True, None), ([2], None)],
)  # fmt: skip
def test_clip_skip_is_a_number_of_layers_or_not_known(value, expected):
    assert read_well(**{"Clip skip": value}).clip_skip == expected


def test_civitai_own_generator_spells_clip_skip_another_way():
    assert read_well(clipSkip=2).clip_skip == 2
