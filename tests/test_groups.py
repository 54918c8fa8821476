import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradvac_kernels as gvk

SIZES = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 300), min_size=1, max_size=8)


@given(sizes=SIZES, align=st.integers(1, 64))
def test_layout(sizes, align):
    groups = gvk.ParameterGroups.from_sizes(sizes, align=align)
    assert groups.names == tuple(sizes)
    assert len(groups) == len(sizes)
    assert groups.sizes == tuple(sizes.values())
    assert len(groups.offsets) == len(sizes) + 1
    assert groups.numel == groups.offsets[-1]
    for size, begin, end in zip(groups.sizes, groups.offsets, groups.offsets[1:]):
        assert begin % align == 0
        assert size <= end - begin < size + align
    if align == 1:
        assert groups.numel == sum(sizes.values())


@given(sizes=SIZES, align=st.sampled_from([1, 16]), data=st.data())
def test_a_slice_describes_its_slab(sizes, align, data):
    groups = gvk.ParameterGroups.from_sizes(sizes, align=align)
    start = data.draw(st.integers(0, len(groups) - 1))
    stop = data.draw(st.integers(start + 1, len(groups)))
    slab = groups[start:stop]
    assert slab.names == groups.names[start:stop]
    assert slab.first == start
    assert slab.offsets[0] == 0
    assert torch.equal(slab.bounds + groups.offsets[start], groups.bounds[start:stop])
    assert slab.numel == groups.offsets[stop] - groups.offsets[start]
    assert slab[0:1].first == start


@pytest.mark.parametrize("index", [0, slice(0, 2, 2), "a"])
def test_only_runs_can_be_taken(index):
    with pytest.raises(TypeError, match=r"expected a slice a:b"):
        gvk.ParameterGroups.from_sizes({"a": 1, "b": 2})[index]


def test_an_empty_run_is_refused():
    with pytest.raises(ValueError, match=r"at least one of the 2 groups"):
        gvk.ParameterGroups.from_sizes({"a": 1, "b": 2})[1:1]


@pytest.mark.parametrize(
    ("sizes", "align", "error", "message"),
    [
        ({}, 1, ValueError, "sizes: expected a mapping of at least one"),
        ([3, 4], 1, ValueError, "sizes: expected a mapping"),
        ({"a": -1}, 1, ValueError, r"sizes\['a'\]: expected 0 or more columns, got -1"),
        ({"a": 1.5}, 1, TypeError, r"sizes\['a'\]: expected an int, got 1.5"),
        ({"a": True}, 1, TypeError, r"sizes\['a'\]: expected an int, got True"),
        ({3: 1}, 1, TypeError, "expected group names of type str, got 3"),
        ({"a": 1}, 0, ValueError, "align: expected at least 1, got 0"),
        ({"a": 10**30}, 1, ValueError, "sizes: expected a number of columns of 64 bits"),
        ({"a": 1}, 10**30, ValueError, "sizes: expected a number of columns of 64 bits"),
        ({"a": 1}, 2.0, TypeError, "align: expected an int, got 2.0"),
    ],
)
def test_bad_sizes(sizes, align, error, message):
    with pytest.raises(error, match=message):
        gvk.ParameterGroups.from_sizes(sizes, align=align)


def test_equal_layouts_are_equal_and_travel():
    groups = gvk.ParameterGroups.from_sizes({"a": 3, "b": 5}, align=4)
    assert groups == gvk.ParameterGroups.from_sizes({"a": 3, "b": 5}, align=4)
    assert groups != gvk.ParameterGroups.from_sizes({"a": 3, "b": 5})
    assert len({groups, groups[0:1], groups[1:2]}) == 3
    copy = pickle.loads(pickle.dumps(groups))
    assert copy == groups
    assert torch.equal(copy.bounds, groups.bounds)


# ------------------------------------------------------------------------------------------------------ from a model


class Translator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 4)
        self.encoder = torch.nn.Module()
        self.encoder.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.encoder.norm = torch.nn.LayerNorm(4)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False)])])
        self.decoder.encoder_attention = torch.nn.Linear(4, 4, bias=False)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.temperature = torch.nn.Parameter(torch.ones(()))
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.scales = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2))])


NAMES = {
    "whole_model": ("whole_model",),
    "enc_dec": ("rest", "encoder", "decoder"),
    "all_layer": (
        "temperature",
        "embedding",
        "encoder.layers.0",
        "encoder.layers.1",
        "encoder",
        "decoder.layers.0",
        "decoder",
        "scales",
    ),
}


@pytest.mark.parametrize("granularity", NAMES)
def test_granularities(granularity):
    assert gvk.ParameterGroups.from_model(Translator(), granularity).names == NAMES[granularity]


def test_every_trainable_parameter_has_its_columns_once():
    model = Translator()
    for granularity in [*NAMES, "all_matrix", lambda name: str(len(name) % 3)]:
        groups = gvk.ParameterGroups.from_model(model, granularity, align=8)
        owned = torch.zeros(groups.numel, dtype=torch.int64)
        for slot in groups.parameters:
            owned[slot.offset : slot.offset + slot.numel] += 1
            begin, end = groups.bounds[slot.group].tolist()
            assert begin <= slot.offset
            assert slot.offset + slot.numel <= end
        assert owned.max() == 1
        assert owned.sum() == sum(groups.sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)
        names = [slot.name for slot in groups.parameters]
        assert "head.weight" not in names  # tied: under its first name only
        assert not any(name.startswith("frozen") for name in names)


def test_all_matrix_is_one_group_a_parameter():
    model = Translator()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert gvk.ParameterGroups.from_model(model, "all_matrix").names == tuple(names)


def test_wrappers_do_not_change_the_groups():
    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Translator()
    wrapped = gvk.ParameterGroups.from_model(DistributedDataParallel(model), "all_layer")
    assert wrapped.names == NAMES["all_layer"]
    assert gvk.ParameterGroups.from_model(torch.compile(model), "all_layer").names == NAMES["all_layer"]


@pytest.mark.parametrize(
    ("model", "granularity", "error", "message"),
    [
        (torch.nn.Linear(2, 2), "by_layer", ValueError, "granularity: expected one of .* got 'by_layer'"),
        (torch.nn.Linear(2, 2), ["weight"], ValueError, r"granularity: expected one of .* got \['weight'\]"),
        (torch.nn.Linear(2, 2), "enc_dec", ValueError, "a component encoder or decoder"),
        (torch.nn.Linear(2, 2), lambda name: 3, TypeError, "expected a group name of type str for 'weight', got 3"),
        (
            torch.nn.Linear(2, 2).requires_grad_(False),
            "whole_model",
            ValueError,
            "at least one parameter with requires",
        ),
        ({}, "whole_model", TypeError, "model: expected a torch.nn.Module, got dict"),
    ],
)
def test_bad_models(model, granularity, error, message):
    with pytest.raises(error, match=message):
        gvk.ParameterGroups.from_model(model, granularity)
