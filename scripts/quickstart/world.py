"""The small world the quickstart's texts speak of: its words, and how they are written."""

NAMES = (
    "Ada Alma Anton Bela Bruno Carla Clara Dora Edgar Elsa Emil Enno Fabio Flora Greta Hanna Henry Hugo Ida Iris Ivan Jana Jonas "
    "Karin Kiran Lena Leo Linus Lotta Malik Mara Marco Mila Milo Nadia Nils Nora Olga Omar Oscar Paula Petra Quinn Ravi Rosa Ruben "
    "Samir Selma Simon Stella Tara Theo Tilda Tomas Uma Vera Victor Wanda Yara Zoe"
).split()

COLOURS = "red blue green yellow white black brown orange pink grey purple silver golden".split()

# A thing and how several of it are called.
ITEMS = {
    "kite": "kites", "ball": "balls", "drum": "drums", "lamp": "lamps", "boat": "boats", "cup": "cups", "hat": "hats",
    "bell": "bells", "chair": "chairs", "basket": "baskets", "ladder": "ladders", "pencil": "pencils", "ribbon": "ribbons",
    "blanket": "blankets", "button": "buttons", "candle": "candles", "bottle": "bottles", "puppet": "puppets", "wagon": "wagons",
    "mirror": "mirrors", "box": "boxes", "brush": "brushes", "dress": "dresses", "scarf": "scarves", "shelf": "shelves",
    "knife": "knives", "top": "tops", "bag": "bags", "coat": "coats", "flute": "flutes", "clock": "clocks", "spoon": "spoons",
}

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("fast", "slow"), ("open", "closed"), ("wet", "dry"), ("full", "empty"),
    ("loud", "quiet"), ("long", "short"), ("hard", "soft"), ("early", "late"), ("high", "low"), ("near", "far"), ("light", "dark"),
    ("happy", "sad"), ("rich", "poor"), ("thick", "thin"), ("left", "right"), ("up", "down"), ("strong", "weak"),
]

# An animal, what it says, where it lives, how many legs it has.
ANIMALS = [
    ("dog", "woof", "house", 4), ("cat", "meow", "house", 4), ("cow", "moo", "barn", 4), ("sheep", "baa", "field", 4),
    ("duck", "quack", "pond", 2), ("frog", "croak", "pond", 4), ("owl", "hoot", "forest", 2), ("lion", "roar", "grassland", 4),
    ("bee", "buzz", "hive", 6), ("mouse", "squeak", "hole", 4), ("horse", "neigh", "stable", 4), ("pig", "oink", "barn", 4),
    ("crow", "caw", "forest", 2), ("wolf", "howl", "forest", 4), ("hen", "cluck", "barn", 2), ("snake", "hiss", "grass", 0),
]

THINGS_WITH_COLOUR = [
    ("grass", "green"), ("snow", "white"), ("the sky", "blue"), ("a lemon", "yellow"), ("coal", "black"), ("blood", "red"),
    ("chocolate", "brown"), ("a carrot", "orange"), ("milk", "white"), ("a raven", "black"), ("a banana", "yellow"), ("ash", "grey"),
]

CAPITALS = [
    ("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Germany", "Berlin"), ("Japan", "Tokyo"), ("Egypt", "Cairo"),
    ("Norway", "Oslo"), ("Greece", "Athens"), ("Kenya", "Nairobi"), ("Peru", "Lima"), ("Cuba", "Havana"), ("Austria", "Vienna"),
    ("Portugal", "Lisbon"), ("Canada", "Ottawa"), ("India", "Delhi"), ("China", "Beijing"),
]

PLACES = ["garden", "kitchen", "attic", "cellar", "hall", "shed", "school", "tower", "market", "station"]


def article(word):
    """The indefinite article before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def things(count, item):
    """`item` in the number that `count` asks for."""
    return item if count == 1 else ITEMS[item]


def sentence(text):
    """`text` with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."
