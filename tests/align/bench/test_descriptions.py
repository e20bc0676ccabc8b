"""Descriptions taken from model cards."""

import pytest

from align.bench.card_sentences import informative_sentences, names_a_subject
from align.bench.descriptions import Description, ExtractiveDescriber, ModelCard, extractive_description


def card(description=None, version=None, **fields):
    fields = {"key": "7", "name": "Foxes", "type": "LoRA", "base_model": "SD 1.5"} | fields
    return ModelCard(description_html=description, version_description_html=version, **fields)


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (
            "<p>Hi everyone!</p><p>Please support me on <a href='https://ko-fi.com/x'>Ko-fi</a>.</p>"
            "<h2>v2.0 update</h2><p>This LoRA draws <b>foxes</b> in the style of old woodcuts.</p>"
            "<p>Download the file to models/lora.</p>"
            "<p>Snowy forests are the scenes that suit it.</p><p>Use a weight of 0.8.</p><p>Licence: CreativeML.</p>",
            "This LoRA draws foxes in the style of old woodcuts. Snowy forests are the scenes that suit it.",
        ),
        ("<p>更新：v3发布。</p><p>这是一个水墨画风格的模型，适合山水和古风人物。请点赞！</p>",
         "这是一个水墨画风格的模型，适合山水和古风人物。 Tags: fox."),
        ("<p>アニメ風のイラストを生成するモデルです。フォローお願いします。</p>",
         "アニメ風のイラストを生成するモデルです。 Tags: fox."),
        ("<p>这是一个水墨画风格的模型。</p><p>This model paints in the style of ink wash.</p>",
         "This model paints in the style of ink wash. Tags: fox."),
        ("<p>¡Hola!</p><p>Este modelo genera personajes con estilo de cómic antiguo. Gracias por el apoyo.</p>",
         "Este modelo genera personajes con estilo de cómic antiguo. Tags: fox."),
        ("<p>LoRA of Link from The Legend of Zelda, for Sword Art Online fans and post-apocalyptic scenes</p>",
         "LoRA of Link from The Legend of Zelda, for Sword Art Online fans and post-apocalyptic scenes. Tags: fox."),
        ("<p>Foxes LoRA</p><p>1girl, solo, (fox ears:1.2), red hair</p><p>Style model of foxes in snow</p>",
         "Style model of foxes in snow."),
        ("<p>The image style was trained on\nwoodcuts</p>", "The image style was trained on woodcuts. Tags: fox."),
    ],
)  # fmt: skip
def test_takes_what_the_card_says_about_the_model(description, expected):
    assert extractive_description(card(description, tags=("fox",))) == expected


def test_as_many_tags_follow_as_fit():
    about = "<p>A model for painted castles at night.</p>"
    tags = ("castle", "gothic", "tower", "moonlight", "gothic")
    assert extractive_description(card(about, tags=tags), 240) == (
        "A model for painted castles at night. Tags: gothic, tower, moonlight."
    )
    assert extractive_description(card(about, tags=tags), 58) == (
        "A model for painted castles at night. Tags: gothic, tower."
    )
    assert extractive_description(card(about, tags=tags), 50) == "A model for painted castles at night."
    # A cut sentence is followed by nothing, although "Tags: x." would fit.
    assert extractive_description(card("A model for paintings extraordinarily old", tags=("x",)), 34) == (
        "A model for paintings"
    )


@pytest.mark.parametrize(
    "sentence",
    [
        "Support me with a drawing on Patreon.",
        "Please post images of girls here.",
        "Download the style to the folder of models.",
        "Version two draws a better face.",
        "Recommended weight for this style is high.",
        "Commercial use of the images is prohibited.",
        "I trained this style last summer.",
        "and also a painting style from games",
        "fox, red hair, snow, painting, forest",
        "Portrait, fox, red hair, snow, forest",
        "Style: /models/lora_of_foxes for painters",
        "Painted red foxes",
        "插画风格的模型，请点赞支持",
    ],
)
def test_sentences_on_anything_else_are_left_out(sentence):
    assert informative_sentences(f"{sentence}\nForests painted by moonlight.") == ["Forests painted by moonlight."]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [("Quiet evenings in watercolour, painted softly.", True), ("Wolves of the far north.", True),
     ("Merged from three others.", False), ("A LoRA model of everything.", False), ("水墨画风格的模型。", True)],
)  # fmt: skip
def test_a_subject_is_a_word_of_pictures_or_of_the_card_itself(sentence, expected):
    assert names_a_subject(sentence, ("Wolves LoRA model", "snow")) == expected


def test_version_notes_come_second():
    about = "<p>A model for painted castles at night.</p>"
    assert extractive_description(card("<p>Thanks!</p>", about)) == "A model for painted castles at night."
    both = extractive_description(card("<p>A model for painted foxes in snow.</p>", about))
    assert both == "A model for painted foxes in snow."


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tags": ("fox", "wood cut", "fox"), "trigger_words": (" <lora:foxes:1>", "fx style,")},
         "SD 1.5 LoRA. Tags: fox, wood cut. Trigger words: fx style."),
        ({"type": "Checkpoint", "base_model": "SDXL 1.0", "tags": ("a<b>", "https://x.com")},
         "SDXL 1.0 checkpoint. Tags: a."),
        ({"trigger_words": ("fx",)}, "SD 1.5 LoRA. Trigger words: fx."),
        ({}, "SD 1.5 LoRA: Foxes."),
        ({"name": " <!-- x", "type": "", "base_model": ""}, "Text-to-image model."),
    ],
)  # fmt: skip
def test_falls_back_to_tags_and_trigger_words(fields, expected):
    noise = "<p>Please like and leave a review!</p><p>Steps: 20, Sampler: Euler a</p><p>Enjoy.</p>"
    assert extractive_description(card(noise, **fields)) == expected


def test_a_sentence_without_subject_is_better_than_nothing_but_not_better_than_tags():
    quiet = "<p>Quiet evenings beneath ancient lanterns.</p>"
    assert extractive_description(card(quiet)) == "Quiet evenings beneath ancient lanterns."
    assert extractive_description(card(quiet, tags=("night",))) == "SD 1.5 LoRA. Tags: night."


@pytest.mark.parametrize("max_chars", [20, 50, 240])
@pytest.mark.parametrize(
    "description",
    ["A model that draws " + "castles and " * 100 + "towers", "这个模型可以画出" + "城堡和山水" * 100,
     "A style model of " + "x" * 500,
     "<p>An art model.</p>" * 200, None, "<" * 1_000_000],
)  # fmt: skip
def test_is_one_bounded_line_and_never_empty(description, max_chars):
    text = extractive_description(card(description, tags=("t" * 300, "fox")), max_chars)
    assert 0 < len(text) <= max_chars
    assert text == " ".join(text.split()) and not set("<>") & set(text)
    assert text == extractive_description(card(description, tags=("t" * 300, "fox")), max_chars)


def test_long_texts_are_cut_between_words():
    text = extractive_description(card("A model that draws " + "castles and " * 100 + "towers"), 50)
    assert text == "A model that draws castles and castles and castles"


def test_extractive_describer_keeps_order_and_keys():
    cards = (card("A model of foxes in the snow.", key=str(number)) for number in range(3))
    assert list(ExtractiveDescriber().describe(cards)) == [
        Description(str(number), "A model of foxes in the snow.", "extractive", None) for number in range(3)
    ]


def test_too_little_room_is_refused():
    for make in (
        lambda: extractive_description(card(), 5),
        lambda: ExtractiveDescriber(max_chars=5),
    ):
        with pytest.raises(ValueError, match="`max_chars` must be at least 20.*got 5"):
            make()
