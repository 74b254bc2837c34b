# SPDX-License-Identifier: Apache-2.0
"""A traced program becomes an `onnx_ir.Model`: torch's own translation, without the steps that only cost time.

Of `torch.onnx.export(program, dynamo=True)`, measured on BERT-base and on a 12-layer Llama, three steps take most of
the time: decomposing (see `decomposition.py`), inserting type promotions, which runs the whole graph again to learn
what the tracer has already noted, and collecting the operators' translations, which are the same ones every time.

The steps are private to torch. Where one is missing, has another signature or fails, the plain call does it all, and
its error is the one that is reported.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import onnx_ir as ir
import torch

from .decomposition import Rules, decompose
from .translations import TRANSLATIONS


def translate(program: Any, *, opset: int) -> ir.Model:
    """Translate an ExportedProgram, unoptimized; dynamic axes have the tracer's names (`s77`).

    Raises:
        Exception: What torch raises: an operator has no translation.
    """
    try:
        return _quick(program, opset)
    except Exception:  # noqa: BLE001 - private steps may fail in any way; the public one decides
        return translate_plainly(program, opset=opset)


def translate_plainly(program: Any, *, opset: int) -> ir.Model:
    """The same by torch's public function alone."""
    made = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        custom_translation_table=TRANSLATIONS,
        optimize=False,
        verbose=False,
    )
    assert made is not None
    model: ir.Model = made.model
    return model


def _quick(program: Any, opset: int) -> ir.Model:
    from torch.onnx._internal._lazy_import import onnxscript_apis
    from torch.onnx._internal.exporter import _core, _fx_passes

    registry, rules = _rules(opset)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # sizes 0 and 1 are sizes like others
        module = decompose(program.graph_module, rules)
        _promote_types(module)
        _fx_passes.remove_assertion_nodes(module)
    ready = copy.copy(program)
    ready._graph_module, ready._graph_signature = module, _returning(module, program.graph_signature)
    made = _core._exported_program_to_onnx_program(ready, registry=registry).model
    model: ir.Model = onnxscript_apis.convert_version(made, opset)
    return model


def _returning(module: torch.fx.GraphModule, signature: Any) -> Any:
    """The signature with the names of the nodes that the module returns now."""
    (returned,) = next(iter(reversed(module.graph.nodes))).args
    specs = [
        dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=node.name)) if _is_node(node) else spec
        for spec, node in zip(signature.output_specs, returned, strict=True)
    ]
    return dataclasses.replace(signature, output_specs=specs)


def _is_node(value: object) -> bool:
    return isinstance(value, torch.fx.Node)


@functools.cache
def _rules(opset: int) -> tuple[Any, Rules]:
    """The translations for an opset, and what follows from them for decomposing."""
    from torch._export import utils
    from torch.export import exported_program
    from torch.onnx._internal.exporter import _constants, _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=max(opset, _constants.TORCHLIB_OPSET))
    for target, function in TRANSLATIONS.items():
        registry.register_op(target, function)
    translated = set(_decomp.get_onnx_implemented_overloads(registry))
    table = _decomp.create_onnx_friendly_decomposition_table(translated)
    composite, table = exported_program._split_decomp_table_to_cia_and_python_decomp(table)
    return registry, Rules(
        is_translated=registry.is_registered,
        may_stay=utils._check_valid_to_preserve,
        is_composite=utils._is_cia_op,
        table=table,
        in_force=lambda: exported_program._override_composite_implicit_decomp(composite),
    )


def _promote_types(module: torch.fx.GraphModule) -> None:
    """Make conversions of dtype explicit, as ONNX needs them; only what changes is run again."""
    from torch.onnx._internal.fx.passes import type_promotion

    class Promotion(type_promotion._TypePromotionInterpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if n.op != "call_function" or "val" not in n.meta:
                return super().run_node(n)
            with self._set_current_node(n):
                if rule := type_promotion.get_type_promotion_rule(n, self.type_promotion_table):
                    self._maybe_promote_node(n, rule)
            return n.meta["val"]

    inserting = type_promotion.InsertTypePromotion(module, _promotions())
    inserting.interpreter = Promotion(module, _promotions())
    inserting.run()


@functools.cache
def _promotions() -> Any:
    from torch.onnx._internal.fx.passes import type_promotion

    return type_promotion.TypePromotionTable()
