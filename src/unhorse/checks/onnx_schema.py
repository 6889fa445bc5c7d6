"""The messages of an ONNX file, field by field: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto."""

from __future__ import annotations

from unhorse.checks.protobuf import Entry, Schema

_TEXT, _INT, _SPAN = "text", "int", "span"
_PAIRS = "Pair"

SCHEMA: Schema = {
    "Model": {
        **{
            1: Entry("ir_version", _INT),
            2: Entry("producer_name", _TEXT),
            3: Entry("producer_version", _TEXT),
        },
        **{4: Entry("domain", _TEXT), 5: Entry("model_version", _INT), 6: Entry("doc_string", _SPAN)},
        **{7: Entry("graph", "Graph"), 8: Entry("opset_import", "Opset", True)},
        **{14: Entry("metadata_props", _PAIRS, True), 20: Entry("training_info", "Training", True)},
        **{25: Entry("functions", "Function", True), 26: Entry("configuration", _SPAN, True)},
    },
    "Opset": {1: Entry("domain", _TEXT), 2: Entry("version", _INT)},
    "Pair": {1: Entry("key", _TEXT), 2: Entry("value", _TEXT)},
    "Training": {
        **{1: Entry("initialization", "Graph"), 2: Entry("algorithm", "Graph")},
        **{3: Entry("initialization_binding", _PAIRS, True), 4: Entry("update_binding", _PAIRS, True)},
    },
    "Function": {
        **{1: Entry("name", _TEXT), 4: Entry("input", _TEXT, True), 5: Entry("output", _TEXT, True)},
        **{6: Entry("attribute", _TEXT, True), 7: Entry("node", "Node", True), 8: Entry("doc_string", _SPAN)},
        **{9: Entry("opset_import", "Opset", True), 10: Entry("domain", _TEXT)},
        **{11: Entry("attribute_proto", "Attribute", True), 12: Entry("value_info", _SPAN, True)},
        **{13: Entry("overload", _TEXT), 14: Entry("metadata_props", _PAIRS, True)},
    },
    "Graph": {
        **{1: Entry("node", "Node", True), 2: Entry("name", _TEXT), 5: Entry("initializer", "Tensor", True)},
        **{10: Entry("doc_string", _SPAN), 11: Entry("input", "Value", True)},
        **{12: Entry("output", "Value", True), 13: Entry("value_info", _SPAN, True)},
        **{
            14: Entry("quantization_annotation", _SPAN, True),
            15: Entry("sparse_initializer", "Sparse", True),
        },
        16: Entry("metadata_props", _PAIRS, True),
    },
    "Node": {
        **{1: Entry("input", _TEXT, True), 2: Entry("output", _TEXT, True), 3: Entry("name", _TEXT)},
        **{4: Entry("op_type", _TEXT), 7: Entry("domain", _TEXT), 8: Entry("overload", _TEXT)},
        **{5: Entry("attribute", "Attribute", True), 6: Entry("doc_string", _SPAN)},
        **{9: Entry("metadata_props", _SPAN, True), 10: Entry("device_configurations", _SPAN, True)},
    },
    "Attribute": {
        **{1: Entry("name", _TEXT), 13: Entry("doc_string", _SPAN), 20: Entry("type", _INT)},
        **{2: Entry("f", "float"), 3: Entry("i", _INT), 4: Entry("s", _SPAN), 5: Entry("t", "Tensor")},
        **{6: Entry("g", "Graph"), 7: Entry("floats", "count-4", True), 9: Entry("strings", _SPAN, True)},
        **{8: Entry("ints", "count-varint", True), 10: Entry("tensors", "Tensor", True)},
        **{11: Entry("graphs", "Graph", True), 14: Entry("tp", _SPAN), 15: Entry("type_protos", _SPAN, True)},
        **{21: Entry("ref_attr_name", _TEXT), 22: Entry("sparse_tensor", "Sparse")},
        23: Entry("sparse_tensors", "Sparse", True),
    },
    "Sparse": {
        **{1: Entry("values", "Tensor"), 2: Entry("indices", "Tensor"), 3: Entry("dims", _INT, True)},
    },
    "Tensor": {
        **{1: Entry("dims", _INT, True), 2: Entry("data_type", _INT), 8: Entry("name", _TEXT)},
        **{4: Entry("float_data", "count-4", True), 5: Entry("int32_data", "count-varint", True)},
        **{6: Entry("string_data", _SPAN, True), 7: Entry("int64_data", "count-varint", True)},
        **{9: Entry("raw_data", _SPAN), 10: Entry("double_data", "count-8", True)},
        **{11: Entry("uint64_data", "count-varint", True), 12: Entry("doc_string", _SPAN)},
        **{13: Entry("external_data", "Pair", True), 14: Entry("data_location", _INT)},
        16: Entry("metadata_props", _SPAN, True),
    },
    "Value": {
        **{1: Entry("name", _TEXT), 2: Entry("type", "Type"), 3: Entry("doc_string", _SPAN)},
        **{4: Entry("metadata_props", _SPAN, True)},
    },
    "Type": {
        **{1: Entry("tensor_type", "TensorType"), 6: Entry("denotation", _SPAN)},
        **{4: Entry("sequence", _SPAN), 5: Entry("map", _SPAN), 7: Entry("opaque value", _SPAN)},
        **{8: Entry("sparse tensor", _SPAN), 9: Entry("optional", _SPAN)},
    },
    "TensorType": {1: Entry("elem_type", _INT), 2: Entry("shape", "Shape")},
    "Shape": {1: Entry("dim", "Dimension", True)},
    "Dimension": {1: Entry("value", _INT), 2: Entry("param", _TEXT), 3: Entry("denotation", _SPAN)},
}
OTHER_VALUES = ("sequence", "map", "opaque value", "sparse tensor", "optional")
"""What a value can be that is no tensor."""

ATTRIBUTE_FIELDS = {
    **{1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings", 9: "tensors"},
    **{10: "graphs", 11: "sparse_tensor", 12: "sparse_tensors", 13: "tp", 14: "type_protos"},
}
"""The field of an attribute's value, by the number of its type."""

ITEMS: dict[int, tuple[int, str]] = {
    **{1: (4, "float_data"), 11: (8, "double_data"), 7: (8, "int64_data"), 13: (8, "uint64_data")},
    **{12: (4, "uint64_data"), 6: (4, "int32_data"), 2: (1, "int32_data"), 3: (1, "int32_data")},
    **{4: (2, "int32_data"), 5: (2, "int32_data"), 9: (1, "int32_data"), 10: (2, "int32_data")},
    **{16: (2, "int32_data")},
}
"""Bytes of an item and the field for items that are not raw bytes, by the number of a type that is read."""
OTHER_ITEMS = {
    **{8: "text", 14: "complex numbers", 15: "complex numbers"},
    **dict.fromkeys((17, 18, 19, 20, 24), "float8"),
    **dict.fromkeys((21, 22), "int4"),
    **{23: "float4", 25: "uint2", 26: "int2", 27: "float6", 28: "float6"},
}
"""Types of ONNX that are not read, in words."""
DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
