# SPDX-License-Identifier: Apache-2.0
"""The one place where protobuf is touched: an `.onnx` file becomes an `onnx_ir.Model`, and back.

Reading treats the file as hostile: it must parse, pass ONNX's own checker, and keep its external data inside its own
folder. Writing goes to a temporary name first, so that no half-written file is ever left under the final one.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..contracts.errors import InputError
from ..contracts.signature import Dim, Signature, TensorSpec

EXTERNAL_DATA_FROM = 1_800_000_000
"""Tensor bytes from which weights go to a file of their own: protobuf ends at 2^31 bytes."""

MINIMUM_OPSET = 13
"""Older graphs are upgraded when read: per-axis quantization and Shape/Squeeze with tensors start there."""


class SparseTensor(ir.Tensor[np.ndarray]):
    """A weight of the main graph that `write` stores as a sparse initializer: what is not zero, and where.

    Here it is dense, as ONNX Runtime makes it when a session is created; only `nbytes` is that of the file. A place
    takes 8 bytes: ONNX's specification and checker want int64 (ONNX Runtime would read smaller integers as well).
    """

    @property
    def nbytes(self) -> int:
        return sparse_bytes(len(nonzero_places(self.numpy())), self.dtype.itemsize)


def sparse_bytes(nonzeros: int, itemsize: float) -> int:
    """Bytes of a sparse initializer."""
    return nonzeros * (8 + int(itemsize))


def nonzero_places(array: np.ndarray) -> np.ndarray:
    """int64, ascending: where a flat array is not the zero of all zero bits (minus zero is not)."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return np.flatnonzero(flat.view(f"u{flat.dtype.itemsize}"))


def read(path: Path) -> ir.Model:
    """Read and check an `.onnx` file; weights in external data stay on disk until they are used.

    Args:
        path: The file.

    Raises:
        InputError: It is missing, corrupt or truncated, refers to data outside its folder, or is not valid ONNX.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path.name}", next_step="Check the path.")
    again = "Export or download the file again."
    try:
        model, sparse = _load(path)
        graph_nodes = len(model.graph)
    except (Exception, RecursionError) as error:
        raise InputError(f"{path.name} is not a readable ONNX file ({_first_line(error)})", next_step=again) from error
    if not graph_nodes and not model.graph.outputs:
        raise InputError(f"{path.name} holds no graph", next_step=again)
    for tensor in _external_tensors(model):
        _check_external(path, tensor)
    try:
        onnx.checker.check_model(os.fspath(path))
    except Exception as error:
        raise InputError(f"{path.name} is not valid ONNX: {_first_line(error)}", next_step=again) from error
    _give_data(model, sparse, path.name)
    return at_least(model, MINIMUM_OPSET, path.name)


def write(model: ir.Model, path: Path, *, external_from: int | None = None, data_name: str | None = None) -> int:
    """Write `model`, with external data beside it as `<name>.onnx_data` when it exceeds protobuf's limit.

    Args:
        model: Left as it is.
        path: The `.onnx` file.
        external_from: Bytes from which weights go to the data file; None: protobuf's limit. What stays in the `.onnx`
            is in memory, several times, while it is written.
        data_name: Name of the data file, where a consumer looks for another one.

    The bytes depend on the model alone. Returns the number of bytes written over all files.

    Weights that lie in a file, or are computed when they are read, are written one at a time. A process that is killed
    leaves the old file, or none, and a folder `.<name>.partial`, which the next call removes.

    Raises:
        InputError: The file cannot be written, or there is not enough space for it.
    """
    size = weight_bytes(model)
    large = size >= (EXTERNAL_DATA_FROM if external_from is None else external_from)
    sparse = _sparse_tensors(model)
    # Both files under their final names, which one of them holds, but in a folder of their own until they are complete
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # a killed run's files must not be moved into place with ours
        partial.mkdir()
        if large:
            _check_space(partial, size, path.name)
        for name in sparse:  # they keep their place among the initializers, without data
            model.graph.initializers[name].const_value = ir.Tensor(np.zeros(0, np.float32), name=name)
        if large:
            ir.save(model, partial / path.name, external_data=data_name or f"{path.name}_data")
        else:
            ir.save(_in_memory(model), partial / path.name)
        if sparse:
            _write_sparse(sparse, partial / path.name)
        written = sum(file.stat().st_size for file in partial.iterdir())
        into_place(partial, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path.name}: {reason}", next_step="Free some space or choose -o.") from error
    finally:
        for name, tensor in sparse.items():
            model.graph.initializers[name].const_value = tensor
        shutil.rmtree(partial, ignore_errors=True)
    return written


def into_place(folder: Path, path: Path) -> None:
    """Move a file, and the data that it has beside it, from `folder` to where `path` says; both keep their names.

    A process that is killed in between leaves the old file, or none, or the new one with its data.
    """
    files = sorted(folder.iterdir(), reverse=True)  # the data first: the graph is what is looked for
    if len(files) > 1:
        path.unlink(missing_ok=True)  # in between, an old graph would read the new data
    for file in files:
        os.replace(file, path.with_name(file.name))


def at_least(model: ir.Model, opset: int, name: str) -> ir.Model:
    """Return `model`, converted to `opset` if it is of an older one; `name` is what messages call it.

    Raises:
        InputError: ONNX's converter does not know how.
    """
    version = model.opset_imports.get("", opset)
    if version >= opset:
        return model
    if version < 9 and any(node.op_type == "Scan" and not node.domain for node in model.graph.all_nodes()):
        # It had a batch and lengths of its own; the converter lets it through as if nothing had changed
        raise InputError(
            f"{name} uses Scan of opset {version}, which ONNX's converter does not turn into that of opset {opset}",
            next_step="Export it again with opset 9 or newer.",
        )
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(_in_memory(model)), opset)
        upgraded: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        return upgraded
    except Exception as error:
        raise InputError(
            f"{name} uses opset {version}, and ONNX's converter cannot bring it to {opset}: {_first_line(error)}",
            next_step=f"Export it again with opset {opset} or newer.",
        ) from error


def file_bytes(path: Path) -> int:
    """Size of an `.onnx` file together with its external data, in bytes."""
    model, _ = _load(path)
    names = {os.fspath(tensor.location) for tensor in _external_tensors(model)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers and Constant nodes, subgraphs included."""
    held = sum(value.const_value.nbytes for value in _initializers(model) if value.const_value is not None)
    return held + sum(tensor.nbytes for tensor in _attribute_tensors(model))


def signature_of(model: ir.Model) -> Signature:
    """The graph's inputs and outputs as plain data."""
    initializers = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in initializers]
    return Signature(tuple(map(_spec, inputs)), tuple(map(_spec, model.graph.outputs)))


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, subgraphs and functions included; `domain::Type` outside the ONNX domain."""
    nodes = list(model.graph.all_nodes())
    for function in model.functions.values():
        nodes += function.all_nodes()
    counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _check_space(folder: Path, size: int, name: str) -> None:
    """Say so now, not after an hour."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"cannot write {name}: it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            next_step="Free some space or choose -o.",
        )


def _spec(value: ir.Value) -> TensorSpec:
    dims: list[Dim] = []
    for dim in value.shape or ():
        dims.append(dim if isinstance(dim, int) else (str(dim.value) if dim.value is not None else None))
    return TensorSpec(str(value.name), "unknown" if value.dtype is None else _dtype_name(value.dtype), tuple(dims))


def _dtype_name(dtype: ir.DataType) -> str:
    if dtype == ir.DataType.STRING:
        return "string"
    return str(dtype.numpy().name)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.initializers.values()


def _sparse_tensors(model: ir.Model) -> dict[str, SparseTensor]:
    """Those to write sparsely; none where they would not fit into one file."""
    found = {k: v.const_value for k, v in model.graph.initializers.items() if isinstance(v.const_value, SparseTensor)}
    return found if sum(tensor.nbytes for tensor in found.values()) < EXTERNAL_DATA_FROM else {}


def _write_sparse(tensors: Mapping[str, SparseTensor], file: Path) -> None:
    """Turn the named initializers of a file into sparse ones: `onnx_ir` cannot say it."""
    proto = onnx.load(file, load_external_data=False)
    for part in (proto.graph.initializer, proto.graph.value_info):
        for index in reversed([i for i, entry in enumerate(part) if entry.name in tensors]):
            del part[index]
    for name, tensor in tensors.items():
        places = nonzero_places(tensor.numpy())
        values = onnx.numpy_helper.from_array(tensor.numpy().reshape(-1)[places], name)
        indices = onnx.numpy_helper.from_array(places, f"{name}_indices")
        proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, tensor.shape.numpy()))
    onnx.save(proto, file)


def _load(path: Path) -> tuple[ir.Model, list[onnx.SparseTensorProto]]:
    """Parse a file. Sparse initializers, which `onnx_ir` passes over, become initializers that are still empty."""
    proto = onnx.load(os.fspath(path), load_external_data=False)
    sparse = list(proto.graph.sparse_initializer)
    for entry in sparse:
        proto.graph.initializer.add(name=entry.values.name, data_type=entry.values.data_type, dims=[0])
    model: ir.Model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model, sparse


def _give_data(model: ir.Model, sparse: list[onnx.SparseTensorProto], file: str) -> None:
    """Fill in the sparse initializers of a file that ONNX's checker has accepted.

    Raises:
        InputError: One claims a size that no dense tensor of a file could have, or lies in external data.
    """
    for entry in sparse:
        size, tensors = math.prod(entry.dims), (entry.values, entry.indices)
        if size * 8 > 1 << 34 or any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors):
            raise InputError(
                f"{file}: the sparse weight '{entry.values.name}' is too large, or lies in a file of its own",
                next_step="Store it as a dense tensor.",
            )
        kept, places = map(onnx.numpy_helper.to_array, tensors)
        if places.ndim == 2:
            places = np.ravel_multi_index(tuple(places.T), tuple(entry.dims))
        dense = np.zeros(size, kept.dtype)
        dense[places] = kept
        value = model.graph.initializers[entry.values.name]
        value.const_value = SparseTensor(dense.reshape(tuple(entry.dims)), name=value.name)
        value.shape, value.type = ir.Shape(entry.dims), ir.TensorType(value.const_value.dtype)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in _initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value
    for tensor in _attribute_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor


def _attribute_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                yield attribute.value


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """Refuse data that lies outside the model's folder, also behind a link, and data that is not all there."""
    folder = path.parent.resolve()
    location = os.fspath(tensor.location)
    target = (folder / location).resolve()
    if os.path.isabs(location) or not target.is_relative_to(folder):
        raise InputError(
            f"{path.name}: the external data of '{tensor.name}' points outside the model's folder",
            next_step="Put the data file beside the .onnx and refer to it by its name alone.",
        )
    if not target.is_file():
        raise InputError(
            f"{path.name}: its external data file {target.name} is missing", next_step="Copy it beside the .onnx."
        )
    end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    if end > target.stat().st_size or (tensor.length is not None and tensor.length < tensor.nbytes):
        raise InputError(
            f"{path.name}: its external data file {target.name} is cut short at '{tensor.name}'",
            next_step="Copy the data file again.",
        )


def _in_memory(model: ir.Model) -> ir.Model:
    """Replace tensors that lie in external files, so that the written file stands alone."""
    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _copied(tensor)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _copied(attribute.value))
    return model


def _copied(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
