"""Which drawings the demo base learns, under which noun, and which it never sees."""

STYLES = ("noto", "noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione")
CLASSIFIER_STYLE = "streamline-emojis"
"""Drawings that the base never learns; the caption classifier does, so that it knows more than the base has seen."""
FLAT_STYLES = ("fluent-emoji-flat", "twemoji")

HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

NOUNS: dict[str, tuple[str, ...]] = {
    "dog": ("dog", "poodle", "guide-dog", "service-dog"),
    "dog face": ("dog-face",),
    "cat": ("cat", "black-cat"),
    "cat face": ("cat-face", "grinning-cat", "grinning-cat-with-smiling-eyes", "smiling-cat-with-heart-eyes"),
    "clock": ("alarm-clock", "mantelpiece-clock", *(f"{hour}-o-clock" for hour in HOURS[::2])),
    "bird": ("bird", "black-bird", "dove", "duck", "baby-chick"),
    "car": ("automobile", "taxi", "police-car", "sport-utility-vehicle"),
    "flower": ("blossom", "tulip", "rose", "hibiscus", "sunflower", "cherry-blossom"),
    "cup": ("hot-beverage", "teacup-without-handle"),
    "house": ("house", "house-with-garden", "hut", "derelict-house"),
    "tree": ("deciduous-tree", "evergreen-tree", "christmas-tree", "palm-tree"),
    "shoe": ("running-shoe", "man-s-shoe"),
    "boot": ("woman-s-boot", "hiking-boot"),
    "hat": ("top-hat", "woman-s-hat"),
    "glasses": ("glasses", "sunglasses"),
    "fish": ("fish", "tropical-fish"),
    "ball": ("soccer-ball", "basketball", "volleyball"),
    "apple": ("red-apple", "green-apple"),
    "horse": ("horse",),
    "rabbit": ("rabbit",),
    "umbrella": ("umbrella",),
    "backpack": ("backpack",),
    "teddy bear": ("teddy-bear",),
    "robot": ("robot",),
    "butterfly": ("butterfly",),
    "elephant": ("elephant",),
    "penguin": ("penguin",),
    "pig": ("pig",),
    "owl": ("owl",),
    "turtle": ("turtle",),
    "mushroom": ("mushroom",),
    "bus": ("bus",),
    "airplane": ("airplane",),
    "boat": ("sailboat",),
    "banana": ("banana",),
    "strawberry": ("strawberry",),
    "cake": ("birthday-cake",),
    "guitar": ("guitar",),
    "crown": ("crown",),
    "bell": ("bell",),
    "snowman": ("snowman", "snowman-without-snow"),
    "pumpkin": ("jack-o-lantern",),
    "bear": ("bear",),
    "frog": ("frog",),
    "lion": ("lion",),
    "cow": ("cow",),
    "monkey": ("monkey",),
    "panda": ("panda",),
    "bee": ("honeybee",),
    "octopus": ("octopus",),
    "fox": ("fox",),
    "snail": ("snail",),
    "train": ("locomotive",),
    "bicycle": ("bicycle",),
    "truck": ("articulated-lorry", "delivery-truck"),
    "rocket": ("rocket",),
    "bowl": ("bowl-with-spoon", "cooked-rice", "green-salad", "steaming-bowl"),
    "vase": ("amphora",),
    "candle": ("candle",),
    "book": ("blue-book", "green-book", "closed-book", "orange-book"),
    "camera": ("camera",),
    "television": ("television",),
    "gift": ("wrapped-gift",),
    "star": ("star",),
    "lemon": ("lemon",),
    "pineapple": ("pineapple",),
    "hamburger": ("hamburger",),
    "dress": ("dress",),
    "teapot": ("teapot",),
    "balloon": ("balloon",),
}

# Drawings filed under a name that they do not show (a face instead of the animal, a hoop with the ball).
RENAMED = {
    "fxemoji/dog": "dog face",
    "emojione/dog": "dog face",
    "fxemoji/cat": "cat face",
    "emojione/cat": "cat face",
}
DROPPED = (
    "emojione/poodle", "fxemoji/bird", "fxemoji/baby-chick", "noto-v1/basketball", "emojione/basketball",
    "noto/rabbit", "noto-v1/rabbit", "emojione/rabbit", "fxemoji/pig", "fxemoji/sailboat", "fxemoji/derelict-house",
    "emojione/derelict-house", "noto/snowman", "noto-v1/snowman", "twemoji/delivery-truck",
    "emojione/articulated-lorry", "emojione/cow",
)  # fmt: skip

# Whole designs kept out of training, so that subject-driven fine-tuning can be judged on unseen subjects.
HELD_OUT_STYLE = "noto-v1"
HELD_OUT_SLUGS = (
    "dog", "cat", "alarm-clock", "automobile", "tulip", "hot-beverage", "running-shoe", "backpack", "house",
)  # fmt: skip
HELD_OUT = frozenset(f"{HELD_OUT_STYLE}/{slug}" for slug in HELD_OUT_SLUGS)

# Drawn facing left in nearly every style, and never mirrored: with both directions a small model draws neither.
ONE_SIDED = (
    "dog", "cat", "bird", "fish", "horse", "rabbit", "shoe", "boot", "cup", "elephant", "pig", "turtle", "bus",
    "airplane", "guitar", "cow", "snail", "bee", "train", "bicycle", "truck", "rocket", "teapot",
)  # fmt: skip

FACES = ("dog face", "cat face", "bear", "lion", "panda", "fox")
WEARERS = (
    *FACES, "dog", "cat", "bird", "horse", "rabbit", "teddy bear", "robot", "elephant", "penguin", "pig", "owl", "frog",
    "cow", "monkey", "octopus", "snail",
)  # fmt: skip

# Sampled more often than the square root of their number of drawings alone would give.
EMPHASIS = {"dog": 2.0, "cat": 1.6, "clock": 1.2, "bird": 1.2, "car": 1.2, "flower": 1.2}


def noun_of_slug(slug: str) -> str | None:
    """Returns the noun of a name such as "dog" or "dog_2", whatever its style, or None if there is none."""
    return next((noun for noun, slugs in NOUNS.items() if slug.split("_")[0] in slugs), None)


def noun_of(key: str) -> str | None:
    """Returns the noun under which the drawing `style/slug` is trained, or None if it is not."""
    style, slug = key.split("/")
    if style not in STYLES or key in HELD_OUT or key in DROPPED:
        return None
    return RENAMED[key] if key in RENAMED else noun_of_slug(slug)
