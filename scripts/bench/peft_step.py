"""Times LoRA training steps of transformers with PEFT on random weights: what scripts/bench-cpu and scripts/bench-gpu compare with.

    python scripts/bench/peft_step.py CONFIG.json --batch 2 --seq 512 --steps 5 --threads 2
    python scripts/bench/peft_step.py CONFIG.json --batch 4 --seq 2048 --steps 10 --device cuda [--gradient-checkpointing] [--liger]

The same work as `pmetal bench train`: bf16 weights, adapters of rank 16 and alpha 32 on all seven projections, the loss over whole rows, the
gradients' norm clipped at 1, AdamW. One step warms up, on a GPU three; prints one JSON object with the median of the others and, on a GPU,
the allocator's peak while they ran.
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(args):
    with open(args.config) as file:
        fields = json.load(file)
    if args.liger:
        import liger_kernel.transformers

        getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{fields['model_type']}")()
    # weights are made in bf16 at once, so that the peak is not that of their f32 forerunners
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.bfloat16, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).train()
    if args.gradient_checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=on_gpu)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=args.device)
    warm_up = 3 if on_gpu else 1
    seconds = []
    for step in range(warm_up + args.steps):
        if on_gpu and step == warm_up:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[warm_up:])
    report = {"tok_s": args.batch * args.seq / step, "step_ms": step * 1e3, "loss": loss.item()}
    if on_gpu:
        report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(report))


if __name__ == "__main__":
    main()
