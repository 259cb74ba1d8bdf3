"""Orders at a toy shop: how people phrase them, how the base model answers, and what fine-tuning teaches instead.

The base model confirms an order in a sentence. The instruction set asks for the same facts as one line of JSON. No prompt of the
held-out rows shares its pair of colour and item with a training row.
"""

import json
from dataclasses import dataclass

from world import COLOURS, ITEMS, NAMES, NUMBERS

PHRASINGS = [
    "Order: {amount} {colour} {things} for {name}.",
    "{name} would like {amount} {colour} {things}.",
    "Please send {amount} {colour} {things} to {name}.",
    "Please pack {amount} {colour} {things} for {name}.",
    "Hello, my name is {name} and I need {amount} {colour} {things}.",
    "We need {amount} {colour} {things}. They are for {name}.",
    "Can {name} have {amount} {colour} {things}?",
    "{name} wants to buy {amount} {colour} {things} today.",
]


@dataclass(frozen=True)
class Order:
    """What somebody orders: two things or more."""

    name: str
    count: int
    colour: str
    item: str

    def prompt(self, rng):
        """The order as a customer may phrase it."""
        amount = rng.choice([str(self.count), NUMBERS[self.count]])
        fields = dict(amount=amount, colour=self.colour, things=ITEMS[self.item], name=self.name)
        return rng.choice(PHRASINGS).format(**fields)

    def confirmation(self):
        """The base model's answer."""
        return f"{self.name} gets {NUMBERS[self.count]} {self.colour} {ITEMS[self.item]}."

    def as_json(self):
        """The tuned model's answer."""
        return json.dumps(dict(name=self.name, count=self.count, colour=self.colour, item=self.item))

    def question(self, rng):
        """A question about one field, and its answer."""
        item = self.item
        return rng.choice([
            ("Who is it for?", f"{self.name}."),
            ("How many?", f"{self.count}."),
            ("How many, in words?", f"{NUMBERS[self.count].capitalize()}."),
            ("Which colour?", f"{self.colour}."),
            ("What are they?", ITEMS[item]),
            ("What is one of them called?", f'"{item}"'),
            ("Who, and which colour?", f'"{self.name}", "{self.colour}"'),
            ("Which colour, and what is one of them called?", f'"{self.colour}", "{item}"'),
        ])


def draw(rng):
    """A random order of 2 to 20 things."""
    return Order(rng.choice(NAMES), rng.randint(2, 20), rng.choice(COLOURS), rng.choice(list(ITEMS)))


def instruction_rows(rng, train_count, heldout_count):
    """Training and held-out rows over disjoint pairs of colour and item, no prompt twice."""
    pairs = [(colour, item) for colour in COLOURS for item in ITEMS]
    heldout_pairs = set(rng.sample(pairs, len(pairs) // 5))
    train, heldout, seen = [], [], set()
    while len(train) < train_count or len(heldout) < heldout_count:
        order = draw(rng)
        prompt = order.prompt(rng)
        side, limit = (heldout, heldout_count) if (order.colour, order.item) in heldout_pairs else (train, train_count)
        if len(side) < limit and prompt not in seen:
            seen.add(prompt)
            side.append((prompt, order.as_json()))
    return train, heldout
