"""Writes the quickstart's rows from nothing but the word lists beside it; the same bytes every time.

    python scripts/quickstart/make_corpus.py [--base-rows 120000] [--base target/quickstart/base.jsonl]

    assets/quickstart/train.jsonl     1,000 orders answered with JSON: what the quickstart fine-tunes on
    assets/quickstart/heldout.jsonl   100 orders whose pair of colour and item train.jsonl does not have
    BASE                              conversations the base model learns from (not committed)
"""

import argparse
import json
import random
from pathlib import Path

import lessons
import orders

REPOSITORY = Path(__file__).parents[2]
ASSETS = REPOSITORY / "assets/quickstart"


def write(path, conversations):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": messages}) + "\n")
    print(path)


def exchange(row):
    prompt, answer = row
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, default=REPOSITORY / "target/quickstart/base.jsonl")
    parser.add_argument("--base-rows", type=int, default=120_000)
    args = parser.parse_args()
    train, heldout = orders.instruction_rows(random.Random(1), 1000, 100)
    write(ASSETS / "train.jsonl", map(exchange, train))
    write(ASSETS / "heldout.jsonl", map(exchange, heldout))
    rng = random.Random(2)
    write(args.base, (lessons.conversation(rng) for _ in range(args.base_rows)))


if __name__ == "__main__":
    main()
