"""What the API promises: its methods by the server's own reflection, its bounds by the comments of the protos."""

import functools
import re
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet, SourceCodeInfo
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc

PROTOS = Path(__file__).parents[2] / "protos"
CODES = (
    "INVALID_ARGUMENT",
    "OUT_OF_RANGE",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "ALREADY_EXISTS",
    "DATA_LOSS",
)
Bound = tuple[str, str]
"""What a comment is of, such as `Scale.factor`, and the code it names."""


def reflected(target: str) -> dict[str, MethodDescriptor]:
    """Every method of the server there, by full name, as its reflection tells it."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        return {
            method.full_name: method
            for name in database.get_services()
            for method in pool.FindServiceByName(name).methods
        }


@functools.cache
def bounds() -> frozenset[Bound]:
    """Each pair of a thing in the protos and an error code that its comment names."""
    return frozenset(
        (name, code)
        for name, comment in _comments()
        for code in CODES
        if re.search(rf"\b{code}\b", comment)
    )


@functools.cache
def reasons() -> frozenset[str]:
    """The reasons of ErrorInfo that the comments name."""
    found = (re.findall(r"\breason ([A-Z_]+)", comment) for _, comment in _comments())
    return frozenset(reason for reasons in found for reason in reasons)


@functools.cache
def _comments() -> tuple[tuple[str, str], ...]:
    return tuple(
        (_name(file, location), location.leading_comments + location.trailing_comments)
        for file in _described().file
        for location in file.source_code_info.location
    )


def _described() -> FileDescriptorSet:
    files = map(str, sorted((PROTOS / "steer/v1").glob("*.proto")))
    with tempfile.NamedTemporaryFile() as out:
        well_known = resources.files("grpc_tools") / "_proto"
        status = protoc.main(
            [
                "protoc",
                f"-I{PROTOS}",
                f"-I{well_known}",
                "--include_source_info",
                f"--descriptor_set_out={out.name}",
                *files,
            ]
        )
        assert status == 0
        return FileDescriptorSet.FromString(Path(out.name).read_bytes())


def _name(file: FileDescriptorProto, location: SourceCodeInfo.Location) -> str:
    """Of what the location is of, without the package: `Message.field`, `Enum.VALUE`, `Service.Method`."""
    return ".".join(_names(file, location))


def _names(file: FileDescriptorProto, location: SourceCodeInfo.Location) -> Iterator[str]:
    """A location's path alternates numbers of descriptor fields and indices in those that repeat."""
    node, path = file, list(location.path)
    while path:
        step = node.DESCRIPTOR.fields_by_number[path.pop(0)]
        node = getattr(node, step.name)
        if step.is_repeated and path:
            node = node[path.pop(0)]
        if hasattr(node, "name"):
            yield node.name
