"""Times PMetal on an NVIDIA GPU and prints a table with the bars. scripts/bench-gpu says what is run and calls this.

Every program is a process of its own, which prints one JSON object.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
QWEN, LLAMA = "qwen3-0.6b.json", "llama-3.1-8b.json"
PROMPT, NEW = 512, 128
# Of the rate at which the device reads.
DECODE_BAR = 0.9


@dataclass
class Steps:
    """LoRA steps: shape, rows, tokens of a row, flags of `pmetal bench train`, the bars (tokens a second, GiB), and the best that another
    program was seen to do on an H200 of driver 580: its name, tokens a second, GiB."""

    what: str
    config: str
    batch: int
    seq: int
    flags: tuple = ()
    speed_bar: float | None = None
    memory_bar: float | None = None
    other: tuple | None = None


UNSLOTH = "Unsloth 2026.10.9"
STEPS = {
    "0.6b": Steps("Qwen3-0.6B, 4 x 2,048", QWEN, 4, 2048, (), 130_000, 11.0, (UNSLOTH, 65_295, 11.1)),
    "0.6b-limited": Steps(
        "Qwen3-0.6B, 4 x 2,048, within 11 GiB", QWEN, 4, 2048, ("--memory-limit", "11GiB"), 130_000, 11.0, (UNSLOTH, 65_295, 11.1)
    ),
    "0.6b-checkpointed": Steps(
        "Qwen3-0.6B, 4 x 2,048, checkpointing", QWEN, 4, 2048, ("--memory-limit", "2GiB"), 60_000, 2.0, (UNSLOTH, 24_962, 2.0)
    ),
    "0.6b-packed": Steps("Qwen3-0.6B, 8,192 tokens of packed rows", QWEN, 4, 2048, ("--packed",), 130_000),
    "0.6b-long": Steps("Qwen3-0.6B, 1 x 32,768", QWEN, 1, 32768),
    "8b": Steps("Llama-3.1-8B, 4 x 2,048", LLAMA, 4, 2048, (), 17_000, 100.0, ("transformers, PEFT, Liger 0.8.5", 10_556, 77.2)),
    "8b-checkpointed": Steps(
        "Llama-3.1-8B, 4 x 2,048, checkpointing", LLAMA, 4, 2048, ("--memory-limit", "17.8GiB"), 13_500, 17.8, (UNSLOTH, 11_265, 17.8)
    ),
}
DECODE = "8b-decode"


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench-gpu")
    parser.add_argument("--only", choices=[*STEPS, DECODE], action="append")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pmetal", required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    results = {"gpu": gpu_name(), "works": {}}
    print(results["gpu"])
    for name in args.only or [*STEPS, DECODE]:
        results["works"][name] = decoding(args) if name == DECODE else steps(args, STEPS[name])
        # a later work may fail: what was measured is kept
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results["works"].values())


def steps(args, work):
    """What became of a training shape: its figures, its profile, its peers."""
    config = str(HERE / work.config)
    size = ["--batch", str(work.batch), "--seq", str(work.seq)]
    ours = [args.pmetal, "bench", "train", "--device", args.device, "--dtype", "bf16", "--model-config", config, *size, *work.flags]
    found = {
        "what": work.what,
        "report": run(ours),
        "profile": run([*ours, "--profile"]),
        "bars": {"tok_s": work.speed_bar, "gib": work.memory_bar},
        "other": work.other,
        "peers": {},
    }
    if args.peers and work.other:
        peer = [sys.executable, str(HERE / "peft_step.py"), config, "--device", "cuda", "--steps", "10", *size]
        if "checkpointing" in work.what:
            peer.append("--gradient-checkpointing")
        found["peers"]["transformers, PEFT"] = run(peer, may_fail=True)
        found["peers"]["transformers, PEFT, Liger"] = run([*peer, "--liger"], may_fail=True)
    return found


def decoding(args):
    """What became of new tokens: beside their figures, the bytes that each must read, and the part that is of the device's rate."""
    config = str(HERE / LLAMA)
    ours = [args.pmetal, "bench", "generate", "--device", args.device, "--dtype", "bf16", "--model-config", config]
    ours += ["--prompt-tokens", str(PROMPT), "--tokens", str(NEW)]
    report, profile = run(ours), run([*ours, "--profile"])
    needed = bytes_of_a_token(json.loads((HERE / LLAMA).read_text()), PROMPT + NEW / 2)
    reading = profile["limits"]["read_gigabytes_per_second"] * 1e9
    bar = DECODE_BAR * reading / needed
    return {
        "what": f"Llama-3.1-8B, {NEW} new tokens behind {PROMPT}, batch 1",
        "report": {**report, "tok_s": report["decode_tok_s"]},
        "profile": profile,
        "bytes_of_a_token": needed,
        "of_reading": report["decode_tok_s"] * needed / reading,
        "bars": {"tok_s": bar, "gib": None},
        "other": None,
        "peers": {},
    }


def bytes_of_a_token(config, context):
    """Weights of all layers and the head, and keys and values of the context, in bf16."""
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    layer = hidden * (2 * queries + 2 * keys + 3 * mlp)
    return 2 * (layers * (layer + 2 * keys * context) + config["vocab_size"] * hidden)


def run(command, may_fail=False):
    """What a program printed as JSON; None where it failed and may."""
    print("bench-gpu:", " ".join(command), file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    message = f"bench-gpu: failed:\n{done.stderr[-2000:]}"
    if not may_fail:
        sys.exit(message)
    print(message, file=sys.stderr)
    return None


def gpu_name():
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        return "no NVIDIA GPU"
    return f"{name}, driver {driver}"


def print_table(works):
    print("\n| work | tokens/s | bar | GiB | bar |\n|---|---|---|---|---|")
    for work in works:
        report, bars = work["report"], work["bars"]
        bar = lambda key, digits: "" if bars[key] is None else f"{bars[key]:,.{digits}f}"
        gib = report["peak_bytes"] / 2**30
        print(f"| {work['what']} | {report['tok_s']:,.0f} | {bar('tok_s', 0)} | {gib:.3f} | {bar('gib', 1)} |")
        for peer, found in work["peers"].items():
            if found:
                print(f"| {peer} | {found['tok_s']:,.0f} | | {found['peak_gib']:.2f} | |")


if __name__ == "__main__":
    main()
