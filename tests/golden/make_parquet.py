"""Writes tests/golden/parquet: small Parquet files of Apache Arrow, and the same rows as JSON lines.

Run: python tests/golden/make_parquet.py (pyarrow). Versions stand in versions.json.
"""

import datetime
import decimal
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq

here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "parquet")
os.makedirs(here, exist_ok=True)

message = pa.struct([("role", pa.string()), ("content", pa.string())])
schema = pa.schema([
    ("id", pa.int64()),
    ("messages", pa.list_(message)),
    ("score", pa.float64()),
    ("good", pa.bool_()),
    ("tags", pa.list_(pa.string())),
    ("meta", pa.struct([("lang", pa.large_string()), ("depth", pa.struct([("level", pa.int32())]))])),
    ("label", pa.dictionary(pa.int32(), pa.string())),
])


def row(n):
    return {
        "id": n,
        "messages": [{"role": "user", "content": f"é{n}"}, {"role": "assistant", "content": "b" * (n % 3)}],
        "score": None if n % 4 == 1 else n / 8,
        "good": n % 2 == 0,
        "tags": [] if n % 3 == 0 else ["x", f"t{n}"],
        "meta": {"lang": None if n % 5 == 2 else "天", "depth": {"level": -n}},
        "label": None if n % 6 == 5 else f"l{n % 2}",
    }


rows = [row(n) for n in range(23)]
table = pa.Table.from_pylist(rows, schema=schema)
for name, compression in [("snappy", "snappy"), ("zstd", "zstd"), ("plain", "none")]:
    pq.write_table(table, os.path.join(here, f"{name}.parquet"), compression=compression, row_group_size=5, data_page_version="1.0")
pq.write_table(table, os.path.join(here, "pages_v2.parquet"), compression="snappy", row_group_size=7, data_page_version="2.0")
for name in ["gzip", "brotli"]:
    pq.write_table(table, os.path.join(here, f"{name}.parquet"), compression=name)


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


with open(os.path.join(here, "rows.jsonl"), "w") as file:
    file.writelines(json.dumps(without_nulls(one), ensure_ascii=False) + "\n" for one in rows)

# Dates, times and decimals as they are written; numbers of every width; a list with a hole; not finite.
odd = pa.table({
    "text": pa.array(["a"]),
    "day": pa.array([datetime.date(2024, 2, 29)]),
    "price": pa.array([decimal.Decimal("12.50")], pa.decimal128(9, 2)),
    "small": pa.array([-7], pa.int8()),
    "unsigned": pa.array([2**64 - 1], pa.uint64()),
    "half": pa.array([1.5], pa.float16()),
    "single": pa.array([0.1], pa.float32()),
    "nan": pa.array([float("nan")]),
    "holes": pa.array([[1, None, 3]]),
})
pq.write_table(odd, os.path.join(here, "odd.parquet"))
binary = pa.table({"text": ["a", "b", "c"], "image": pa.array([b"ok", b"\xff\xd8", b"ok"], pa.binary())})
pq.write_table(binary, os.path.join(here, "binary.parquet"))
pq.write_table(pa.table({"text": pa.array([], pa.string())}), os.path.join(here, "empty.parquet"))
with open(os.path.join(here, "versions.json"), "w") as file:
    json.dump({"pyarrow": pa.__version__}, file)
    file.write("\n")
