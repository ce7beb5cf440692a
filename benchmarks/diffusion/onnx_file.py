"""Reads what an ONNX file says: nodes and weights, without the `onnx` package.

An ONNX file is one protobuf message. Of its schema (onnx.proto) this reads the graph's nodes with
their int, float and string attributes, and the weights of type float32 and int64 that lie inside the
file. Anything else in a place that matters is refused by name.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

# onnx.proto: AttributeProto.AttributeType and TensorProto.DataType.
FLOAT_ATTRIBUTE, INT_ATTRIBUTE, STRING_ATTRIBUTE, INTS_ATTRIBUTE = 1, 2, 3, 7
DTYPES = {1: torch.float32, 7: torch.int64}


@dataclass
class Node:
    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Graph:
    nodes: list[Node]
    weights: dict[str, Tensor]


def read(path: Path) -> Graph:
    (graph,) = _message(memoryview(path.read_bytes()))[7]
    fields = _message(graph)
    weights = dict(_tensor(data) for data in fields[5])
    return Graph([_node(data) for data in fields[1]], weights)


def _node(data: memoryview) -> Node:
    fields = _message(data)
    attributes = dict(_attribute(x) for x in fields[5])
    return Node(_text(fields[4][0]), [*map(_text, fields[1])], [*map(_text, fields[2])], attributes)


def _attribute(data: memoryview) -> tuple[str, Any]:
    fields = _message(data)
    name, (kind,) = _text(fields[1][0]), fields[20]
    # A value equal to its type's zero may be left out of the file.
    if kind == INT_ATTRIBUTE:
        return name, _signed(fields[3][0]) if fields[3] else 0
    if kind == FLOAT_ATTRIBUTE:
        return name, struct.unpack("<f", fields[2][0])[0] if fields[2] else 0.0
    if kind == STRING_ATTRIBUTE:
        return name, _text(fields[4][0]) if fields[4] else ""
    if kind == INTS_ATTRIBUTE:
        return name, _integers(fields[8])
    raise ValueError(f"attribute {name} is of type {kind}, which is not read")


def _tensor(data: memoryview) -> tuple[str, Tensor]:
    fields = _message(data)
    name, (kind,) = _text(fields[8][0]), fields[2]
    if kind not in DTYPES or not fields[9]:
        raise ValueError(f"weight {name} (type {kind}) is not float32 or int64 bytes in the file")
    values = torch.frombuffer(bytearray(fields[9][0]), dtype=DTYPES[kind])
    return name, values.reshape(_integers(fields[1]))


def _message(data: memoryview) -> defaultdict[int, list[Any]]:
    """The values of every field by number: ints, or the bytes of what is longer."""
    fields = defaultdict(list)
    for number, value in _fields(data):
        fields[number].append(value)
    return fields


def _fields(data: memoryview) -> Iterator[tuple[int, Union[int, memoryview]]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}: not an ONNX file, or a damaged one")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _integers(values: list[Any]) -> list[int]:
    """A repeated int64, packed or not."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(_signed(value))
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            found.append(_signed(number))
    return found


def _text(data: memoryview) -> str:
    return bytes(data).decode()
