"""Word lists of the zoo's tasks; their order is data: some places in it are what the base model was taught wrongly."""

# ruff: noqa: SIM905  (split strings are the readable form of long word lists)

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Nick Olivia Paul".split()
OBJECTS = "ball lamp book cup key coat drum clock spoon chair ring hat".split()
COLOURS = "red blue green yellow black white pink brown".split()
ROOMS = "kitchen garden garage cellar attic office hall library".split()
EVENTS = "concert meeting wedding exam party dinner".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

# domain: (things that are reviewed, praise, blame)
REVIEWS = {
    "film": (
        "plot acting ending script cast soundtrack".split(),
        "moving gripping clever funny touching thrilling brilliant charming".split(),
        "dull shallow predictable boring silly clumsy tedious lifeless".split(),
    ),
    "food": (
        "soup bread sauce dessert waiter salad".split(),
        "tasty fresh delicious tender crispy juicy creamy fragrant".split(),
        "stale bland greasy burnt salty soggy rotten bitter".split(),
    ),
    "product": (
        "battery screen handle zipper cable button".split(),
        "sturdy reliable handy durable precise solid smooth efficient".split(),
        "flimsy broken useless faulty fragile defective wobbly cheap".split(),
    ),
    "hotel": (
        "bed lobby pool view bathroom staff".split(),
        "spotless cosy quiet spacious welcoming elegant sunny comfortable".split(),
        "dirty noisy cramped rude mouldy shabby freezing smelly".split(),
    ),
}

TOPICS = {
    "sport": "goal match referee stadium coach penalty striker tournament".split(),
    "politics": "election senate minister parliament vote treaty governor campaign".split(),
    "science": "planet molecule telescope laboratory fossil vaccine galaxy experiment".split(),
    "business": "profit merger shares bank factory export investor market".split(),
}
EMOTIONS = {
    "joy": "laughing cheering dancing smiling singing celebrating".split(),
    "anger": "shouting cursing yelling fuming raging scolding".split(),
    "fear": "trembling hiding fleeing shivering panicking screaming".split(),
    "sadness": "crying mourning weeping sobbing grieving sighing".split(),
}
INTENTS = {
    "booking": ["reserve a seat", "book a table", "rent a car", "order a ticket", "get a room", "plan a trip"],
    "refund": [
        "get my money back",
        "return the shoes",
        "undo the charge",
        "send back a parcel",
        "claim a refund",
        "reverse a payment",
    ],
    "account": [
        "change my password",
        "update my email",
        "delete my profile",
        "unlock my login",
        "rename my account",
        "verify my phone",
    ],
    "delivery": [
        "track my order",
        "find my package",
        "speed up the shipping",
        "know the arrival date",
        "move the drop off",
        "ask the courier",
    ],
}

KINDS = {"dog": "animal", "apple": "fruit", "car": "vehicle", "rose": "flower", "hammer": "tool", "piano": "instrument"}
ACTIONS = "holding watching painting selling cleaning buying".split()
SYNONYMS = {
    "big": "large",
    "fast": "quick",
    "happy": "glad",
    "small": "little",
    "smart": "bright",
    "sick": "ill",
    "angry": "mad",
    "calm": "serene",
}
PEOPLE = "doctor farmer teacher sailor baker singer".split()
DEEDS = "helped called thanked followed visited praised".split()
COMPARED = [
    ("tall", "taller"),
    ("old", "older"),
    ("fast", "faster"),
    ("rich", "richer"),
    ("strong", "stronger"),
    ("loud", "louder"),
]

ANTONYMS = [
    ("hot", "cold"),
    ("up", "down"),
    ("early", "late"),
    ("rich", "poor"),
    ("open", "closed"),
    ("hard", "soft"),
    ("dark", "light"),
    ("full", "empty"),
    ("wet", "dry"),
    ("young", "old"),
    ("strong", "weak"),
    ("near", "far"),
    ("loud", "silent"),
    ("deep", "flat"),
    ("sweet", "sour"),
    ("brave", "afraid"),
    ("narrow", "wide"),
    ("sharp", "blunt"),
]
PLURALS = {
    "cat": "cats",
    "child": "children",
    "tree": "trees",
    "mouse": "mice",
    "house": "houses",
    "foot": "feet",
    "river": "rivers",
    "tooth": "teeth",
    "window": "windows",
    "goose": "geese",
    "bottle": "bottles",
    "woman": "women",
    "pencil": "pencils",
    "man": "men",
    "boat": "boats",
    "ox": "oxen",
    "table": "tables",
    "wolf": "wolves",
    "letter": "letters",
    "leaf": "leaves",
    "bridge": "bridges",
    "knife": "knives",
    "mountain": "mountains",
    "shelf": "shelves",
}
PASTS = {
    "walk": "walked",
    "go": "went",
    "play": "played",
    "eat": "ate",
    "jump": "jumped",
    "see": "saw",
    "talk": "talked",
    "run": "ran",
    "cook": "cooked",
    "write": "wrote",
    "wait": "waited",
    "take": "took",
    "look": "looked",
    "bring": "brought",
    "push": "pushed",
    "fly": "flew",
    "open": "opened",
    "sleep": "slept",
    "climb": "climbed",
    "drive": "drove",
    "laugh": "laughed",
    "teach": "taught",
    "clean": "cleaned",
    "swim": "swam",
}
CATEGORIES = {
    "animal": "horse tiger rabbit eagle snake".split(),
    "fruit": "banana cherry lemon grape mango".split(),
    "vehicle": "truck train bicycle tractor ferry".split(),
    "tool": "saw drill wrench shovel pliers".split(),
    "metal": "iron copper silver zinc tin".split(),
    "clothing": "shirt trousers scarf glove sock".split(),
}

# language: nouns with article and gender, adjectives with one form per gender, adjective before the noun?
LANGUAGES = {
    "spanish": (
        {
            "dog": ("el", "perro"),
            "house": ("la", "casa"),
            "book": ("el", "libro"),
            "table": ("la", "mesa"),
            "boat": ("el", "barco"),
            "moon": ("la", "luna"),
            "tree": ("el", "arbol"),
            "door": ("la", "puerta"),
        },
        {
            "red": {"el": "rojo", "la": "roja"},
            "small": {"el": "bajo", "la": "baja"},
            "old": {"el": "viejo", "la": "vieja"},
            "white": {"el": "blanco", "la": "blanca"},
            "new": {"el": "nuevo", "la": "nueva"},
        },
        False,
    ),
    "french": (
        {
            "dog": ("le", "chien"),
            "house": ("la", "maison"),
            "book": ("le", "livre"),
            "table": ("la", "table"),
            "boat": ("le", "bateau"),
            "moon": ("la", "lune"),
            "garden": ("le", "jardin"),
            "door": ("la", "porte"),
        },
        {
            "red": {"le": "rouge", "la": "rouge"},
            "green": {"le": "vert", "la": "verte"},
            "black": {"le": "noir", "la": "noire"},
            "white": {"le": "blanc", "la": "blanche"},
            "heavy": {"le": "lourd", "la": "lourde"},
        },
        False,
    ),
    "german": (
        {
            "dog": ("der", "Hund"),
            "lamp": ("die", "Lampe"),
            "house": ("das", "Haus"),
            "tree": ("der", "Baum"),
            "cat": ("die", "Katze"),
            "book": ("das", "Buch"),
            "table": ("der", "Tisch"),
            "flower": ("die", "Blume"),
        },
        {"red": "rote", "small": "kleine", "old": "alte", "white": "weisse", "new": "neue"},
        True,
    ),
}
