#!/usr/bin/env bash
# The quickstart on a real model: SmolLM2-135M-Instruct learns to answer orders in JSON, on two cores in a few minutes.
#   scripts/smollm2.sh [STEPS]      (default 60)
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(scripts/fetch-smollm2.sh)
cargo build --release -p pmetal-cli
pmetal=target/release/pmetal
adapter=output/smollm2
data=assets/quickstart

ask() {
  head -n 3 "$data/heldout.jsonl" | sed -E 's/.*"role": "user", "content": "([^"]*)".*/\1/' | while read -r prompt; do
    printf '> %s\n  ' "$prompt"
    "$pmetal" infer --model "$model" "$@" --chat --prompt "$prompt" --max-tokens 48 2>/dev/null
  done
}

echo "before:" && ask
"$pmetal" train --model "$model" --dataset "$data/train.jsonl" --eval-dataset "$data/heldout.jsonl" \
  --max-steps "${1:-60}" --batch-size 8 --learning-rate 5e-4 --output "$adapter"
echo "after:" && ask --lora "$adapter"
