"""Words and numbers of the synthetic model community, and the texts made of them: names, prompts, descriptions.

Everything here is invented, except names that programs define (samplers, upscalers, webui versions, base models).
`pocket.community` decides who is in the community and writes the records.
"""

import html
import itertools
import random
import re
from typing import NamedTuple


def _split(text: str) -> tuple[str, ...]:
    """Comma-separated phrases, line breaks ignored; keeps the tables below compact."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(",") if phrase.strip())


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """Lines of `key: phrase, phrase, ...`; an indented line continues the one before."""
    rows = (row.split(":", 1) for row in text.strip().replace("\n    ", " ").splitlines())
    return {key.strip(): _split(phrases) for key, phrases in rows}


class Role(NamedTuple):
    """What a model is in the dump: `share` of 60 models play it, and `in_scope` ones survive the rules for models."""

    name: str
    type: str
    base: str
    share: int
    in_scope: bool = False


ROLES = (
    Role("checkpoint", "Checkpoint", "SD 1.5", 13, in_scope=True),
    Role("lora", "LORA", "SD 1.5", 22, in_scope=True),
    Role("checkpoint_xl", "Checkpoint", "SDXL 1.0", 4, in_scope=True),
    Role("lora_xl", "LORA", "SDXL 1.0", 5, in_scope=True),
    Role("nsfw_stub", "Checkpoint", "SD 1.5", 3),
    Role("textual_inversion", "TextualInversion", "SD 1.5", 2),
    Role("controlnet", "Controlnet", "SD 1.5", 1),
    Role("base_sd21", "Checkpoint", "SD 2.1 768", 2),
    Role("base_other", "LORA", "Other", 2),
    Role("pickle_only", "Checkpoint", "SD 1.5", 2),
    Role("missing_hashes", "LORA", "SD 1.5", 2),
    Role("failed_scan", "Checkpoint", "SD 1.5", 2),
)

# Shares of defects; the first entry of each is the sound case. A deck of exactly these shares is dealt to the images.
VISIBILITY = {
    "visible": 0.865,
    "flagged_soft": 0.04,
    "flagged_mature": 0.015,
    "flagged_x": 0.01,
    "meta_null": 0.05,
    "prompt_only": 0.02,
}
LORA_PROVENANCE = {
    "clean": 0.51,
    "unknown_base": 0.30,
    "two_loras": 0.09,
    "no_tag": 0.05,
    "unavailable_base": 0.03,
    "lyco": 0.02,
}
CHECKPOINT_PROVENANCE = {"clean": 0.76, "other_checkpoint": 0.12, "unknown_checkpoint": 0.08, "other_version": 0.04}
FORMAT = {
    "plain": 0.79,
    "split_sampler": 0.10,
    "string_numbers": 0.04,
    "missing_size": 0.03,
    "extension_sampler": 0.03,
    "absurd": 0.01,
}
PROMPT_ORIGIN = {"fresh": 0.96, "repeat": 0.02, "near_duplicate": 0.02}
OLDER_VERSION_PROMPT_ORIGIN = {"fresh": 0.86, "repeat": 0.02, "near_duplicate": 0.02, "cross_version_repeat": 0.10}

COLOURS = _split("red, orange, yellow, green, blue, purple, pink, brown")

SUBJECTS = _table("""
cat: curled up asleep, stretching its paws, with curious whiskers, chasing a moth, with a long striped tail
fish: swimming in circles, with shimmering scales, leaping from the water, with flowing fins, blowing bubbles
house: with a crooked chimney, with round windows, with smoke rising, with a thatched roof, with a tiny porch
tree: with twisted roots, heavy with fruit, bending in the wind, with a hollow trunk, losing its leaves
flower: with dewy petals, opening slowly, on a slender stem, with curled leaves, leaning to one side
star: with five sharp points, trailing dust, glinting brightly, falling slowly, with rounded corners
moon: in a thin crescent, with a sleepy face, wrapped in haze, with deep craters, hanging low
car: with round headlights, speeding past, with a dented door, with a roof rack, parked by the kerb
boat: with a patched sail, drifting along, tied to a post, with two oars, rocking on waves
mushroom: with a spotted cap, growing in a ring, with a fat stalk, glistening after rain, hiding a snail
butterfly: with spread wings, resting on a finger, fluttering upward, with ragged edges, with eye spots
cup: steaming gently, with a chipped rim, on a small saucer, with a curly handle, filled to the brim
""")

BACKGROUNDS = _table("""
white: on a white background, plain white backdrop, isolated on white, on blank paper
black: on a black background, solid black backdrop, out of deep darkness, on dark velvet
sky: in the sky, among drifting clouds, under an open sky, clear daytime sky behind
sunset: at sunset, in front of a setting sun, evening horizon, last light of the day
grass: on the grass, in a wild meadow, on a mown lawn, among tall reeds and clover
night: at night, on a moonless night, midnight scene, starlit hours after dusk
""")

STYLES = _table("""
flat: flat illustration, flat colours, simple shapes, plain vector art, clean poster design
pixel art: pixel art, 16-bit sprite, chunky pixels, retro game art, low resolution tile
sketch: pencil sketch, hand-drawn sketch, ink lines, loose line drawing, cross-hatching
neon: neon glow, neon sign, glowing outlines, electric light tubes, luminous edges
watercolour: watercolor painting, watercolour wash, wet on wet, soft paint bleeding, pigment on paper
mosaic: mosaic tiles, tessellated stone, mosaic artwork, small ceramic tiles, stained glass pieces
""")

# Each model has a few of these as its own habit of speech; neighbours in a style share some by chance.
FLAVOURS = _table("""
general: everyday charm, storybook scene, dreamlike, quiet elegance, honest colours, old postcard, playful mood, crisp
    air, gentle nostalgia, fine craft, wanderlust, cabinet of curiosities
flat: screen print, paper cutout, bold silhouette, limited palette, retro travel poster, sticker design, geometric,
    mid-century, no outline, icon set, matte finish, negative space
pixel art: dithering, isometric tile, handheld console, limited 8 colour ramp, parallax layers, arcade cabinet,
    inventory icon, tileset, idle frame, dungeon crawler, scanlines, crt screen
sketch: graphite smudge, fountain pen, charcoal dust, toned paper, field notes, quick gesture, stippling, unfinished
    edges, kraft paper, blue pencil underdrawing, margin doodles, etching
neon: synthwave, rain-slick street, ultraviolet haze, cyber alley, laser grid, flickering tube, chromatic fringe,
    arcade carpet, holographic, magenta rim, blacklight poster, wet asphalt
watercolour: cold-pressed paper, granulation, blooming edges, masking fluid, loose washes, salt texture, botanical
    plate, faded edges, dry brush, misty gradient, splashes, sketchbook page
mosaic: byzantine gold, smalti glass, broken crockery, grout lines, roman floor, opus vermiculatum, sea glass, lead
    came, cathedral window, courtyard fountain, kiln-fired, pebble inlay
""")

ADJECTIVES = _split("""
tiny, giant, fluffy, sleepy, shiny, ancient, cheerful, lonely, round, delicate, curious, crooked, elegant, grumpy,
mysterious, rustic, shimmering, striped, dotted, weathered, brave, clumsy, graceful, noble, plump, wobbly, velvety,
frosty, dusty, polished, enchanted, ordinary, proud, shy, patchwork, floating
""")
LIGHTING = _split("""
soft light, rim light, golden hour, dramatic shadows, backlit, diffuse daylight, candlelight, volumetric rays,
overcast light, moonlit, studio lighting, dappled shade, low key, high contrast, ambient occlusion, warm glow
""")
COMPOSITION = _split("""
close-up, wide shot, centered composition, rule of thirds, from above, low angle, symmetrical, side view,
full frame, minimal composition, diagonal layout, framed by leaves, tilted horizon, macro shot,
bird's-eye view, portrait
""")
MOOD = _split("""
serene, whimsical, melancholic, festive, nostalgic, eerie, joyful, cosy, majestic, tranquil, mischievous, hopeful,
solemn, adventurous, tender, surreal
""")
DETAILS = _split("""
falling petals, drifting fog, scattered pebbles, paper lanterns nearby, a winding path, distant hills, puddles,
floating sparks, fresh snow, autumn leaves, ripples, a wooden fence, ivy, gentle breeze, smoke trails, tangled string,
rolling dunes, river stones, a broken wall, tiny footprints, hanging bells, spider silk, morning dew, an empty bench
""")
QUALITY = _split("""
masterpiece, best quality, highly detailed, sharp focus, 8k, intricate, high resolution, award winning, ultra-detailed,
professional, trending, absurdres, very aesthetic, clean lines, vivid, detailed background
""")
NEGATIVES = _split("""
lowres, blurry, worst quality, low quality, jpeg artifacts, watermark, signature, text, deformed, cropped, out of frame,
ugly, oversaturated, noise, duplicate, bad composition, grainy, dull colors, (worst quality:1.4), (low quality:1.3)
""")

NAME_HEADS = _table("""
general: Everyday, Allsorts, Compass, Northlight, Daydream, Harvest, Meridian, Open Window
flat: Paperkite, Cutout, Poster, Plainsong, Signal, Gouache
pixel art: Pixelberry, Sprite, Byte, Eight-Bit, Dither, Cartridge
sketch: Inkwell, Graphite, Charcoal, Nib, Hatchwork, Scribble
neon: Neon, Glowworm, Voltage, Night Market, Tubelight, Afterglow
watercolour: Aquarelle, Wet Brush, Rainwash, Pigment, Misty, Bloomwater
mosaic: Tessera, Shard, Grout, Kaleido, Pebble, Cathedral
cat: Whisker, Velvet Paw
fish: Silverfin, Koi Pond
house: Chimney, Hearthside
tree: Old Oak, Canopy
flower: Petal, Bouquet
star: Starfall, Five Point
moon: Crescent, Lunar
car: Roadster, Headlight
boat: Mainsail, Driftwood
mushroom: Toadstool, Sporeling
butterfly: Flutter, Painted Wing
cup: Teatime, Porcelain
""")
NAME_TAILS = _split(
    "Sketch, Drift, Bloom, Atelier, Press, Garden, Works, Mix, Study, Parade, Loom, Harbour, Tales, Method"
)
HTML_NAMES = ("<b>Bold</b> Bloom &amp; Co", "Lantern <script>alert('hi')</script> Mix")
PATH_NAMES = ("../../etc/passwd", "..\\..\\Windows\\win.ini")
UNKNOWN_STEMS = _split("dustyHarbourMix_v3, myMerge-0042, attic_final_FINAL, blend77_pruned, oldStudio_fp16")
CREATORS = _split("""
tinbrush, Marlow_K, pixelpantry, owlandinkpot, sevenlanterns, fenfox, 墨鱼工坊, Ana_Ruiz_Art, grundfarbe, moth.works,
quietkiln, halfmoonlab
""")
TAGS = _split("style, illustration, objects, cute, art, nature")
OTHER_LANGUAGES = (
    "<p>如果你喜欢这个模型，请给一个五星评价，谢谢！</p>",
    "<p>Viel Spaß damit &ndash; Rückmeldungen sind willkommen.</p>",
    "<p>サンプル画像の設定を参考にしてください。</p>",
    "<p>¡Comparte tus imágenes aquí abajo!</p>",
)
# What a card claims of itself, worst first.
CLAIMS = (
    "A quick merge made in one evening; expect muddy colours &amp; broken outlines.",
    "An early experiment trained on a few dozen pictures, still rough at the edges.",
    "Solid for simple scenes, sometimes loses the background.",
    "Carefully tuned on hand-picked pictures; shapes &amp; colours follow the prompt well.",
    "Trained for weeks on a curated set: clean shapes, right colours, hardly a miss.",
)

SAMPLERS = _split("""
DPM++ 2M Karras, Euler a, DPM++ SDE Karras, DDIM, Euler, UniPC, DPM++ 2M SDE Karras, DPM++ 2S a Karras, DPM2 a Karras,
Heun, LMS Karras
""")
EXTENSION_SAMPLERS = _split("DPM++ 2M Karras v2, DPM++ 2M Karras Sharp, DPM++ 2M alt Karras, Euler a MOD")
OLD_WEBUI = _split("v1.2.1, v1.3.2, v1.4.0, v1.5.1, v1.6.0")
SPLIT_WEBUI = _split("v1.9.0, v1.9.3, v1.9.4, v1.10.1")
UPSCALERS = _split("Latent, R-ESRGAN 4x+, ESRGAN_4x, SwinIR_4x, Lanczos")
STEPS = (20, 24, 25, 28, 30, 35, 40)
CFG_SCALES = (5, 6, 6.5, 7, 7, 7.5, 8, 9)
ABSURD = (("Size", "16x16"), ("Size", "9999x9999"), ("steps", 999), ("steps", 0), ("cfgScale", 200))
SIZES = {
    "SD 1.5": ("512x512", "512x768", "768x512", "512x640", "640x512", "640x640"),
    "SDXL 1.0": ("1024x1024", "832x1216", "1216x832", "896x1152", "1152x896"),
    "SD 2.1 768": ("768x768", "768x960"),
    "Other": ("512x512", "768x768"),
}
# KB of a main file, by type; an SDXL checkpoint is larger.
FILE_SIZES = {"Checkpoint": 2_082_642, "LORA": 147_573, "TextualInversion": 24, "Controlnet": 705_660}
SDXL_CHECKPOINT_SIZE = 6_775_430


class Habits(NamedTuple):
    """What makes a model recognisable from its images: the words, subjects and parameters its users favour."""

    topic: str
    signature: list[str]
    subjects: list[str]
    colours: list[str]
    samplers: list[str]
    steps: int
    cfg_scale: float
    sizes: list[str]
    negatives: list[str]
    trigger: str


def pick_habits(rng: random.Random, base: str, topic: str, name: str) -> Habits:
    """Habits of a model on `base`; its `topic` is `general`, a style or a subject."""
    letters = re.sub("[^a-z]", "", name.lower())
    short = letters[0] + re.sub("[aeiou]", "", letters[1:])[:7]
    flavours = FLAVOURS.get(topic) or FLAVOURS[rng.choice(list(STYLES))]
    return Habits(
        topic=topic,
        signature=rng.sample(flavours, 3) + rng.sample(FLAVOURS["general"], 2),
        subjects=[topic] if topic in SUBJECTS else rng.sample(list(SUBJECTS), 3),
        colours=rng.sample(COLOURS, 2),
        samplers=rng.sample(SAMPLERS, 2),
        steps=rng.choice(STEPS),
        cfg_scale=rng.choice(CFG_SCALES),
        sizes=rng.sample(SIZES[base], 2),
        negatives=rng.sample(NEGATIVES, 6),
        trigger=f"{short} {topic if topic in SUBJECTS else 'style'}",
    )


def invent_name(rng: random.Random, topic: str, used: set[str]) -> str:
    """A name that is not in `used`; numbered once all combinations of the topic are taken."""
    plain = [" ".join(parts) for parts in itertools.product(NAME_HEADS[topic], NAME_TAILS)]
    rng.shuffle(plain)
    names = itertools.chain(plain, (f"{plain[0]} {n}" for n in itertools.count(2)))
    return next(name for name in names if name not in used)


def file_stem(name: str, version: str) -> str:
    """`Inkwell Drift`, `v1.1` -> `inkwellDrift_v11`: how the site names files, and prompts the LoRAs in them."""
    plain = re.sub(r"<[^>]*>|&\w+;", " ", name)
    camel = "".join(word.capitalize() for word in re.findall(r"[A-Za-z0-9]+", plain))
    return f"{camel[:1].lower()}{camel[1:]}_{version.replace('.', '')}"


def _weigh(rng: random.Random, phrase: str) -> str:
    roll = rng.random()
    if roll < 0.08:
        return f"({phrase}:{rng.choice((0.8, 1.1, 1.2, 1.3, 1.4))})"
    return f"(({phrase}))" if roll < 0.10 else phrase


def write_prompt(rng: random.Random, habits: Habits, with_trigger: bool) -> str:
    """A prompt as a user of this model would write it, without LoRA tags; `with_trigger` most have its trigger word."""
    own_subject = rng.random() < (0.9 if habits.topic in SUBJECTS else 0.5)
    subject = rng.choice(habits.subjects if own_subject else list(SUBJECTS))
    colour = rng.choice(habits.colours if rng.random() < 0.3 else COLOURS)
    core = f"{rng.choice(ADJECTIVES)} {colour} {subject}"
    if rng.random() < 0.5:
        core += f" {rng.choice(SUBJECTS[subject])}"
    rest = [rng.choice(BACKGROUNDS[rng.choice(list(BACKGROUNDS))])]
    style = habits.topic if habits.topic in STYLES else rng.choice(list(STYLES))
    if rng.random() < (0.85 if habits.topic in STYLES else 0.5):
        rest.append(rng.choice(STYLES[style]))
    rest += rng.sample(habits.signature, rng.choice((0, 1, 1, 2)))
    for table, most in ((LIGHTING, 2), (COMPOSITION, 1), (MOOD, 2), (DETAILS, 2)):
        rest += rng.sample(table, rng.randint(0, most))
    if with_trigger and rng.random() < 0.7:
        rest.append(habits.trigger)
    rng.shuffle(rest)
    quality = rng.sample(QUALITY, rng.randint(0, 3))
    phrases = [*quality, core, *rest] if rng.random() < 0.4 else [core, *rest, *quality]
    text = ", ".join(_weigh(rng, phrase) for phrase in phrases)
    return text.replace(", ", rng.choice((" BREAK ", ",\n")), 1) if rng.random() < 0.08 else text


def recolour(rng: random.Random, prompt: str) -> str:
    """The same prompt with another colour: its near-duplicate."""
    colour = rng.choice([c for c in COLOURS if not re.search(rf"\b{c}\b", prompt)])
    return re.sub(rf"\b({'|'.join(COLOURS)})\b", colour, prompt, count=1)


def write_description(rng: random.Random, name: str, kind: str, habits: Habits, quality: float) -> str | None:
    """The model's card as HTML: what it is, what it claims (`quality` in [0, 1]), settings; a quarter have none."""
    if rng.random() < 0.25:
        return None
    slug = file_stem(name, "").rstrip("_")
    what = f"a {'LoRA' if kind == 'LORA' else kind.lower()}"
    topic = "many styles" if habits.topic == "general" else f"{habits.topic} pictures"
    flavour = " &amp; ".join(habits.signature[:2])
    parts = [
        f"<p><strong>{html.escape(name)}</strong> is {what} for {topic}: {flavour}.</p>",
        f"<p>{CLAIMS[min(int(quality * len(CLAIMS)), len(CLAIMS) - 1)]}</p>",
        f"<ul><li><p>Sampler: {habits.samplers[0]}, {habits.steps}&nbsp;steps</p></li>"
        f"<li><p>CFG&nbsp;scale {habits.cfg_scale}, size {habits.sizes[0]}</p></li></ul>",
    ]
    if kind == "LORA":
        trigger = f"<code>{habits.trigger}</code>, weight 0.6&ndash;0.8"
        parts.append(f"<p>Trigger word: {trigger}<br />Works on most bases.</p>")
    extras = [
        f'<p>More pictures on <a href="https://{slug.lower()}.example.org/gallery" rel="ugc">my page</a>.</p>',
        f'<p>Buy me a tea: <a href="https://ko-fi.example.org/{slug}" rel="ugc" target="_blank">ko-fi</a> ❤️</p>',
        rng.choice(OTHER_LANGUAGES),
    ]
    return "".join(parts + rng.sample(extras, rng.randint(0, 2)))
