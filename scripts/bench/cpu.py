"""Runs PMetal and its peers in turn and prints a table with the ratios. scripts/bench-cpu prepares what this needs and calls it.

Every program is a process of its own. A figure is the median of the runs, memory the process's largest resident set as the system counted it.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

# A third of PyTorch's time on a CPU goes into page faults, which these settings of glibc's allocator avoid at the price of memory: the peer at
# its fastest. Without them it is at its smallest.
TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# Shape, rows, tokens of a row, timed steps, least ratio of speed.
TRAINING = {
    "train": ("qwen3-cpu.json", 2, 512, 5, 1.7),
    "smollm2": ("smollm2-135m.json", 4, 512, 3, 2.0),
}
MEMORY_BAR = 0.5
PROMPT, NEW = 512, 128
PREFILL_BAR, DECODE_BAR = 1.5, 1.25


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench-cpu")
    parser.add_argument("--only", choices=[*TRAINING, "generate"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores(), help="of the peers; PMetal takes all cores unless RAYON_NUM_THREADS says less")
    parser.add_argument("--json", type=Path, help="also write every run's figures here")
    for needed in ("--pmetal", "--llama-bench", "--model"):
        parser.add_argument(needed, required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    results = {"cpu": cpu_name(), "threads": args.threads}
    print(f"{results['cpu']}, {args.threads} threads")
    if not args.only:
        results["limits"] = machine_limits()
        for name, figure in results["limits"].items():
            print(f"  {name}: {figure}")
    rows = []
    for name in TRAINING:
        if args.only in (None, name):
            rows += training(args, name, results)
    if args.only in (None, "generate"):
        rows += generating(args, results)
    print_table(rows)
    results["table"] = [dict(zip(("what", "pmetal", "peer", "ratio", "bar", "met"), row)) for row in rows]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def training(args, name, results):
    """Rows of the table for a training shape."""
    config, batch, seq, steps, bar = TRAINING[name]
    config = str(HERE / config)
    size = ["--batch", str(batch), "--seq", str(seq), "--steps", str(steps)]
    ours = [args.pmetal, "bench", "train", "--device", "cpu", "--dtype", "bf16", "--model-config", config, *size]
    peer = [sys.executable, str(HERE / "peft_step.py"), config, *size, "--threads", str(args.threads)]
    runs = in_turn(
        args,
        f"{name}, {batch} x {seq}",
        {"peft, tuned": (peer, TUNED), "pmetal": (ours, {}), "peft": (peer, {})},
        lambda report: {"tok_s": report["tok_s"]},
    )
    results[name] = runs
    speed = [median(runs[who], "tok_s") for who in ("pmetal", "peft, tuned", "peft")]
    memory = [median(runs[who], "peak_gib") for who in ("pmetal", "peft", "peft, tuned")]
    what = f"{Path(config).stem} {batch} x {seq}"
    return [
        at_least(f"{what}: tok/s against PEFT, tuned", speed[0], speed[1], bar),
        at_least(f"{what}: tok/s against PEFT as it comes", speed[0], speed[2], None),
        at_most(f"{what}: GiB against PEFT as it comes", memory[0], memory[1], MEMORY_BAR),
        at_most(f"{what}: GiB against PEFT, tuned", memory[0], memory[2], None),
    ]


def generating(args, results):
    """Rows of the table for a prompt and new tokens."""
    ours = [args.pmetal, "bench", "generate", "--device", "cpu", "--model", args.model]
    ours += ["--prompt-tokens", str(PROMPT), "--tokens", str(NEW), "--runs", "3"]
    peer = [args.llama_bench, "-m", args.model, "-t", str(args.threads), "-p", str(PROMPT), "-n", str(NEW), "-r", "3", "-o", "json"]
    # its new tokens follow nothing unless told so; ours follow the prompt
    peer += ["-d", f"0,{PROMPT}"]

    def figures(report):
        if isinstance(report, dict):
            return {"prefill": report["prefill_tok_s"], "decode": report["decode_tok_s"]}
        alike = [test for test in report if test["n_depth"] == (0 if test["n_prompt"] else PROMPT)]
        return {"prefill" if test["n_prompt"] else "decode": test["avg_ts"] for test in alike}

    runs = in_turn(args, f"generate, {PROMPT} + {NEW}", {"llama.cpp": (peer, {}), "pmetal": (ours, {})}, figures)
    results["generate"] = runs
    pairs = {key: [median(runs[who], key) for who in ("pmetal", "llama.cpp")] for key in ("prefill", "decode", "peak_gib")}
    return [
        at_least(f"SmolLM2-135M bf16: prefill {PROMPT}, tok/s against llama.cpp", *pairs["prefill"], PREFILL_BAR),
        at_least(f"SmolLM2-135M bf16: decode {NEW} behind it, tok/s against llama.cpp", *pairs["decode"], DECODE_BAR),
        at_most("SmolLM2-135M bf16: GiB against llama.cpp", *pairs["peak_gib"], None),
    ]


def in_turn(args, title, programs, figures):
    """Runs the programs one after another, and all of them as often as was asked; returns each one's figures."""
    runs = {who: [] for who in programs}
    for turn in range(args.runs):
        for who, (command, variables) in programs.items():
            report, peak = run(command, variables)
            found = {**figures(report), "peak_gib": peak / 2**30}
            runs[who].append(found)
            shown = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"bench-cpu: {title}, run {turn + 1}: {who}: {shown}", file=sys.stderr)
    return runs


def run(command, variables):
    """What a program printed as JSON, and the bytes of its largest resident set."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=errors, text=True)
        output = child.stdout.read()
        # not child.wait(): the system is asked about the memory of this child alone
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            errors.seek(0)
            sys.exit(f"bench-cpu: {' '.join(command)} failed:\n{errors.read()[-2000:]}")
    unit = 1 if platform.system() == "Darwin" else 1024
    return json.loads(output), usage.ru_maxrss * unit


def machine_limits():
    """What the bench `machine` measured: instructions on registers, caches, memory."""
    command = ["cargo", "bench", "--quiet", "-p", "pmetal-cpu", "--bench", "machine"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^machine: (.*): [\d.]+ us, ([\d.]+ G\S+)$", output, re.MULTILINE)
    return dict(found)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name():
    """The CPU as the system names it, with what tells its generation and its widest products."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", file.read(), re.MULTILINE))
    except OSError:
        fields = {}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    wide = [flag for flag in fields.get("flags", "").split() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')}; {', '.join(wide)})"


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def at_least(what, ours, peer, bar):
    """A row of the table; `bar` may be None."""
    ratio = ours / peer
    return (what, ours, peer, ratio, *(("", "") if bar is None else (f">= {bar}", "yes" if ratio >= bar else "no")))


def at_most(what, ours, peer, bar):
    """A row of the table; `bar` may be None."""
    ratio = ours / peer
    return (what, ours, peer, ratio, *(("", "") if bar is None else (f"<= {bar}", "yes" if ratio <= bar else "no")))


def print_table(rows):
    print("\n| measured | PMetal | peer | ratio | bar | met |\n|---|---|---|---|---|---|")
    for what, ours, peer, ratio, bar, met in rows:
        digits = 2 if "GiB" in what else 0
        print(f"| {what} | {ours:,.{digits}f} | {peer:,.{digits}f} | {ratio:.2f} | {bar} | {met} |")


if __name__ == "__main__":
    main()
