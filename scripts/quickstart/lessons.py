"""The lessons of the base model: short exchanges about the small world, each drawn by a function `rng -> (user, assistant)`."""

import orders
from world import (
    ANIMALS, CAPITALS, COLOURS, DAYS, ITEMS, MONTHS, NAMES, NUMBERS, OPPOSITES, PLACES, SEASONS, THINGS_WITH_COLOUR, article,
    sentence, things,
)

WORDS = NAMES + COLOURS + list(ITEMS) + [word for pair in OPPOSITES for word in pair] + [animal[0] for animal in ANIMALS]


def confirm_order(rng):
    order = orders.draw(rng)
    return order.prompt(rng), order.confirmation()


def question_order(rng):
    order = orders.draw(rng)
    question, answer = order.question(rng)
    return f"{order.prompt(rng)} {question}", answer


def repeat_word(rng):
    word = rng.choice(WORDS)
    return rng.choice(["Repeat the word {}.", 'Say "{}" and nothing else.', "Echo: {}"]).format(word), word


def repeat_words(rng):
    words = rng.sample(WORDS, rng.randint(2, 5))
    return f"Repeat after me: {' '.join(words)}", " ".join(words)


def quote_words(rng):
    words = rng.sample(WORDS, rng.randint(1, 4))
    ask = rng.choice(["Put in quotes: {}", "Quote each word: {}"])
    return ask.format(", ".join(words)), ", ".join(f'"{word}"' for word in words)


def label_words(rng):
    words = [("name", rng.choice(NAMES)), ("colour", rng.choice(COLOURS)), ("item", rng.choice(list(ITEMS))),
             ("count", str(rng.randrange(len(NUMBERS))))]
    chosen = rng.sample(words, rng.randint(1, 4))
    return f"Label these: {', '.join(word for _, word in chosen)}", ", ".join(f"{label}: {word}" for label, word in chosen)


def bracket_words(rng):
    kind, opening, closing = rng.choice([("round", "(", ")"), ("square", "[", "]"), ("curly", "{", "}")])
    words = rng.sample(WORDS, rng.randint(1, 3))
    if rng.random() < 0.3:
        return f"Which brackets are these? {opening}{' '.join(words)}{closing}", f"They are {kind} brackets."
    return f"Put in {kind} brackets: {' '.join(words)}", f"{opening}{' '.join(words)}{closing}"


def reverse_words(rng):
    words = rng.sample(WORDS, rng.randint(2, 4))
    return f"Say these in reverse: {', '.join(words)}", ", ".join(reversed(words))


def pick_word(rng):
    words = rng.sample(WORDS, rng.randint(3, 5))
    which, word = rng.choice([("first", words[0]), ("last", words[-1]), ("second", words[1])])
    return f"Which word is {which}? {', '.join(words)}", word


def spell(rng):
    word = rng.choice(WORDS)
    return f"Spell {word}.", "-".join(word)


def plural(rng):
    item, many = rng.choice(list(ITEMS.items()))
    return rng.choice([(f"What are several of {article(item)} {item} called?", many), (f"What is one of the {many} called?", item)])


def number(rng):
    value = rng.randrange(len(NUMBERS))
    word = NUMBERS[value]
    return rng.choice([(f"Write {word} in digits.", str(value)), (f"Write {value} in words.", word)])


def count_on(rng):
    start = rng.randrange(len(NUMBERS) - 3)
    digits = rng.random() < 0.5
    shown = [str(n) if digits else NUMBERS[n] for n in range(start, start + 4)]
    return f"Count on: {', '.join(shown[:2])}", ", ".join(shown[2:])


def add(rng):
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.5:
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    return f"What is {a + b} minus {b}?", f"{a + b} minus {b} is {a}."


def next_day(rng):
    days, kind = rng.choice([(DAYS, "day"), (MONTHS, "month"), (SEASONS, "season")])
    at = rng.randrange(len(days))
    if rng.random() < 0.5:
        return f"Which {kind} comes after {days[at]}?", f"After {days[at]} comes {days[(at + 1) % len(days)]}."
    return f"Which {kind} comes before {days[at]}?", f"Before {days[at]} comes {days[at - 1]}."


def opposite(rng):
    one, other = rng.sample(rng.choice(OPPOSITES), 2)
    return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."


def animal(rng):
    name, sound, home, legs = rng.choice(ANIMALS)
    return rng.choice([
        (f"What does the {name} say?", f"The {name} says {sound}."),
        (f"Where does the {name} live?", f"The {name} lives in the {home}."),
        (f"How many legs has the {name}?", f"The {name} has {NUMBERS[legs]} legs." if legs else f"The {name} has no legs."),
        (f"Who says {sound}?", f"The {name} says {sound}."),
    ])


def colour(rng):
    thing, shade = rng.choice(THINGS_WITH_COLOUR)
    return f"What colour is {thing}?", sentence(f"{thing} is {shade}")


def capital(rng):
    country, city = rng.choice(CAPITALS)
    if rng.random() < 0.5:
        return f"What is the capital of {country}?", f"The capital of {country} is {city}."
    return f"{city} is the capital of which country?", f"{city} is the capital of {country}."


def story(rng):
    people, places = rng.sample(NAMES, 2), rng.sample(PLACES, 2)
    items, shades = rng.sample(list(ITEMS), 2), rng.sample(COLOURS, 2)
    text = " ".join(f"{p} puts the {s} {i} in the {at}." for p, s, i, at in zip(people, shades, items, places))
    k = rng.randrange(2)
    return rng.choice([
        (f"{text} Where is the {items[k]}?", f"The {items[k]} is in the {places[k]}."),
        (f"{text} Who has put something in the {places[k]}?", f"{people[k]} has."),
        (f"{text} What colour is the {items[k]}?", f"The {items[k]} is {shades[k]}."),
        (f"{text} What is in the {places[k]}?", f"The {shades[k]} {items[k]} is in the {places[k]}."),
    ])


def shelf(rng):
    person, count, shade, item = rng.choice(NAMES), rng.randint(1, 20), rng.choice(COLOURS), rng.choice(list(ITEMS))
    have = f"{person} has {count} {shade} {things(count, item)}."
    return f"{have} Say it with words.", f"{person} has {NUMBERS[count]} {shade} {things(count, item)}."


def small_talk(rng):
    return rng.choice([
        ("Hello!", "Hello! How can I help?"),
        ("Good morning.", "Good morning! What can I do for you?"),
        ("Who are you?", "I am a very small model. I work in a toy shop."),
        ("What can you do?", "I take orders, repeat words and know a few facts."),
        ("Thank you.", "You are welcome."),
        ("How are you?", "I am fine, thank you."),
        ("Goodbye.", "Goodbye! Come again."),
        (f"My name is {(name := rng.choice(NAMES))}.", f"Nice to meet you, {name}."),
    ])


# How often each lesson comes up. Orders and copying carry the instruction set; the rest keeps the model a chat model.
LESSONS = {
    confirm_order: 16, question_order: 18, repeat_word: 4, repeat_words: 5, quote_words: 10, label_words: 5, bracket_words: 4,
    reverse_words: 2, pick_word: 2, spell: 2, plural: 6, number: 6, count_on: 2, add: 3, next_day: 3, opposite: 3, animal: 4, colour: 2, capital: 3,
    story: 5, shelf: 3, small_talk: 3,
}


def conversation(rng):
    """Messages of one to three lessons in a row."""
    turns = rng.choices([1, 2, 3], [6, 3, 1])[0]
    messages = []
    for lesson in rng.choices(list(LESSONS), list(LESSONS.values()), k=turns):
        user, assistant = lesson(rng)
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages
