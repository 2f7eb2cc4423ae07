"""Writes a tagger's ONNX file by hand, byte by byte, so that the tests need no package for it (onnx.proto3: field numbers in comments)."""

import numpy as np

FLOAT, INTS = 1, 7


def field(number, value):
    """A field of protobuf: a length and bytes, or a number."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def node(kind, inputs, output, *attributes):
    names = b"".join(field(1, name) for name in inputs)
    return names + field(2, output) + field(4, kind) + b"".join(field(5, attribute) for attribute in attributes)  # input, output, op_type


def tensor(name, array):
    dims = b"".join(field(1, size) for size in array.shape)
    return dims + field(2, FLOAT) + field(8, name) + field(9, array.astype("<f4").tobytes())  # dims, data_type, name, raw_data


def value(name, shape):
    dims = b"".join(field(1, field(1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, dims)))  # name, type: tensor of element type and shape


def mean_colours_tagger(path, weight, bias):
    """A network of which probability j is sigmoid(mean over the picture of BGR @ weight[:, j] + bias[j])."""
    weight, bias = np.asarray(weight), np.asarray(bias)
    axes = field(1, "axes") + field(8, 1) + field(8, 2) + field(20, INTS)
    flat = field(1, "keepdims") + field(3, 0) + field(20, 2)
    nodes = [
        node("ReduceMean", ["input"], "mean", axes, flat),
        node("Gemm", ["mean", "weight", "bias"], "logits"),
        node("Sigmoid", ["logits"], "output"),
    ]
    graph = (
        b"".join(field(1, one) for one in nodes) + field(2, "tagger") + field(5, tensor("weight", weight)) + field(5, tensor("bias", bias))
    )
    graph += field(11, value("input", (1, 448, 448, 3))) + field(12, value("output", (1, weight.shape[1])))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))  # ir_version, graph, opset
