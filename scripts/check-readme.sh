#!/usr/bin/env bash
# Runs what the README tells a new user to run (the tests aside) and checks what it promises.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

cargo run --release --example quickstart | tee "$out/quickstart"
right=$(sed -nE 's/^held-out answers right: .* ([0-9]+) of 100 after$/\1/p' "$out/quickstart")
seconds=$(sed -nE 's/^[0-9]+ steps in ([0-9]+) s.*/\1/p' "$out/quickstart")
echo "quickstart: $right of 100 right, $seconds s of training"
((right >= 90)) && ((seconds < 120))

cargo build --release -p pmetal-cli
pmetal=target/release/pmetal
base=assets/quickstart/base
export PMETAL_CACHE=$out/cache
"$pmetal" data preview --model "$base" --dataset assets/quickstart/train.jsonl
"$pmetal" data stats --model "$base" --dataset assets/quickstart/train.jsonl
"$pmetal" data convert --dataset assets/quickstart/heldout.jsonl --to alpaca --output "$out/qa.csv"
"$pmetal" data convert --dataset "$out/qa.csv" --columns instruction=instruction,output=output --to messages --output "$out/rows.jsonl.gz"
"$pmetal" train --model "$base" --dataset "$out/rows.jsonl.gz" --dry-run
"$pmetal" train --model "$base" --dataset assets/quickstart/train.jsonl --eval-split 0.1 --max-steps 3 --output "$out/adapter"
"$pmetal" infer --model "$base" --lora "$out/adapter" --chat --prompt "Please pack three red kites for Mara." --max-tokens 16
"$pmetal" train --model "$base" --dataset assets/quickstart/train.jsonl --lora "$out/adapter" --max-seq-len 256 --packing \
  --gradient-checkpointing --gradient-accumulation-steps 2 --max-steps 2 --lr-scheduler-type cosine --warmup-ratio 0.5 --output "$out/again"
"$pmetal" train --model "$base" --dataset assets/quickstart/train.jsonl --fine-tune-type full --learning-rate 2e-5 \
  --max-steps 2 --output "$out/full"
"$pmetal" infer --model "$out/full" --prompt "Once" --max-tokens 8
head -n 3 assets/quickstart/heldout.jsonl | sed -E 's/.*"role": "user", "content": "([^"]*)".*/{"prompt": "\1"}/' > "$out/prompts.jsonl"
"$pmetal" infer --model "$base" --lora "$out/adapter" --lora "$out/again" --chat --prompt-file "$out/prompts.jsonl" \
  --output "$out/answers.jsonl" --logprobs 2 --max-tokens 8
[[ $(wc -l < "$out/answers.jsonl") == 6 ]]
echo "Please pack three red kites for Mara." | "$pmetal" infer --model "$base" --chat --json --stop "." --max-tokens 8
"$pmetal" train --model "$base" --dataset assets/quickstart/train.jsonl --add-tokens "<|call|>,<|result|>" --max-steps 2 --output "$out/tokens"
"$pmetal" infer --model "$base" --lora "$out/tokens" --chat --prompt "Once" --max-tokens 4
"$pmetal" models
"$pmetal" train --model crates/pmetal-models/tests/configs/qwen3-30b-a3b.json --dry-run
"$pmetal" train --model "$base/config.json" --batch-size 1 --max-seq-len 4096 --dry-run --json
"$pmetal" doctor --device cpu
"$pmetal" completions bash > "$out/completions"
"$pmetal" man --output "$out/man"
echo '[[5, 6, 7], [8, 9]]' > "$out/ids.json"
"$pmetal" logits --model "$base" --ids "$out/ids.json" --output "$out/logits.safetensors"
"$pmetal" bench train --model-config "$base/config.json" --batch 2 --seq 64 --steps 2
"$pmetal" bench generate --model "$base" --prompt-tokens 32 --tokens 16
