"""Shards that are wrong as a whole: other types of columns, columns left out or too many, broken off, or none."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile import BOX, EMPTY, NO_BOX, NO_ID, ROW, SCHEMA, SHARD, SIZE, UNDECODABLE, Row, table

ODD_COLUMNS = [
    ("nested", pa.list_(pa.struct({"a": pa.list_(pa.int8())})), [{"a": [1]}]),
    ("map", pa.map_(pa.string(), pa.int8()), [("a", 1)]),
    ("binary", pa.binary(), b"\xff"),
    ("fixed", pa.binary(2), b"ab"),
    ("null", pa.null(), None),
    ("truth", pa.bool_(), True),
    ("huge", pa.uint64(), 2**64 - 1),
    ("half", pa.float16(), np.float16(0.5)),
    ("nan", pa.float64(), float("nan")),
    ("decimal", pa.decimal128(20, 3), None),
    ("day", pa.date32(), 19_000),
    ("instant", pa.timestamp("us", "UTC"), 1_700_000_000_000_000),
    ("lapse", pa.duration("ms"), 5),
    ("hour", pa.time64("us"), 5),
    ("category", pa.dictionary(pa.int8(), pa.string()), "a"),
    ("view", pa.string_view(), "a"),
    ("long text", pa.large_string(), "é" * 1000),
]


def write_odd_shards(folder, hostile):
    """Write shards that are odd or broken as a whole, a few rows each; those rows (or shards) with their places."""
    placed = []

    def rows_of(kind, reason=None, change=None, count=3):
        rows = [hostile.row(kind, reason=reason) for _ in range(count)]
        changed = [row.cells | (change(row.cells, number) if change else {}) for number, row in enumerate(rows)]
        name = f"train-odd-{kind.replace(' ', '-')}.parquet"
        rows = [replace(r, cells=c, shard=name, number=n) for n, (r, c) in enumerate(zip(rows, changed, strict=True))]
        placed.extend(rows)
        return rows, folder / name

    def shard(kind, reason=None, change=None, types=(), drop=()):
        """Rows with the columns of ``types`` of another type, and those of ``drop`` left out."""
        rows, path = rows_of(kind, reason, change)
        types = {item.name: item.type for item in SCHEMA} | dict(types)
        pq.write_table(table(rows, pa.schema({name: types[name] for name in types if name not in drop})), path)

    def all_have(**cells):
        return lambda row, number: cells

    prompts, size = "edited_prompt_list", dict.fromkeys(("width", "height"), pa.string())
    corners = {"x1": 8.0, "y1": 8.0, "x2": 24.0, "y2": 24.0}
    struct_of = {"box": pa.struct(dict.fromkeys(corners, pa.float64())), prompts: pa.struct({"a": pa.string()})}
    shard("whole numbers as ids", None, lambda row, n: {"omni_edit_id": 70_000 + n}, {"omni_edit_id": pa.int64()})
    shard("floats as ids", NO_ID, all_have(omni_edit_id=0.5), {"omni_edit_id": pa.float64()})
    shard("text as prompts", None, lambda row, n: {prompts: f"turn it red {n}"}, {prompts: pa.string()})
    shard("struct as prompts", EMPTY, all_have(**{prompts: {"a": "turn it red"}}), {prompts: struct_of[prompts]})
    shard("numbers as prompts", EMPTY, all_have(**{prompts: 7}), {prompts: pa.int8()})
    shard("number as box", BOX, all_have(box=4.0), {"box": pa.float32()})
    shard("struct as box", BOX, all_have(box=corners), {"box": struct_of["box"]})
    shard("text as box", BOX, all_have(box="1239"), {"box": pa.string()})
    shard("texts as box", BOX, all_have(box=["1", "2", "30", "29"]), {"box": pa.list_(pa.string())})
    shard("bytes as picture", None, lambda row, n: {"src_img": row["src_img"]["bytes"]}, {"src_img": pa.binary()})
    shard("text as picture", UNDECODABLE, all_have(src_img="a.jpg"), {"src_img": pa.string()})
    shard("no pictures", "missing column 'src_img'", drop=["src_img"])
    shard("no tasks", "missing column 'task'", drop=["task"])
    shard("null tasks", None, all_have(task=None))
    shard("no boxes", NO_BOX, drop=["box"])
    shard("no sizes", drop=["width", "height"])
    shard("text as sizes", SIZE, all_have(width="64", height="48"), size)
    shard("text as score", None, all_have(o_score="high"), {"o_score": pa.string()})
    shard("empty score", None, all_have(o_score=None), {"o_score": pa.null()})

    # Columns that the data bring besides, of many types and of names that the store has itself.
    rows, path = rows_of("columns of taken names")
    brought = table(rows)
    names = "n_image n_text n_query split valid sample_id sample index set_aside vlm_x1 x1 file row reason instruction"
    for number, name in enumerate([*names.split(), "", "a.b", 'quo"te', "é\n"]):
        brought = brought.append_column(name, pa.array([number] * 3))
    pq.write_table(brought, path)
    rows, path = rows_of("columns of odd types")
    brought = table(rows)
    for name, kind, value in ODD_COLUMNS:
        brought = brought.append_column(name, pa.array([value, None, value], kind))
    pq.write_table(brought, path)

    # Text that is no UTF-8: a lone surrogate, and a byte that begins nothing.
    for column, bad in (("omni_edit_id", b"a\xed\xa0\x80"), ("task", b"\xff"), ("o_score", b"\xc3(")):
        rows, path = rows_of(f"no utf8 in {column}", ROW)
        if column == "omni_edit_id":
            placed[-3:] = [replace(row, cells=row.cells | {"omni_edit_id": None}) for row in rows]
        text = pa.array([bad] * 3).view(pa.string())
        pq.write_table(table(rows).set_column(SCHEMA.names.index(column), column, text), path)
    rows, path = rows_of("no utf8 in prompts", ROW)
    text = pa.ListArray.from_arrays([0, 1, 2, 3], pa.array([b"red \xed\xb0\x80"] * 3).view(pa.string()))
    pq.write_table(table(rows).set_column(SCHEMA.names.index(prompts), prompts, text), path)

    # Shards that break off, are none, hold nothing, or are damaged in the middle.
    rows, path = rows_of("good at first", SHARD, count=8)
    pq.write_table(table(rows), path, row_group_size=4, use_dictionary=False)
    damage(path, 0)
    placed[-8:] = [replace(row, cells={}) for row in rows[:4]] + [replace(row, reason=None) for row in rows[4:]]
    whole = path.read_bytes()
    for kind, data in (("cut", whole[:-30]), ("no parquet", b"PAR1 nothing PAR1"), ("no bytes", b"")):
        path = folder / f"train-odd-{kind.replace(' ', '-')}.parquet"
        path.write_bytes(data)
        placed.append(Row(kind, {}, SHARD, shard=path.name, number=None))
    pq.write_table(table([]), folder / "train-odd-no-rows.parquet")
    return placed


def damage(path, group):
    """Overwrite the pictures of one row group's first page with bytes that no decoder takes."""
    columns = pq.ParquetFile(path).metadata.row_group(group)
    for column in map(columns.column, range(columns.num_columns)):
        if column.path_in_schema == "src_img.bytes":
            data = bytearray(path.read_bytes())
            data[column.data_page_offset : column.data_page_offset + 30] = b"\xff" * 30
            path.write_bytes(data)
