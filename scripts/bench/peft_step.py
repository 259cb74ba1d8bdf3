"""Times LoRA training steps of transformers with PEFT on random weights: what scripts/bench-cpu compares with.

    python scripts/bench/peft_step.py CONFIG.json --batch 2 --seq 512 --steps 5 --threads 2

The same work as `pmetal bench train`: bf16 weights, adapters of rank 16 and alpha 32 on all seven projections, the loss over whole rows, the
gradients' norm clipped at 1, AdamW. One step warms up; prints one JSON object with the median of the others.
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(config_file):
    with open(config_file) as file:
        fields = json.load(file)
    config = AutoConfig.for_model(**fields)
    # weights are made in bf16 at once, so that the peak is not that of their f32 forerunners
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build(args.config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq))
    seconds = []
    for _ in range(args.steps + 1):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[1:])
    print(json.dumps({"tok_s": args.batch * args.seq / step, "step_ms": step * 1e3, "loss": loss.item()}))


if __name__ == "__main__":
    main()
