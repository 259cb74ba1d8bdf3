"""Writes the figures of scripts/bench-gpu into docs/performance.md, between its marks: no figure there is typed.

    python scripts/bench/gpu_table.py RESULTS.json [--into docs/performance.md]

Without --into the tables go to stdout.
"""

import argparse
import json
from pathlib import Path

BEGIN, END = "<!-- tables of scripts/bench/gpu_table.py -->", "<!-- end of the tables -->"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    text = "\n\n".join(page(results))
    if not args.into:
        print(text)
        return
    head, rest = args.into.read_text().split(BEGIN)
    _, tail = rest.split(END)
    args.into.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


def page(results):
    """The paragraphs."""
    works = results["works"]
    yield f"{results['gpu']}."
    yield "\n".join(summary(works.values()))
    limits = next(work["profile"]["limits"] for work in works.values())
    yield "\n".join(
        [
            "| the machine's limit | measured |",
            "|---|---|",
            f"| a product of bf16, {' x '.join(f'{n:,}' for n in limits['product_shape'])} | {limits['teraflops']:.0f} TFLOP/s |",
            f"| a copy, bytes read and written | {limits['copy_gigabytes_per_second'] / 1e3:.2f} TB/s |",
            f"| reading | {limits['read_gigabytes_per_second'] / 1e3:.2f} TB/s |",
        ]
    )
    for work in works.values():
        found = work["profile"]["profile"]
        if isinstance(found, list):
            plain, watched = (work[run]["step_ms"] for run in ("report", "profile"))
            yield f"**{work['what']}**: a step of {watched:,.1f} ms, of which events take {watched - plain:.1f}."
            yield "\n".join(operations(found, limits))
        else:
            yield f"**{work['what']}**: a token."
            yield "\n".join(operations(found["decode"], limits))


def summary(works):
    """All works against their bars and against others."""
    yield "| work | tokens a second | bar | ms | GiB | bar | another program |"
    yield "|---|---|---|---|---|---|---|"
    for work in works:
        report, bars = work["report"], work["bars"]
        speed, gib = report["tok_s"], report["peak_bytes"] / 2**30
        speed_bar, memory_bar = bars["tok_s"], bars["gib"]
        ms = report.get("step_ms") or 1e3 / speed
        cells = [
            work["what"] + (f", {work['of_reading']:.0%} of reading" if "of_reading" in work else ""),
            judged(f"{speed:,.0f}", speed_bar is None or speed >= speed_bar),
            "" if speed_bar is None else f"{speed_bar:,.0f}",
            f"{ms:,.2f}" if ms < 100 else f"{ms:,.0f}",
            judged(f"{gib:.3f}" if gib < 10 else f"{gib:.2f}", memory_bar is None or gib <= memory_bar),
            "" if memory_bar is None else f"{memory_bar:.1f}",
            "; ".join(others(work)),
        ]
        yield f"| {' | '.join(cells)} |"


def judged(figure, met):
    """A figure that misses its bar is marked."""
    return figure if met else f"{figure} (missed)"


def others(work):
    """What other programs reached: those that ran beside ours, else the best that was seen before."""
    ran = [f"{name}: {found['tok_s']:,.0f}, {found['peak_gib']:.1f} GiB" for name, found in work["peers"].items() if found]
    if work["other"]:
        name, speed, gib = work["other"]
        ran.append(f"{name}: {speed:,}, {gib} GiB")
    return ran


def operations(rows, limits):
    """A profile, an operation's two directions in one row."""
    yield "| operation | calls | forward, ms | rate | backward, ms | rate | share |"
    yield "|---|---|---|---|---|---|---|"
    names = list(dict.fromkeys(row["op"] for row in rows))
    both = {name: {row["direction"]: row for row in rows if row["op"] == name} for name in names}
    share = {name: sum(row["share"] for row in of_name.values()) for name, of_name in both.items()}
    for name in sorted(names, key=lambda name: (name == "elsewhere", -share[name])):
        of_name = both[name]
        if name == "elsewhere":
            yield f"| outside of operations, and between them | | {of_name[None]['ms']:.2f} | | | | {share[name]:.1%} |"
            continue
        calls = max(row["calls"] for row in of_name.values())
        sides = [cell for side in ("forward", "backward") for cell in timed(of_name.get(side), limits)]
        yield f"| `{name}` | {calls:.0f} | {' | '.join(sides)} | {share[name]:.1%} |"


def timed(row, limits):
    """Milliseconds, and the rate that is nearer to its limit."""
    if row is None:
        return ["", ""]
    arithmetic, memory = (row[key] or 0.0 for key in ("gflop_s", "gb_s"))
    if arithmetic / limits["teraflops"] / 1e3 > memory / limits["read_gigabytes_per_second"]:
        rate = f"{arithmetic / 1e3:.0f} TFLOP/s, {row['of_limit']:.0%}"
    else:
        rate = f"{memory / 1e3:.2f} TB/s, {row['of_limit']:.0%}" if memory else ""
    return [f"{row['ms']:.2f}" if row["ms"] >= 0.1 else f"{row['ms']:.3f}", rate]


if __name__ == "__main__":
    main()
