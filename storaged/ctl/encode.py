"""Messages as JSON whose shape never changes: every field is there, numbers are numbers, what is absent is null."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_64_BITS = (
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT64,
)


def as_dict(message: Message) -> dict[str, Any]:
    """`message` as the protobuf JSON mapping has it, but with integers in place of strings and null for absent."""
    plain = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _complete(plain, message.DESCRIPTOR)


def line(value: dict[str, Any]) -> str:
    """One object on one line."""
    return json.dumps(value, ensure_ascii=True, separators=(", ", ": "))


def _complete(plain: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    return {field.name: _value(plain.get(field.name), field) for field in descriptor.fields}


def _value(value: Any, field: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return [_value(item, field) for item in value]
    if field.cpp_type in _64_BITS:
        return int(value)
    if isinstance(value, dict):
        return _complete(value, field.message_type)
    return value
