"""People from everyday life who ask for pictures, and the phrases of their registers: data of the role-players."""

from dataclasses import dataclass
from typing import Literal

Register = Literal["polite", "slangy", "terse", "childlike", "verbose"]
QUIRKS = (
    "typos",
    "lowercase",
    "shouting",
    "emoji",
    "ellipsis",
    "exclaims",
    "unpunctuated",
    "greets",
    "signs",
    "hedges",
)
"""What people do to their texts; see `template_player`."""


@dataclass(frozen=True)
class Role:
    """Somebody who wants a picture.

    Attributes:
        trade: What they do; unique.
        age: Years.
        register: How they speak.
        quirks: Of `QUIRKS`.
        purpose: What they want pictures for; follows "it's".
    """

    trade: str
    age: int
    register: Register
    quirks: tuple[str, ...]
    purpose: str

    @property
    def name(self) -> str:
        """As data sets record it."""
        return f"{self.trade}, {self.age}"


def _roles(text: str) -> tuple[Role, ...]:
    """Lines of `trade | age | register | quirks | purpose`."""
    roles = []
    for line in text.strip().splitlines():
        trade, age, register, quirks, purpose = (cell.strip() for cell in line.split("|"))
        roles.append(Role(trade, int(age), register, tuple(quirks.split()), purpose))  # ty: ignore[invalid-argument-type]
    return tuple(roles)


ROLES = _roles("""
    kindergarten child | 5 | childlike | exclaims | for my grandma
    little sister | 4 | childlike | lowercase | for my teddy
    ballet pupil | 7 | childlike | emoji exclaims | for my dance teacher
    junior chess player | 9 | childlike | typos | for the club wall
    first-grader | 6 | childlike | exclaims typos | for my mum
    primary school pupil | 8 | childlike | emoji | for my bedroom door
    girl scout | 10 | childlike | exclaims emoji | for our camp
    choir boy | 11 | childlike | lowercase | for the songbook
    schoolboy | 12 | slangy | lowercase unpunctuated | for my homework
    schoolgirl | 13 | slangy | emoji lowercase | for my diary
    skater | 15 | slangy | lowercase unpunctuated typos | for my deck
    gamer | 16 | slangy | lowercase emoji | for my profile
    high school student | 17 | slangy | typos | for a school project
    drummer in a school band | 17 | slangy | shouting | for our gig
    exchange student | 18 | polite | typos hedges | for my host family
    apprentice baker | 18 | terse | lowercase | for the shop counter
    au pair | 19 | polite | greets emoji | for the little ones
    art student | 20 | verbose | hedges ellipsis | for a mood board
    biology student | 21 | polite | greets | for my lab book
    physics student | 22 | terse | unpunctuated | for a slide
    law student | 23 | verbose | greets signs | for our debating club
    medical student | 24 | terse | typos | for flash cards
    language student | 22 | polite | hedges | for a vocabulary game
    waiter | 21 | slangy | emoji | for the menu
    barista | 23 | slangy | lowercase emoji | for the chalkboard
    bicycle courier | 24 | slangy | lowercase unpunctuated | for my bag
    streamer | 22 | slangy | shouting emoji | for my channel
    podcaster | 27 | slangy | exclaims | for the next episode
    dancer | 25 | verbose | emoji | for our show
    yoga teacher | 31 | polite | greets emoji | for the studio
    personal trainer | 28 | slangy | exclaims shouting | for the gym
    football coach | 38 | terse | exclaims | for the team
    lifeguard | 26 | slangy | lowercase | for the noticeboard
    nurse | 34 | polite | greets | for the children's ward
    midwife | 41 | polite | greets signs | for a greeting card
    paramedic | 33 | terse | unpunctuated | for the staff room
    doctor | 46 | terse | signs | for the waiting room
    dentist | 44 | polite | greets signs | for the waiting room ceiling
    pharmacist | 39 | polite | greets | for a leaflet
    vet | 42 | polite | emoji | for the practice
    physiotherapist | 36 | polite | hedges | for an exercise sheet
    psychologist | 48 | verbose | hedges ellipsis | for a talk
    optician | 50 | polite | signs | for an eye chart
    nursery teacher | 29 | polite | emoji greets | for the cloakroom hooks
    primary school teacher | 37 | polite | greets exclaims | for my class
    maths teacher | 45 | terse | signs | for a worksheet
    history teacher | 53 | verbose | ellipsis | for a quiz
    music teacher | 40 | polite | hedges | for a concert programme
    head teacher | 57 | verbose | greets signs | for the school newsletter
    professor | 61 | verbose | hedges signs | for a lecture
    librarian | 49 | polite | greets signs | for a reading corner
    museum guide | 52 | verbose | greets | for our visitors
    archivist | 55 | verbose | hedges | for an exhibition label
    journalist | 35 | terse | hedges | for an article
    novelist | 43 | verbose | ellipsis | for a chapter
    poet | 30 | verbose | ellipsis lowercase | for a poem of mine
    copywriter | 32 | slangy | exclaims | for a campaign
    translator | 47 | polite | hedges | for my website
    bookseller | 51 | polite | greets | for the window display
    baker | 45 | terse | typos | for a cake
    cook | 38 | terse | shouting | for the specials
    butcher | 54 | terse | unpunctuated | for a sign
    greengrocer | 56 | polite | exclaims | for the stall
    cheesemonger | 48 | verbose | exclaims | for the labels
    brewer | 37 | slangy | emoji | for a bottle label
    wine merchant | 58 | verbose | greets | for the price list
    hairdresser | 29 | slangy | emoji exclaims | for the mirror
    tailor | 60 | polite | hedges | for a patch
    shoemaker | 63 | terse | typos | for the shop
    jeweller | 52 | polite | signs | for an engraving
    carpenter | 44 | terse | lowercase | for a toy chest lid
    plumber | 41 | terse | unpunctuated typos | for the van
    electrician | 36 | terse | lowercase unpunctuated | for my business card
    decorator | 39 | slangy | typos | for a nursery wall
    bricklayer | 47 | slangy | lowercase typos | for my lad
    mechanic | 34 | slangy | unpunctuated | for the workshop
    bus driver | 50 | polite | emoji | for the staff party
    train conductor | 46 | polite | signs | for my whistle case
    pilot | 43 | terse | signs | for the crew lounge
    flight attendant | 31 | polite | emoji greets | for young passengers
    postman | 48 | slangy | exclaims | for a stamp
    firefighter | 35 | terse | exclaims | for our open day
    police officer | 40 | terse | signs | for road safety lessons
    soldier | 26 | terse | shouting | for the barracks
    sailor | 57 | slangy | ellipsis | for a tattoo
    farmer | 59 | terse | typos ellipsis | for the farm shop
    gardener | 62 | polite | ellipsis greets | for the garden gate
    beekeeper | 64 | polite | ellipsis | for the honey jars
    fisherman | 66 | terse | ellipsis typos | for the boat shed
    park ranger | 45 | polite | greets | for a trail board
    software developer | 30 | terse | lowercase | for an icon
    data scientist | 33 | verbose | hedges | for a dashboard
    game designer | 28 | slangy | ellipsis | for a level
    architect | 42 | verbose | signs | for a pitch
    engineer | 51 | terse | hedges | for a manual
    accountant | 49 | polite | signs | for the tax office door
    banker | 53 | polite | greets signs | for a savings leaflet
    lawyer | 47 | verbose | greets signs | for our chambers
    estate agent | 38 | verbose | exclaims | for a brochure
    travel agent | 44 | verbose | emoji exclaims | for an offer
    office manager | 41 | polite | hedges greets | for the kitchen fridge
    receptionist | 27 | polite | emoji | for the front desk
    mayor of a village | 60 | verbose | greets signs | for the village fair
    priest | 65 | polite | signs | for the parish letter
    wedding planner | 36 | verbose | exclaims emoji | for an invitation
    mother of three | 39 | slangy | typos emoji | for a birthday party
    father of twins | 37 | terse | typos | for two lunch boxes
    grandmother | 72 | polite | ellipsis greets | for my grandchildren
    grandfather | 76 | verbose | ellipsis typos | for the grandchildren
    retired engineer | 69 | verbose | signs | for my model railway
    retired seamstress | 78 | polite | typos greets | for an embroidery
    widower | 81 | terse | ellipsis | for the mantelpiece
    amateur magician | 34 | slangy | exclaims | for my act
    quiz master | 42 | slangy | exclaims hedges | for the picture round
""")


@dataclass(frozen=True)
class Manner:
    """The phrases of a register.

    Attributes:
        requests: Whole requests; `{phrase}` is what is wanted.
        likes: Requests for something like a picture that is shown; `{phrase}` is what should be different.
        sames: Requests for just what a picture shows; `{phrase}` is what that is.
        changes: Requests to change what was drawn before; `{phrase}` begins with a verb, as does `{Phrase}`.
        purposes: What a picture is for; `{purpose}` is the role's.
        hedges: Doubts that stand before or after a request.
        greetings, farewells: What stands first and last.
        praises: Adjectives before what is wanted, which change nothing about it; "" for none.
    """

    requests: tuple[str, ...]
    likes: tuple[str, ...]
    sames: tuple[str, ...]
    changes: tuple[str, ...]
    purposes: tuple[str, ...]
    hedges: tuple[str, ...]
    greetings: tuple[str, ...]
    farewells: tuple[str, ...]
    praises: tuple[str, ...]


MANNERS: dict[str, Manner] = {
    "polite": Manner(
        requests=(
            "Could you please make {phrase} for me?",
            "Would you mind drawing {phrase}, please?",
            "I would love to have {phrase}, if that is possible.",
            "May I ask you for {phrase}?",
            "I'd be grateful for {phrase}.",
        ),
        likes=(
            "Could I please have something like this picture, but {phrase}?",
            "I like this one very much. Would you make another, only {phrase}, please?",
            "Here is one that I found. Mine should be just like it, but {phrase}, please.",
        ),
        sames=(
            "Could you please make me something like this picture: {phrase}?",
            "I like this one very much. May I have one that also shows {phrase}?",
            "I found this. I would love to have {phrase}, just as it is here.",
        ),
        changes=(
            "Thank you! Could you {phrase}, please?",
            "That is kind of you. Would you {phrase}, please?",
            "Lovely. If you don't mind, please {phrase}.",
        ),
        purposes=("It's {purpose}.", "I need it {purpose}, you see."),
        hedges=("I am not sure how to put this.", "I hope that makes sense."),
        greetings=("Hello,", "Good morning,", "Hello there,"),
        farewells=("Kind regards", "Many thanks", "Thank you so much"),
        praises=("", "", "nice", "lovely", "beautiful"),
    ),
    "slangy": Manner(
        requests=(
            "Yo, can u do {phrase}?",
            "Hook me up with {phrase}, will ya?",
            "So I kinda want {phrase}, thanks.",
            "Gimme {phrase}, that'd be awesome.",
            "Any chance of {phrase}? Would be sick.",
        ),
        likes=(
            "This one's cool, do me the same thing but {phrase}, ok?",
            "Check this out. I want that vibe, just {phrase}.",
            "Can u copy this but {phrase}? Cheers.",
        ),
        sames=(
            "Saw this, want one too. It's {phrase}, right?",
            "Can u make me one like this pic? So, {phrase}.",
            "This is so me. Gimme {phrase}, same vibe.",
        ),
        changes=(
            "Nice one! Now {phrase}, yeah?",
            "Cool, but can u {phrase}?",
            "Hmm, nah. {Phrase} and we're good.",
        ),
        purposes=("It's {purpose}, lol.", "Wanna use it {purpose}."),
        hedges=("Dunno if that works.", "No idea how to say it, but."),
        greetings=("Hey,", "Yo,", "Hiya,"),
        farewells=("Cheers", "Thx", "Laters"),
        praises=("", "", "cool", "awesome", "proper"),
    ),
    "terse": Manner(
        requests=(
            "I need {phrase}.",
            "One picture: {phrase}.",
            "Draw {phrase}.",
            "Want {phrase}. That's all.",
            "Make {phrase}, quickly.",
        ),
        likes=(
            "Like this, but {phrase}.",
            "Same as this one. Only {phrase}.",
            "This, {phrase}.",
        ),
        sames=(
            "Like this. {Phrase}.",
            "One like this: {phrase}.",
            "Same as this picture, {phrase}.",
        ),
        changes=("{Phrase}.", "Good. {Phrase}.", "No. {Phrase}."),
        purposes=("{Purpose}.", "It's {purpose}."),
        hedges=("Roughly.", "More or less."),
        greetings=("Hi.", "Morning.", "Hello."),
        farewells=("Thanks", "Done", "That's it"),
        praises=("", "", "", "good", "decent"),
    ),
    "childlike": Manner(
        requests=(
            "Can you draw me {phrase}? Pretty please!",
            "I want {phrase}!",
            "Please please make {phrase} for me.",
            "I wish I had {phrase}. Can you do that?",
            "You know what I like? It's {phrase}!",
        ),
        likes=(
            "Look at this! I want one too, but {phrase}!",
            "My friend has this picture. Can I have it but {phrase}?",
            "I like this one. Make me the same, but {phrase}, please!",
        ),
        sames=(
            "Look at this! I want one like it! It's {phrase}!",
            "My friend has this picture. Can you draw me {phrase} too?",
            "I like this one. Make me {phrase}, just like here, please!",
        ),
        changes=(
            "Yay! And now {phrase}, please!",
            "Oh wow! Can you {phrase}?",
            "Hmm, can you {phrase}? Pretty please!",
        ),
        purposes=("It's {purpose}!", "I want to give it away, it's {purpose}."),
        hedges=("I don't know the word.", "Can you do that?"),
        greetings=("Hi hi!", "Hello!", "Hey you!"),
        farewells=("Bye bye", "Thank you", "You are the best"),
        praises=("", "really cool", "super nice", "wonderful", "very very pretty"),
    ),
    "verbose": Manner(
        requests=(
            "I have been thinking about this for quite a while, and what I would really like to see is {phrase}.",
            "Let me explain what I have in mind: imagine, if you will, {phrase}, nothing more and nothing less.",
            "What I am looking for, and I have looked in many places already, is {phrase}.",
            "If it is not too much to ask, I wonder whether you might come up with {phrase}, and take all the time "
            "that you need.",
        ),
        likes=(
            "I came across this picture the other day and was quite taken with it. I should like to have one in just "
            "the same manner, but {phrase}.",
            "Please have a close look at the picture that I attach, because mine ought to be very much like it, "
            "except that I would have it {phrase}.",
        ),
        sames=(
            "I came across this picture the other day and was quite taken with it. I should like to have one in "
            "just the same manner: {phrase}.",
            "Please have a close look at the picture that I attach. What I see there, and what "
            "I would like to have, is {phrase}.",
        ),
        changes=(
            "That is already rather close to what I imagined. On reflection, however, I would ask you to {phrase}.",
            "I have looked at it for some time now, and I believe it would gain a great deal if you could {phrase}.",
            "Splendid, we are getting there. What remains, in my opinion, is to {phrase}.",
        ),
        purposes=(
            "You may wonder what I need it for: it's {purpose}.",
            "It's {purpose}, and I would not ask if it did not matter to me.",
        ),
        hedges=(
            "I am afraid I lack the proper words for such things.",
            "Forgive me if I do not express myself well, I am new to all this.",
        ),
        greetings=("A very good day to you,", "Dear sir or madam,", "Well, good afternoon,"),
        farewells=("With my very best wishes", "Yours sincerely", "In anticipation of your reply"),
        praises=("", "rather fine", "truly splendid", "well-made", "charming"),
    ),
}
EMOJI = ("🙂", "🙏", "😍", "✨", "🎉", "👍", "😅", "💕")
REPLIES = (
    "Here you go! Is there anything you would like to change?",
    "Here is a first version. What do you think?",
    "Done. Shall I change something?",
    "I have drawn it. Does it look as you imagined?",
    "All right, here it is.",
)
"""What the assistant says between the turns of a history."""
