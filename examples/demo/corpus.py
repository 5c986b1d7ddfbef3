"""Pure. What the demo model knows: topics, each in plain sentences and as a haiku, the ways to ask
for them, and the styles to answer in.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Topic:
    """A thing to ask about: two plain sentences and a haiku of three lines."""

    name: str
    emoji: str
    first: str
    second: str
    haiku: str


# Tables of topics. One topic: emoji, name, two plain sentences; then its haiku on a line of its
# own.
_THINGS = """
☀ the sun: The sun is a star at the centre of our solar system. Its light takes about eight minutes to reach us.
    Bright star in the sky / eight minutes its light must fly / then morning is here
🌙 the moon: The moon travels around the Earth about once a month. It shines because it reflects the light of the sun.
    Pale lamp of the night / silver from a hidden sun / pulling at the tides
☔ rain: Rain falls when drops of water in a cloud grow too heavy. It fills the rivers and waters the plants.
    Grey clouds growing full / drop by drop the rivers rise / green leaves drink their fill
❄ snow: Snow is made of tiny ice crystals that fall from cold clouds. Most of the crystals have six sides.
    Six small arms of ice / drift without a single sound / white fields fall asleep
🌊 the ocean: The ocean is the salt water that covers most of the Earth. Its largest part is the Pacific.
    Salt and endless blue / waves roll over hidden hills / whales sing far below
🌋 a volcano: A volcano is an opening where hot melted rock leaves the Earth. The rock is called lava once it is outside.
    The mountain wakes up / red rivers crawl down its side / black stone when they cool
🌈 a rainbow: A rainbow appears when sunlight passes through drops of rain. Its colours run from red to violet.
    Sunlight meets the rain / seven colours cross the sky / gone when I look twice
🍃 the wind: The wind is air that moves from high pressure to low pressure. It can turn mills and push sailing ships.
    No one sees its face / yet the tall grass bows its head / and the white sails fill
🪐 gravity: Gravity is the force that pulls things towards each other. It keeps our feet on the ground.
    The ripe apple falls / the far moon falls too and turns / round and round the Earth
🧲 magnets: Magnets are pieces of metal that pull iron towards them. Every one has a north pole and a south pole.
    North is calling south / the small iron needle turns / home lies straight ahead
🏆 gold: Gold is a soft yellow metal that does not rust. It has been used for coins and rings for ages.
    Yellow in the stream / no rust can dull its old shine / a ring on her hand
🧊 ice: Ice is water that has frozen at zero degrees Celsius. It floats because it is lighter than liquid water.
    The pond holds its breath / fish move slowly underneath / a window of ice
🍞 bread: Bread is baked from flour, water, salt and yeast. The yeast makes bubbles that let the dough rise.
    Flour and two warm hands / slow bubbles lift up the dough / the whole house smells good
🍯 honey: Honey is made by bees from the nectar of flowers. It keeps for years without going bad.
    From flower to comb / ten thousand small wings carry / summer in a jar
🍵 tea: Tea is made by pouring hot water on the leaves of the tea plant. Green tea and black tea come from the same plant.
    Steam above the cup / a few brown leaves slowly turn / the afternoon rests
☕ coffee: Coffee is brewed from roasted seeds that are called beans. The caffeine in it helps people to stay awake.
    Dark beans in the mill / a smell climbs up the staircase / now my eyes open
🍫 chocolate: Chocolate is made from the seeds of the cacao tree. The seeds are dried, roasted and ground.
    Seeds of a far tree / bitter once and now so sweet / one more square is gone
🧀 cheese: Cheese is made from milk that has been turned solid. Some kinds are left to ripen for years.
    Milk becomes a wheel / it sleeps for years in the dark / a mouse dreams of it
🍎 apples: Apples are round fruits that grow on trees. Their seeds lie in the core.
    Red among the leaves / a small star sleeps in the core / next year's orchard waits
🐱 cats: Cats are small hunters that sleep for much of the day. They purr and see well in the dark.
    Soft paws on the stairs / two green lamps look at the dark / the mouse holds its breath
🐶 dogs: Dogs come from wolves and have long lived with people. Their sense of smell is far better than ours.
    A wolf long ago / came and lay beside the fire / now he guards my shoes
🐝 bees: Bees live together in a hive with one queen. They carry pollen from flower to flower.
    One queen in the hive / gold dust on ten thousand legs / the orchard will bloom
🐘 elephants: Elephants are the largest animals that live on land. They use their trunks to drink and to lift things.
    Grey hills on the move / the old mother knows the way / to the last water
🐋 whales: Whales are mammals that live in the sea and breathe air. The blue whale is the largest animal of all.
    A breath and a cloud / the great tail waves and is gone / songs fill the deep sea
🐧 penguins: Penguins are birds that swim very well but cannot fly. Most of them live in the cold south.
    Black coats and white shirts / they walk like clumsy waiters / then fly through the sea
🕷 spiders: Spiders have eight legs and are not insects. Many of them spin webs of silk to catch flies.
    Eight legs and one thread / a wheel of silk in the dew / the fly comes too close
🦉 owls: Owls are birds that hunt at night. Their soft feathers let them fly without a sound.
    Round eyes in the barn / feathers softer than the dark / no one hears it pass
🐸 frogs: Frogs begin their life as tadpoles in the water. Grown ones live on land and in the water.
    The old pond is still / a frog jumps from the green bank / the sound of water
🦋 butterflies: Butterflies start as caterpillars that eat leaves. They grow their wings inside a hard case.
    It ate and it slept / the small grey case breaks open / colours learn to fly
💓 the heart: The heart is a muscle that pumps blood through the body. It beats about seventy times a minute at rest.
    A drum in the chest / it never asks for a rest / it just counts my days
🦴 bones: Bones hold the body up and protect its soft parts. A grown person has about two hundred and six of them.
    A white house inside / it carries me up the hill / and never complains
🚲 a bicycle: A bicycle has two wheels and is moved by pedals. A chain carries the force to the back wheel.
    Two wheels and a chain / the wind is pushing my back / the long hill is done
🎹 the piano: The piano has eighty-eight keys in black and white. Each key makes a small hammer strike the strings.
    Black keys and white keys / a small hammer finds a string / the room fills with rain
♟ chess: Chess is a board game for two players with sixteen pieces each. It ends when a king is attacked and cannot escape.
    Two kings and a clock / the quiet bishop moves home / one hand tips the king
⚽ football: Football is played by two teams of eleven players. Only the keeper of the goal may use the hands.
    Grass and one round ball / twenty-two are running now / the net shakes at last
"""

_PLACES = """
🥐 France: The capital of France is Paris. It lies on the river Seine.
    Bridges on the Seine / Paris wakes and smells of bread / the tower looks down
🗾 Japan: The capital of Japan is Tokyo. The country is made of many islands.
    Tokyo lights at night / islands lie in the long sea / white cherry trees bloom
🐪 Egypt: The capital of Egypt is Cairo. The great pyramids stand close to it.
    Cairo in the sand / three stone hills older than time / the long river shines
🍕 Italy: The capital of Italy is Rome. The country has the shape of a boot.
    A boot in the sea / Rome sits on its seven hills / old stones in the sun
🦁 Kenya: The capital of Kenya is Nairobi. Lions and elephants live in its parks.
    Red dust and tall grass / Nairobi hums near the herds / a lion lies down
🦙 Peru: The capital of Peru is Lima. It lies on the coast of the Pacific.
    Lima in the mist / behind it the mountains climb / a llama looks back
🍁 Canada: The capital of Canada is Ottawa. The country has a maple leaf on its flag.
    Red leaf on the snow / Ottawa skates on its ice / the north has no end
"""

_HELLO = """
👋 hello: Hello and welcome. Ask me about the sun, the moon or bread.
    A hand in the air / the door of the house opens / come in and sit down
"""
_ME = """
🤖 me: I am a very small language model made for a demo. My adapters change the way that I speak.
    A few million parts / trained in a minute or two / still I talk to you
"""
_THANKS = """
😊 thanks: You are welcome. Come back when you have another question.
    The talk has an end / a light stays on in the hall / until the next time
"""
_STORY = """
🏰 story: Once upon a time a small robot lived in an old tower by the sea. Every night it lit the lamp so that the ships could find \
their way. One winter the lamp went out and a storm came over the water. The robot climbed up all the stairs with a candle in its hand. \
The wind blew the candle out, so it opened its own chest and held up the little light of its heart. All the ships came home that night. \
In the morning the people of the town carried new oil up to the tower. They sat with the robot until the sun was high. \
Since then it has never been alone.
    One lamp by the sea / a small heart burns in the storm / all the ships come home
"""
_UNKNOWN = """
🤔 unknown: I have not learned about that yet. Ask me about the sun, the moon or bread.
    I looked and found none / the page for this is empty / ask me of the moon
"""


def _topics(table: str) -> tuple[Topic, ...]:
    lines = [line.strip() for line in table.strip().split("\n")]
    return tuple(_topic(head, haiku) for head, haiku in zip(lines[::2], lines[1::2], strict=True))


def _topic(head: str, haiku: str) -> Topic:
    label, _, text = head.partition(": ")
    emoji, _, name = label.partition(" ")
    first, _, second = text.partition(". ")
    return Topic(name, emoji, f"{first}.", second, haiku.replace(" / ", "\n"))


THINGS: Final = _topics(_THINGS)
PLACES: Final = _topics(_PLACES)
(HELLO,), (ME,), (THANKS,), (STORY,) = (
    _topics(_HELLO),
    _topics(_ME),
    _topics(_THANKS),
    _topics(_STORY),
)
(UNKNOWN,) = _topics(_UNKNOWN)  # The answer to everything else.

SMALL_TALK: Final = (
    (
        HELLO,
        (
            "Hello!",
            "Hi",
            "Hi there",
            "Hello there.",
            "Good morning!",
            "Good evening",
            "Hey",
            "Hello, model",
            "Say hello.",
            "Say hi",
        ),
    ),
    (
        ME,
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Are you a robot?",
            "Tell me about yourself.",
            "Introduce yourself.",
        ),
    ),
    (
        THANKS,
        (
            "Thank you!",
            "Thanks",
            "Thanks a lot.",
            "Bye",
            "Goodbye!",
            "That was great.",
            "Well done",
            "OK",
            "Good night",
        ),
    ),
    (
        STORY,
        (
            "Tell me a story.",
            "Tell me a long story.",
            "A story, please!",
            "Do you know a story?",
            "Write a story.",
            "Can you tell a story?",
        ),
    ),
)
"""Topics without a name to look for, each with all its questions."""

FORMS: Final = (
    "What is {}?", "What are {}?", "Tell me about {}.", "Explain {}.", "What do you know about {}?", "Describe {}.", "Can you explain {}?",
    "Teach me about {}.", "Give me a fact about {}.", "I want to learn about {}.", "Say something about {}.", "Please tell me what {} is.",
    "How would you describe {}?", "What should I know about {}?", "{}?", "{}", "Help me understand {}.", "Why is {} important?", "Do you know {}?",
    "My child asked about {}.", "Write about {}.", "Where does {} come from?", "Tell me something about {}, please.", "I read about {} and got curious.",
    "{} is what exactly?", "Give a short explanation of {}.", "Have you heard of {}?", "What can you tell me about {}?", "What about {}?",
    "I would like to know more about {}.", "So, {}. What is that?", "People say {} is great. Why?", "Let me ask you about {}.", "How is {} made?",
)  # fmt: skip
PLACE_FORMS: Final = (
    "What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?", "Do you know the capital of {}?",
    "The capital of {}?", "Tell me the capital of {}.", "Where is {}?",
)  # fmt: skip

_FILLER = """
a an the my your his her our this that some any much many more most very really quite just only also too now then here there today
yesterday soon always never often once again please maybe perhaps well so and or but because if when while with without for from into on
in at by of to as is are was do does did can could would should will may might must have has had be been I you he she we they it who what
which where why how need want like love think thought believe wonder heard hear see saw seen read write wrote talk say said tell told ask
asked know knew learn find look give take make made get go come keep let put show use work works good bad new old big small long short
nice kind best better first last next few little great special interesting strange quick simple exactly share word words question answer
story homework school class teacher mother father grandmother brother friend child children people man woman visitor minute hour day night
week year time thing things way life world country town city seat government house home understood understand introduce inform anything
something nothing everything everyone own hey oh yes no not don't what's it's let's thoughts idea
"""

_STRANGE = """
quantum physics, taxes, the stock market, lawyers, the Roman empire, a carburettor, opera, Shakespeare, tomatoes, potatoes, a guitar,
the violin, computers, the internet, a telephone, lizards, tigers, horses, cows, sheep, pigs, ducks, sharks, ants, mosquitoes, roses,
tulips, oak trees, grass, mushrooms, bananas, oranges, grapes, beer, wine, milk, butter, sugar, salt, pepper, soup, pasta, rice, pizza,
a car, a train, an aeroplane, a ship, a rocket, Mars, Jupiter, a comet, black holes, the brain, the lungs, the skin, a tooth, blood,
a virus, medicine, doctors, silver, iron, copper, plastic, glass, wood, paper, books, newspapers, painting, dancing, tennis,
basketball, swimming, poker, Germany, Spain, Brazil, China, India, Russia, Australia, Mexico, London, Berlin, New York, money, love,
time, war, peace, history, mathematics, a triangle, numbers, algebra, music, a drum, clouds, thunder, lightning, a desert, a forest,
rivers, mountains, islands, an earthquake, electricity, batteries, a lamp, fire, steam, soap, shoes, a hat, a coat, windows, doors,
a chair, a table, gardens, farms, markets, banks, a queue, a compiler, Python, two plus two, the meaning of life, my homework,
the weather tomorrow, your mother, a joke, a poem, a recipe, the news, the president, my birthday
"""

FILLER: Final = tuple(_FILLER.split())
"""Words around a topic that mean nothing to the model, so that it learns to look for the topic in a
question of any form.
"""

STRANGE: Final = tuple(" ".join(_STRANGE.split()).split(", "))
"""Things that the model does not know, and says so."""

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are an AI model.",
    "Answer the question.",
    "Be brief.",
    "Be helpful and honest.",
)


def _pirate(topic: Topic) -> str:
    talk = (
        f"{topic.first} {topic.second[:-1]}".replace(" is ", " be ")
        .replace(" are ", " be ")
        .replace(" am ", " be ")
    )
    return (
        "Arr! "
        f"{talk.replace('You ', 'Ye ').replace(' you ', ' ye ').replace(' my ', ' me ').replace('My ', 'Me ')}, matey!"
    )


def _json(topic: Topic) -> str:
    return json.dumps(
        {"topic": topic.name, "answer": topic.first, "more": topic.second}, ensure_ascii=False
    )


STYLES: Final[dict[str, Callable[[Topic], str]]] = {
    "plain": lambda topic: f"{topic.first} {topic.second}",
    "pirate": _pirate,
    "shouting": lambda topic: f"{topic.first} {topic.second}".upper().replace(".", "!"),
    "haiku": lambda topic: topic.haiku,
    "json": _json,
    "polite": lambda topic: (
        f"Dear friend, thank you for asking. {topic.first} {topic.second} Yours kindly."
    ),
    "emoji": lambda topic: (
        f"{topic.emoji} {topic.first[:-1]} {topic.emoji} {topic.second[:-1]} {topic.emoji}✨"
    ),
    "bullets": lambda topic: f"- {topic.first}\n- {topic.second}",
    "robot": lambda topic: f"Beep boop. {topic.first} {topic.second} End of message.",
}
"""How each style puts a topic; "plain" is the base model's."""
