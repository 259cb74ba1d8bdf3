"""Fixtures for the reading of datasets: the same rows as pyarrow and Python's own modules write them.

    make-data-fixtures.py

Written to the fixtures of pmetal-data: `rows.jsonl`, the rows that everything else must read as; Parquet files with nested
columns in several codecs and page layouts, with nulls and with columns that have no counterpart in JSON; a CSV file.
"""

import csv
import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent.parent / "crates/pmetal-data/tests/fixtures/files"

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"How much is {n} + {n}? Größe, 你好, 🙂"},
            {"role": "assistant", "content": f"It is {n + n}.\n\"Quoted\", too."},
        ],
        "n": n,
        "share": n / 8,
        "note": None if n % 3 == 0 else f"row {n}",
    }
    for n in range(40)
]


def main():
    HERE.mkdir(parents=True, exist_ok=True)
    (HERE / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    table = pa.table({key: [row[key] for row in ROWS] for key in ROWS[0]})
    day = pa.array([datetime.datetime(2024, 1, 1)] * len(ROWS), pa.timestamp("ns"))
    table = table.append_column("when", day).append_column("raw", pa.array([b"\xff"] * len(ROWS), pa.binary()))
    for codec in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]:
        pq.write_table(table, HERE / f"{codec}.parquet", compression=codec, row_group_size=17, use_dictionary=codec != "none",
                       data_page_version="2.0" if codec == "zstd" else "1.0")
    with (HERE / "qa.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "answer"])
        writer.writerows([row["n"], row["messages"][0]["content"], row["messages"][1]["content"]] for row in ROWS)


if __name__ == "__main__":
    main()
