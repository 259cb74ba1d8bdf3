"""Opens an adapter written by PMetal in PEFT and compares logits.

    python scripts/check-interchange.py MODEL_DIR ADAPTER_DIR LOGITS.safetensors IDS.json

IDS.json is a list of rows of token ids, [[1, 2, 3], ...]; LOGITS.safetensors holds `logits.N`, [len, vocab], for each of them as
PMetal computed it with the adapter. Pass `-` as ADAPTER_DIR to compare a model without adapter (a fused or fully tuned one).
Prints the largest error relative to the largest logit of each row; exits with 1 where one exceeds 1e-4 (another bound: `--bound 1e-3`).
"""

import argparse
import json
import sys
import warnings

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

EMBEDDING = ".embed_tokens.weight"


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", "adapter", "logits", "ids"):
        parser.add_argument(name)
    parser.add_argument("--bound", type=float, default=1e-4)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    if args.adapter != "-":
        with safe_open(f"{args.adapter}/adapter_model.safetensors", "pt") as file:
            # an adapter that carries an embedding may have been trained with more tokens
            for name in (name for name in file.keys() if name.endswith(EMBEDDING)):
                model.resize_token_embeddings(file.get_slice(name).get_shape()[0])
        # that PEFT wants tensors which the file lacks is no more than a warning to it
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    ours = load_file(args.logits)
    with open(args.ids) as file:
        rows = json.load(file)
    worst = 0.0
    for index, row in enumerate(rows):
        with torch.inference_mode():
            theirs = model(torch.tensor([row])).logits[0]
        error = ((ours[f"logits.{index}"].float() - theirs).abs().max() / theirs.abs().max()).item()
        print(f"row {index}: {len(row)} tokens, relative error {error:.2e}")
        worst = max(worst, error)
    print(f"worst {worst:.2e}, bound {args.bound:.0e}")
    sys.exit(worst > args.bound)


if __name__ == "__main__":
    main()
