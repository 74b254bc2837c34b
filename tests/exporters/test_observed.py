# SPDX-License-Identifier: Apache-2.0
"""Arguments of any form as named tensors, and what several calls of a model say about its sizes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import sources
from onnxpress.exporters.arguments import Flat, split
from onnxpress.exporters.factory_source import build
from onnxpress.exporters.observed import MOST_CALLS, axes_that_vary, example_of, observe
from onnxpress.pipeline.inputs import benchmark_settings, comparison_cases
from onnxpress.pipeline.recipe import BenchmarkSettings


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


ONES = torch.ones(2)
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.integers(1, 4).map(torch.ones)
KEYS = st.text("ab .é0", min_size=1, max_size=3)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3)


TREES = st.recursive(LEAVES, _containers, max_leaves=8)


class TestForms:
    @settings(max_examples=60, deadline=None)
    @given(positional=st.lists(TREES, max_size=3), keywords=st.dictionaries(st.sampled_from("xyz"), TREES, max_size=3))
    def test_filling_a_form_with_its_own_tensors_gives_the_arguments_back(
        self, positional: list[Any], keywords: dict[str, Any]
    ) -> None:
        form, tensors = split(["a"], positional, keywords)
        assert len(form.names) == len(set(form.names)) == len(tensors)
        assert all(name.replace(".", "_").replace("é", "e").isidentifier() or name[0].isdigit() for name in form.names)
        got, named = form.filled(tensors)
        assert same(got, positional)
        assert same(named, keywords)

    def test_names_say_where_a_tensor_lies(self) -> None:
        one = torch.ones(1)
        more = {"left mask": one, "left_mask": one}
        form, _ = split(["image", "sizes"], [one, [one, None, 3], one], {"more": more, "p": Pair(one, 2)})
        assert form.names == ("image", "sizes_0", "input_2", "more_left_mask", "more_left_mask_", "p_0")
        assert form.constants() == {"1_1": None, "1_2": 3, "p_1": 2}
        assert isinstance(form.filled([one] * 6)[1]["p"], Pair)

    def test_mappings_of_any_kind(self) -> None:
        form, tensors = split([], [], {"options": OrderedDict(a=torch.ones(2))})
        assert form.filled(tensors)[1] == {"options": {"a": tensors[0]}}

    def test_what_cannot_be_an_input_is_refused_by_name(self) -> None:
        with pytest.raises(InputError, match="input 'cache_0' is object"):
            split([], [], {"cache": [object()]})

    def test_a_flat_module_calls_by_keyword(self) -> None:
        class Net(nn.Module):
            def forward(self, x: torch.Tensor, scale: float, *, parts: dict[str, Any]) -> dict[str, Any]:
                return {"y": x * scale + parts["bias"][0], "nothing": None}

        form, tensors = split(["x", "scale"], [torch.ones(3), 2.0], {"parts": {"bias": [torch.ones(3)]}})
        [y] = Flat(Net(), form)(*tensors)
        assert y.tolist() == [3.0] * 3


class Echo(nn.Module):
    def forward(self, x: Any, **others: Any) -> torch.Tensor:
        return torch.zeros(1)


def watched(*calls: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    return observe(Echo(), lambda model: [model(**call) for call in calls], "it")[1]


class TestCalls:
    def test_axes_that_vary_together_have_one_name(self) -> None:
        sizes = [(2, 5, 7), (3, 6, 7), (2, 9, 7)]
        calls = watched(*({"x": torch.ones(a, b, c), "ys": [torch.ones(b, 4)]} for a, b, c in sizes))
        assert axes_that_vary(calls) == {"x": {0: "batch", 1: "x_1"}, "ys_0": {0: "x_1"}} or axes_that_vary(calls) == {
            "x": {0: "batch", 1: "ys_0_0"}, "ys_0": {0: "ys_0_0"}
        }  # fmt: skip

    def test_well_known_names(self) -> None:
        ids = [torch.ones(n, m, dtype=torch.int64) for n, m in ((1, 8), (4, 3))]
        calls = watched(*({"x": i, "input_ids": i, "edges": torch.ones(i.shape[1] + 9, 2)} for i in ids))
        axes = axes_that_vary(calls)
        assert axes["input_ids"] == axes["x"] == {0: "batch", 1: "sequence"}
        assert axes["edges"] == {0: "edges_0"}

    def test_nothing_varies(self) -> None:
        assert axes_that_vary(watched({"x": torch.ones(2, 3)})) == {}

    def test_the_example_is_the_call_without_sizes_of_one(self) -> None:
        calls = watched({"x": torch.ones(1, 9)}, {"x": torch.ones(4, 3)}, {"x": torch.ones(2, 40)})
        assert example_of(calls, axes_that_vary(calls))["x"].shape == (4, 3)

    def test_equal_sizes_are_kept_once_and_not_for_ever(self) -> None:
        assert len(watched(*({"x": torch.ones(2)} for _ in range(5)))) == 1
        assert len(watched(*({"x": torch.ones(n)} for n in range(1, 3 * MOST_CALLS)))) == MOST_CALLS

    def test_inputs_are_kept_as_they_were_at_the_call(self) -> None:
        def call(model: nn.Module) -> None:
            x = torch.ones(2)
            model(x)
            x.zero_()

        assert observe(Echo(), call, "it")[1][0]["x"].tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("calls", "said"),
        [
            ([], "never calls the module"),
            (
                [{"x": ONES}, {"x": ONES, "y": ONES}],
                "input 'y' is given in one observed call",
            ),
            (
                [{"x": ONES, "k": 1}, {"x": ONES, "k": 2}],
                "'k' differs between observed calls 1 and 2",
            ),
            ([{"x": torch.ones(2)}, {"x": torch.ones(2, 2)}], "1 axes of float32 in one observed call and 2 axes of"),
            ([{"x": torch.ones(2)}, {"x": torch.ones(3).int()}], "1 axes of float32 .* 1 axes of int32"),
            ([{"x": torch.ones(2), "y": {1, 2}}], "input 'y' is set"),
        ],
    )
    def test_calls_that_are_no_one_signature(self, calls: list[dict[str, Any]], said: str) -> None:
        with pytest.raises(InputError, match=said) as caught:
            watched(*calls)
        assert caught.value.next_step


class TestFactories:
    def test_an_observed_call_by_keyword_with_dicts_and_lists(self, tmp_path: Path) -> None:
        exported = sources.load("observed_factories:mixed")
        shapes = {spec.name: spec.shape for spec in exported.signature.inputs}
        assert shapes == {"image": ("batch", 3), "options_shift": ("batch", 3), "options_more_0": (3,)}
        assert [spec.name for spec in exported.signature.outputs] == ["out", "parts"]
        assert len(exported.known_inputs) == 3
        cases = comparison_cases(exported, None)
        assert [case.feeds["image"].shape[0] for case in cases] == [2, 5, 1]
        runner = tiny_models.session(exported, tmp_path)
        for case in cases:
            assert exported.reference is not None
            wanted, got = exported.reference.run(case.feeds), tiny_models.run(runner, case.feeds)
            for name in wanted:
                np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5)
        rows = benchmark_settings(exported, None, BenchmarkSettings())
        assert [row.batch for row in rows] == [1, 5]

    def test_one_call_says_nothing_of_sizes(self) -> None:
        original = build("observed_factories:once")
        assert original.axes == {"input": {0: "batch"}}
        assert len(original.calls) == 1
        assert build("observed_factories:fixed").axes == {}

    @pytest.mark.parametrize(
        ("factory", "said"),
        [("failing", "the observed call raises ValueError: not today (observed_factories.py line "),
         ("silent", "the observed function never calls the module")],
    )  # fmt: skip
    def test_a_call_that_fails(self, factory: str, said: str) -> None:
        with pytest.raises(InputError) as caught:
            sources.load(f"observed_factories:{factory}")
        assert said in str(caught.value)
        assert caught.value.next_step
