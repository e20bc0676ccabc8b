"""Words of Stable Diffusion prompts, sorted by what they are about, and what everyday people say instead."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(text: str) -> dict[str, str]:
    """Lines of `name: tag, tag`, as tag -> name."""
    rows = [line.partition(":") for line in text.strip().splitlines()]
    return {tag.strip(): name.strip() for name, _, tags in rows for tag in tags.split(",")}


QUALITY = _set("""
    masterpiece masterpieces masterclass best quality qualit high highest highly higher detailed detail details
    detailing ultra extremely extreme super hyper insane insanely incredibly unparalleled intricate fine finely
    absurdres highres hires res resolution uhd hd sharp focus clear realistic photorealistic hyperrealistic
    hyperdetailed ultradetailed ultrarealistic photorealism hyperrealism realism photo-realistic hyper-realistic
    ultra-detailed ultra-realistic highly-detailed best-quality high-quality high-detail hyper-detailed
    super-detailed photoreal lifelike perfect perfectly amazing award winning award-winning official complicated
    visually stunning professional raw cinematic very incredible exquisite exquisitely most world supremed rich ultimate
    accuracy unity cg wallpaper trending unreal top sfw solo original master piece definition 8k 4k 16k 2k hq crisp
    smooth uncensored textured stock higly hight defined hyperdefined breathtaking good aesthetic absurd flawless
    vivid dynamic delicate wonderful gorgeous real art artwork epic clean
""")
"""Words that say that a picture is to be good."""
VAGUE = _set("""
    eyes eye face faces skin hair background body hands fingers texture textures features facial design composition
    colors color colour colours anatomy shadow shadows illumination lighting light lights shading glow graphics
    style picture image rendering expression proportions pores depth environment environments quality person render
    photo photography illustration ratio and with of the a an in on only one look close up close-up clothes shadowed
    pose poses angle shot contrast scene subject focus full work
""")
"""Words that say nothing by themselves or beside words of quality."""
TECHNICAL = _set("""
    nikon canon fujifilm fuji kodak leica hasselblad sony lens dslr slr bokeh iso aperture f1 f2 mm exposure portra
    cinestill grain dof fov hdr octane unreal effect effects filter raytracing raytraced tracing render rendered
    renderer rendering vray v-ray cycles blender zbrush cinema4d artstation artstaton cgsociety deviantart pixiv
    unsplash pinterest polycount trending midjourney nijijourney photoshop lightroom anti-aliasing antialiasing
    radiosity caustics occlusion subsurface scattering tonemapping bokah aberration aberrations vignette chiaroscuro
    volumetric postprocessing post-processing vfx specular shader shaders lora embedding checkpoint upscale upscaled
    supersampling megapixel polaroid 35mm 85mm 50mm pbr physically-based lighting lit rimlight backlight
    backlighting sidelighting global wallpaper watermark signature username artist shot cg cgi view viewfinder pov
    perspective depth composition anatomy contest winner prompt weibo twitter censored nsfw dildo nude naked breast
    breasts cleavage nipples sexy erotic navel underboob thighs crotch ass skindentation petite loli modelshoot
    modelshot quality masterpiece best resolution minimalism aesthetic symmetrical centered rule thirds ratio
    palette tones toned contrast saturated saturation desaturated theme motif shading reflections chromatic adobe
    hyper lut bust cel-shaded toonshading wlop artgerm rutkowski mucha ghibli-style ilya kuvshinov greg alphonse
    krenz cushart
""")
"""Words of cameras, renderers, sites and notation: a tag with one of them is dropped, a sentence ends before it."""
FUNCTION = _set("""
    of with and or the a an in on at by from to for as is are that which who while where her his its their into over
    under near through being very has have made like without up during amid amidst among against wearing holding but
""")
PREPOSITIONS = _set("""
    in on at under inside near among beside between behind over above through surrounded amidst amid against within
    underneath beneath around across outside below next atop along during inside-of
""")
DETERMINERS = _set("""
    a an the his her their my some many several two three four five six seven eight nine ten no multiple this that
    these those its both
""")
NUMBERS = {"1": "a", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight"}
UNCOUNTABLE = _set("""
    hair water rain snow fire smoke grass armor armour clothing art food jewelry jewellery makeup light fog magic
    nature space sand ice lightning fur moss dust fruit bread wine music electricity mist sunlight moonlight steam
    blood gold metal glass furniture lace silk leather skin lipstick architecture darkness sweat underwear swimwear
    sportswear machinery scenery equipment graffiti ivy coral thunder lava chaos sushi cheese rice coffee tea hands
    eyes anna black white
""")
PLURALS = _set(
    "men women people children teeth feet leaves wolves elves knives mice geese glasses jeans shorts pants fish"
)
PEOPLE = _set("""
    girl girls boy boys man men woman women lady ladies guy guys child children kid kids person people couple baby
    male female females males teenager teen elf warrior knight princess prince queen king witch wizard sorceress
    sorcerer mage priest nun maid nurse doctor soldier samurai ninja pirate cowboy astronaut robot android cyborg
    vampire demon angel goddess god fairy mermaid ballerina dancer singer musician guitarist policeman officer rogue
    assassin ranger paladin monk hero superhero villain zombie skeleton werewolf student teacher chef idol bride
    detective hunter geisha viking gladiator barbarian druid necromancer clown santa model swordsman businessman
    adventurer scientist alien monster ghost creature scarecrow catgirl mother father grandmother grandfather sailor
    catboy dwarf orc goblin giant monarch herbalist
""")
"""Heads of phrases that are what the picture is of."""
ANIMALS_AND_THINGS = _set("""
    cat cats dog dogs horse horses dragon dragons bird birds wolf fox lion tiger bear panda rabbit bunny owl eagle
    penguin fish shark whale dolphin octopus jellyfish turtle frog snake spider butterfly butterflies bee deer
    unicorn dinosaur cow pig sheep elephant giraffe monkey mouse crow raven swan duck koi goldfish axolotl kitten
    puppy fairies bug flower flowers rose roses sunflower sunflowers tulips petals blossoms leaf leaves tree trees
    plant plants mushroom mushrooms pumpkin pumpkins fruits apple apples cake cup mug bottle book books candle
    candles lantern lanterns lamp umbrella parasol sword swords katana shield bow gun guns rifle weapon weapons
    staff wand spear axe scythe hammer dagger guitar piano violin drum microphone phone camera computer laptop
    keyboard car cars truck bus train bike bicycle motorcycle motorbike boat boats ship ships spaceship spaceships
    rocket airplane plane helicopter tank balloon balloons bench chair table desk bed couch sofa throne window
    windows door stairs fence bookshelf clock mirror bag backpack basket box ball skull skulls bones crystal
    crystals gem gems diamond diamonds coin crown star stars moon sun cloud clouds planet planets rainbow bubble
    bubbles snowman snowflakes fireworks feather feathers waterfall mountain mountains bridge tower castle house
    houses building buildings skyscraper skyscrapers ruins rocks rock waves lake river island volcano fire flames
    smoke sparks lightning fog mist rain toys doll plushie teddy teapot coffee tea food bread pizza sushi burger
    icecream bouquet heart hearts gears machine machines toaster factory mecha robots neon signs glasses sunglasses
    headphones mask cigarette pipe kite ribbon chains rope wings flag map letter gift gifts presents christmas-tree
    windmill lighthouse temple shrine pagoda torii statue fountain well tent campfire fireplace pot pots pan
""")
BODY = _set("""
    hair eyes ear ears tail tails wings horns horn skin lips beard mustache moustache freckles fangs bangs braid
    braids ponytail pigtails bun buns scar scars tattoo tattoos eyebrows eyelashes eyeshadow lipstick makeup nails
    halo muscles abs wrinkles antlers claws scales smile legs arms dreadlocks bob hairstyle haircut eyeliner stubble
    goatee feathers fur
""")
CLOTHES = _set("""
    shirt t-shirt tshirt blouse dress gown skirt miniskirt jacket coat hoodie sweater cardigan vest suit tuxedo
    uniform kimono yukata hanfu robe robes cloak cape capelet armor armour bodysuit swimsuit bikini shorts pants
    jeans trousers leggings stockings socks kneehighs shoes boots sneakers heels sandals loafers footwear gloves
    scarf hat cap beret beanie helmet crown tiara hood headband hairband hairclip headphones headset glasses
    sunglasses goggles mask earrings necklace choker bracelet ring rings jewelry brooch belt tie necktie bowtie
    apron overalls clothes clothing outfit costume sleeves collar ribbon bow pendant corset lingerie turtleneck
    blazer trenchcoat raincoat jumpsuit spacesuit tank-top top headwear veil eyepatch bandages backpack tunic poncho
    sari cheongsam headdress pajamas neckerchief sash frills bodice mantle sundress
""")
PLACES: dict[str, str] = {
    place: preposition
    for preposition, places in {
        "in": """
            forest garden city town village classroom bedroom kitchen room library cafe restaurant park desert
            jungle castle palace church temple cave field meadow valley alley office studio bathroom house shop
            store bar arena cathedral dungeon swamp ruins hallway corridor cockpit laboratory lab greenhouse
            ballroom bathtub pool bath lake river ocean sea sky graveyard countryside wasteland warehouse
            factory museum gym stadium theater market mountains universe galaxy nebula ravine sewers parking
            tavern cabin attic basement hospital train car marketplace landscape cityscape courtyard backyard
            woods tunnel
        """,
        "on": """
            beach street road rooftop roof stage hill mountain island bridge balcony bed couch sofa bench stairs
            cliff battlefield sidewalk playground boat ship spaceship planet throne path track pier deck
            snowfield porch highway horseback moon mars
        """,
        "at": """
            festival party concert school station airport pond fireplace window seaside lakeside harbor shrine
            bus-stop
        """,
    }.items()
    for place in places.split()
}
LOOKS = _set("""
    handsome happy angry sad cute beautiful elegant mysterious colorful colourful scary evil young old serious shy
    fierce powerful excited gothic glowing muscular pretty adorable lonely sleepy smug fat cheerful majestic creepy
    tall slim moody retro retro-futuristic vintage modern depressing attractive energetic friendly stylish giant
    tiny chubby sweaty tired bored nervous confident embarrassed crying wet futuristic medieval ancient magical
    floral golden fluffy shiny spooky gloomy cozy royal rusty abandoned masculine transparent muddy chibi blonde
""")
DROPPED = _set("""
    lips bangs collarbone teeth blurry parted-lips closed-mouth concept-art pixel-sorting digital-art nose eyelashes
    upper-teeth artist-name text letterboxed english-text mole fang adult mature sidelocks ahoge obi lineart flat 2d
    3d lowres worst bad ugly blurred logo front back profile wind windy shadow petals-only male-focus female focus
    no-humans no-human no-background out-door scenery outdoor dark bright light soft day medium chromatic vibrant
""")
"""Single tags that are well known and not worth saying."""
TAGS: dict[str, dict[str, str]] = {
    "body": _table("""
        open eyes: wide eyes
        an open mouth: open mouth, :o
        closed eyes: closed eyes, eyes closed
        pigtails: twintails, twin tails
        cat ears: cat ears, nekomimi, animal ears
        a ponytail: ponytail, high ponytail
        a flower in the hair: hair flower
        a ribbon in the hair: hair ribbon, hair bow
        two braids: twin braids, braided pigtails
        dark skin: dark skin, dark-skinned female, tan, tanned
        different coloured eyes: heterochromia
    """),
    "clothes": _table("""
        a school uniform: serafuku, school uniform, sailor uniform
        a sailor collar: sailor collar
        a Chinese dress: china dress, qipao, cheongsam
        traditional Chinese clothes: chinese clothes, hanfu
        traditional Japanese clothes: japanese clothes, haori
        long stockings: thighhighs, thighhigh, thigh highs, pantyhose
        fingerless gloves: fingerless gloves
        hair jewelry: hair ornament
        casual clothes: casual clothes, casual
        a suit: suit, business suit
    """),
    "action": _table("""
        smiling: smile, smiling, light smile, gentle smile, :d, smiling face, happy smile, smiling mouth
        grinning: grin, smirk, evil smile
        blushing: blush
        sitting: sitting, wariza, seiza, sitting down
        looking away: looking away, looking to the side, sideways glance, looking afar
        looking back over the shoulder: looking back
        looking straight at us: looking at viewer, look at viewer, looking at camera, facing viewer
        standing with crossed arms: crossed arms
        sitting with crossed legs: crossed legs, indian style
        with hands on the hips: hand on hip, hands on hips
        with hands in the pockets: hands in pockets, hand in pocket
        in the middle of a fight: fighting, fighting stance, battle, fighting pose, action pose, battle stance
        jumping: jump, jumping
        hugging: hug
        riding a horse: horseback riding, on horse, riding horse
        winking: one eye closed, wink
    """),
    "place": _table("""
        outside: outdoors, outside
        indoors: indoors, indoor, inside
        on a plain white background: white background, plain white background, simple white background
        on a plain black background: black background, plain black background
        on a plain background: simple background, plain background, gradient background
        in the sky: sky, flying, in the sky
        under a blue sky: blue sky, clear sky, beautiful blue sky
        under a cloudy sky: cloudy sky, dark sky
        under a night sky full of stars: night sky, starry sky, star sky, stars, starry night, milky way
        in space: space, outer space, universe, galaxy, nebula, starfield
        in the snow: snow, snowing, snowy
        in the rain: rain, raining, rainy
        in the water: water, partially submerged
        under water: underwater
        by the sea: ocean, sea, coast, shore, seaside
        in the mountains: mountain, mountains
        in nature: nature, wilderness
        in a ruined city: post-apocalyptic, postapocalyptic, apocalypse, destroyed city, post apocalyptic
        in the grass: grass
        in a big city: cityscape, skyline, urban, city lights, cityscape background
    """),
    "time": _table("""
        at night: night, night time, nighttime, late night, midnight
        at sunset: sunset, golden hour, evening, sunset sky
        at dusk: dusk, twilight
        at sunrise: sunrise, dawn
        in the sunshine: sunny, sunlight, sunshine, daylight, daytime
        in winter: winter
        in autumn: autumn, fall
        in summer: summer
        in spring: spring
        by moonlight: moonlight, full moon, moonlit night
        with fog all around: fog, foggy, mist, misty
    """),
    "view": _table("""
        seen from behind: from behind
        seen from above: from above, high angle
        seen from below: from below, low angle
        seen from the side: from side, from the side, side view, in profile
        seen from the front: front view, from front, from the front
        seen from up close: close up, close-up, closeup, face focus, close up portrait, extreme close-up
        seen from far away: wide shot, far shot, long shot
        seen from head to toe: full body, fullbody, full-body, full body shot, full body view
        from the waist up: upper body, half body, half shot, cowboy shot, medium shot, bust shot
    """),
    "style": _table("""
        like a real photo: photo, raw photo, photograph, photography, real photo, photorealistic, photo medium
        like an oil painting: oil painting, oil on canvas
        like a watercolour painting: watercolor, watercolor painting, watercolor medium, watercolour
        like a painting: painting, digital painting, painting medium, painterly, acrylic paint
        like a pencil drawing: sketch, pencil sketch, drawing, pencil drawing, line art, hand drawn, graphite
        like a cartoon: cartoon, toon, cartoon style, disney style, disney, pixar style, pixar
        like anime: anime, anime style, anime screencap, anime coloring, manga, manga style
        like a comic: comic, comic book, comic style, webtoon
        like old pixel games: pixel art, pixelart, pixel
        like something from science fiction: science fiction, sci-fi, scifi, futuristic, futurism
        in a cyberpunk look: cyberpunk, cyberpunk style
        in a steampunk look: steampunk, steampunk style, clockpunk
        like a fairy tale: fantasy, fairy tale, dreamlike, fairytale
        like a horror film: horror, terror, nightmare
        in black and white: monochrome, greyscale, black and white, grayscale
        like a film still: moviestill, movie still, film still, cinematic still
        like a portrait: portrait, portraits
        like a little 3d figure: figurine, pvc figure, isometric
        like stained glass: stained glass
        like a game icon: game icon, icon, rpg icon
        like abstract art: abstract, abstract art, fractal art, fractal
        in the style of the old masters: baroque, renaissance, rembrandt style
        in art nouveau style: art nouveau
        made of paper: papercraft, origami, paper art
        in warm colours: warm colors, warm lights, warm tones
        in soft colours: pastel colors, pastel, muted colors, soothing tones
        in bright colours: vivid colors, vibrant colors, full color, colorful
    """),
}
"""Whole tags by kind, and what is said for each."""
LIMITS = {"look": 1, "body": 3, "clothes": 2, "action": 1, "thing": 2, "place": 1, "time": 1, "view": 1, "style": 1}
"""How many phrases of each kind a picture has at most."""
COLORS = _set("red orange yellow green blue purple pink brown black white grey silver blonde golden")
OPPOSITES = _table("""
    long: short
    short: long
    night: sunset
    sunset: night
    outdoors: indoors
    indoors: outdoors
    angry: smile
    smile: angry
    summer: winter
    desert: forest, beach
    village: city, street
    standing: sitting
    sitting: standing
""")
"""What a chat that puts things right had wrong at first."""
SYNONYMS: dict[str, list[str]] = {
    word: others.split("/")
    for others, word in _table("""
        woman: lady
        man: guy/fellow
        cute: sweet/adorable
        beautiful: pretty/lovely
        big: large/huge
        wearing: in/dressed in
        forest: woods
        street: road
        outside: outdoors/in the open
        small: little
        little: small
        tiny: small
        futuristic: modern-looking
        abandoned: deserted
        scary: frightening
        surrounded: encircled
        near: close to
        huge: massive
        elegant: graceful
        colorful: colourful/bright
        young: youthful
        covered: coated
        photo: photograph
        sea: ocean
    """).items()
}
"""What others would say for a word."""
ING_NOUNS = _set("""
    building evening morning clothing wedding being king ring wing earring string viking thing spring painting
    drawing ceiling darling living offering stocking lighting
""")
TRANSITIVE = _set("holding riding playing eating drinking reading carrying driving smoking hugging watching")
ADVERBS = _set("up down away back forward alone together")
POSES = _set("""
    standing kneeling squatting crouching lying sleeping walking running dancing singing laughing crying flying
    floating swimming reading cooking fishing waving shouting praying screaming meditating leaning stretching
    surfing skating
""")
STYLES = _set("""
    victorian japanese chinese gothic fantasy retro vintage modern punk comic cartoon medieval viking minimalist pop
    deco noir ghibli baroque tribal western asian military hippie cute chibi dark folk rococo ukiyo-e graffiti
    vector lego
""")
STRIPPED = _set("""
    masterpiece quality detailed highly extremely ultra hyper intricate insanely highres absurdres realistic
    photorealistic hyperrealistic cinematic 8k 4k uhd hd hdr trending raw ultra-detailed very incredibly beautifully
    exquisite solo mature
""")
FEMININE = _set("girl woman lady princess queen witch nun maid bride female goddess sorceress")
MASCULINE = _set("man boy guy prince king male wizard monk knight")
SEXES = {"male": "man", "female": "woman", "males": "men", "females": "women"}
IN_A_PHRASE = {"has": "with", "have": "with", "having": "with", "wears": "wearing", "multiple": "several"}
JOINTS = _set("in on with wearing holding under near from into through riding inside")
KNOWN = PEOPLE | ANIMALS_AND_THINGS | BODY | CLOTHES | LOOKS | COLORS | FUNCTION | set(PLACES)
COUNTABLE = (CLOTHES | ANIMALS_AND_THINGS | PEOPLE | frozenset(PLACES) | {"hangar"}) - _set(
    "space sky sea moon sun fire"
)
PLAIN = _set("dark light plain gradient transparent anime abstract blurry")
