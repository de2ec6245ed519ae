"""Writes the seeds that need a library: rows*.parquet and rows*.arrow, a dozen lines of
the calibration text each, and questions.* of the questions beside them. Needs pyarrow. The files
are kept, so nobody has to run it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

seeds = Path(__file__).parent
lines = (seeds / "../../fixtures/verne-calibration.txt").read_text().splitlines()
lines = [line for line in lines if len(line) > 20][:12]
table = pa.table({"text": lines, "number": list(range(12))})
chats = pa.table(
    {"messages": [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in zip(lines, lines[1:])]}
)
pq.write_table(table, seeds / "rows.parquet", compression="snappy")
pq.write_table(table.select(["text"]), seeds / "rows-plain.parquet", compression="none", use_dictionary=False)
pq.write_table(chats, seeds / "rows-chats.parquet", compression="zstd")
for name, compression in [("rows", None), ("rows-lz4", "lz4"), ("rows-zstd", "zstd")]:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(seeds / f"{name}.arrow", table.schema, options=options) as out:
        out.write_table(table)
with pa.ipc.new_stream(seeds / "rows-stream.arrow", chats.schema) as out:
    out.write_table(chats)
asked = [json.loads(line) for line in (seeds / "arc.jsonl").read_text().splitlines()]
asked[1]["choices"] = {name: [pair[name] for pair in asked[1]["choices"]] for name in ("text", "label")}
pq.write_table(pa.Table.from_pylist(asked), seeds / "questions.parquet", compression="snappy")
ended = pa.Table.from_pylist([json.loads(line) | {"label": 0} for line in (seeds / "hellaswag.jsonl").read_text().splitlines()])
with pa.ipc.new_stream(seeds / "questions.arrow", ended.schema) as out:
    out.write_table(ended)
