#!/usr/bin/env bash
# Makes assets/quickstart anew: rows, tokenizer, and the base model, trained by PMetal from random weights (about 4.4 million tokens).
# Needs Python with scripts/requirements.txt. Rows and tokenizer come out the same every time.
#   scripts/quickstart/make-base.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
base=assets/quickstart/base build=target/quickstart
python3 scripts/quickstart/make_corpus.py --base $build/base.jsonl
python3 scripts/quickstart/make_tokenizer.py
cargo build --release --package pmetal-cli
rm -rf $build/base
target/release/pmetal train --model $base --from-scratch --fine-tune-type full --dataset $build/base.jsonl --output $build/base \
  --batch-size 48 --epochs 1 --learning-rate 2e-3 --warmup-steps 100 --weight-decay 0.01 --seed 0
cp $build/base/model.safetensors $base/
ls -l $base
