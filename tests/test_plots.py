"""The pictures, by what is in them: lines, cells, names, colours. None passes through pyplot."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra plots is not installed")
pytest.importorskip("scipy")

from matplotlib.figure import Figure

import gradvac_kernels as gvk
from gradvac_kernels import plots

nan = float("nan")
TASKS = ["da", "es", "sv", "it"]  # families alternate
FAMILIES = {"da": "Germanic", "sv": "Germanic", "es": "Romance", "it": "Romance"}
COSINE = [[1.0, 0.1, 0.8, 0.2], [0.1, 1.0, 0.15, 0.7], [0.8, 0.15, 1.0, 0.25], [0.2, 0.7, 0.25, 1.0]]
GROUPS = ["embedding", "encoder.layers.0", "encoder.layers.1", "decoder.layers.0"]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def lines(figure):
    """What each line shows, by its name."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()}


def legend(figure):
    found = figure.axes[0].get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def heat(figure):
    """The axes with the cells, the cells, and the names of the rows."""
    axis = next(axis for axis in figure.axes if axis.images)
    return axis, axis.images[0].get_array(), [text.get_text() for text in axis.get_yticklabels()]


# --------------------------------------------------------------------------------------------------------- heatmap


@pytest.mark.parametrize("make", [list, torch.tensor, np.array, lambda x: torch.tensor(x, requires_grad=True)])
def test_heatmap_puts_families_together_and_keeps_their_values(make):
    axis, cells, names = heat(plots.heatmap(make(COSINE), TASKS, families=FAMILIES))
    assert [FAMILIES[name] for name in names] in (
        2 * ["Germanic"] + 2 * ["Romance"],
        2 * ["Romance"] + 2 * ["Germanic"],
    )
    assert [text.get_text() for text in axis.get_xticklabels()] == names
    for row, one in enumerate(names):
        for column, other in enumerate(names):
            if one == other:
                assert cells.mask[row, column]
            else:
                assert cells[row, column] == pytest.approx(COSINE[TASKS.index(one)][TASKS.index(other)])
    written = {text.get_position(): text.get_text() for text in axis.texts}
    assert len(written) == 12
    assert written[1, 0] == f"{cells[0, 1]:.2f}"


def test_heatmap_colours_names_by_family():
    figures = [
        plots.heatmap(COSINE, TASKS, families=families) for families in (FAMILIES, [FAMILIES[task] for task in TASKS])
    ]
    for figure in figures:
        axis, _, names = heat(figure)
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            assert [text.get_color() for text in labels] == [
                plots.COLOURS[FAMILIES[name] == "Romance"] for name in names
            ]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Germanic", "Romance"]
    assert not plots.heatmap(COSINE, TASKS).legends
    many = plots.heatmap(torch.eye(10), list("abcdefghij"), families=list("abcdefghij"))
    assert len(many.legends[0].get_texts()) == 10  # more than there are colours


def test_heatmap_without_what_was_not_measured():
    cosine = torch.tensor(COSINE)
    cosine[0, 1] = cosine[1, 0] = nan
    cosine[2, 3] = float("inf")
    before = cosine.clone()
    axis, cells, names = heat(plots.heatmap(cosine, TASKS))
    masked = {(names[row], names[column]) for row, column in zip(*np.nonzero(cells.mask))}
    assert masked == {("da", "es"), ("es", "da"), ("sv", "it"), *((task, task) for task in TASKS)}
    assert len(axis.texts) == 9
    torch.testing.assert_close(cosine, before, equal_nan=True)  # not written to
    plots.heatmap([[nan, nan], [nan, nan]], ["a", "b"])


def test_heatmap_shows_the_control_on_the_diagonal():
    axis, cells, names = heat(plots.heatmap(COSINE, TASKS, control=[0.9, 0.8, nan, 0.6]))
    shown = dict(zip(names, cells.diagonal()))
    assert (shown["da"], shown["es"], shown["it"]) == (0.9, 0.8, 0.6)
    assert np.ma.is_masked(shown["sv"])
    assert "two batches" in axis.get_xlabel()
    assert not heat(plots.heatmap(COSINE, TASKS))[0].get_xlabel()


def test_heatmap_of_many_tasks_has_no_values_in_it():
    for N, written in ((16, 16 * 15), (17, 0)):
        axis, _, _ = heat(
            plots.heatmap(torch.rand(N, N), [f"task{n}" for n in range(N)], label="of what", title="Title")
        )
        assert len(axis.texts) == written
    assert axis.figure.get_suptitle() == "Title"
    assert any(other.get_ylabel() == "of what" for other in axis.figure.axes)


def test_heatmap_writes_no_negative_zero():
    axis, _, _ = heat(plots.heatmap([[1.0, -0.001], [-0.001, 1.0]], ["a", "b"]))
    assert [text.get_text() for text in axis.texts] == ["0.00", "0.00"]


def test_clusters_by_hand():
    linkage = plots.clusters(COSINE)
    assert [sorted(pair) for pair in linkage[:, :2].tolist()] == [[0, 2], [1, 3], [4, 5]]
    assert linkage[:, 2].tolist() == pytest.approx([0.2, 0.3, 1 - (0.1 + 0.2 + 0.15 + 0.25) / 4])
    one_way = [[nan, 0.5, nan], [nan, nan, 0.2], [nan, 0.4, nan]]  # pairs .5, .3 and none, which counts as 0
    assert plots.clusters(one_way)[:, 2].tolist() == pytest.approx([0.5, 1 - (0.3 + 0.0) / 2])
    assert plots.clusters([[9.0, 5.0], [5.0, 9.0]])[0, 2] == 0  # no distance below zero


# ----------------------------------------------------------------------------------------------------------- lines


def test_by_layer_means_over_pairs():
    cosine = torch.full((4, 3, 3), 100.0)  # a diagonal that would be seen
    cosine[:, [0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] = torch.tensor([0.1, 0.2, 0.1, 0.3, 0.2, 0.3])
    cosine[1, 0, 1] = cosine[1, 1, 0] = nan
    cosine[3] = nan
    figure = plots.by_layer({"pairs": cosine, "given": [0.1, 0.2, 0.3, nan]}, GROUPS)
    x, y = lines(figure)["pairs"]
    assert x == [0, 1, 2, 3]
    assert y == pytest.approx([0.2, 0.25, 0.2, nan], nan_ok=True)
    assert lines(figure)["given"][1] == pytest.approx([0.1, 0.2, 0.3, nan], nan_ok=True)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == GROUPS
    assert legend(figure) == ["pairs", "given"]


def test_by_layer_takes_groups_and_thins_their_names():
    groups = gvk.ParameterGroups.from_sizes({f"layers.{k}": 1 for k in range(130)})
    figure = plots.by_layer({"x": range(130)}, groups)
    names = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert names[:2] == ["layers.0", "layers.4"]
    assert len(names) == 33


def test_over_steps_joins_what_was_measured():
    figure = plots.over_steps(
        torch.tensor([0, 10, 20, 30]), {"a": [1, nan, 3, float("inf")], "b": np.arange(4)}, ylabel="cosine"
    )
    assert lines(figure) == {"a": ([0, 20], [1, 3]), "b": ([0, 10, 20, 30], [0, 1, 2, 3])}
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("step", "cosine", "linear")
    assert [line.get_color() for line in axis.get_lines()] == list(plots.COLOURS[:2])
    assert all(line.get_marker() == "o" for line in axis.get_lines())
    (line,) = plots.over_steps(range(13), {"a": range(13)}, ylabel="").axes[0].get_lines()
    assert line.get_marker() == "None"


def test_over_steps_smooths():
    figure = plots.over_steps(range(5), {"a": [1.0, 3.0, nan, 8.0, 10.0]}, ylabel="", smooth=2)
    assert lines(figure)["a"] == ([0, 1, 3, 4], [1.0, 2.0, 5.5, 9.0])
    assert figure.axes[0].get_xlabel() == "step (running mean of 2)"
    assert lines(plots.over_steps([1, 2], {"a": [1.0, 2.0]}, ylabel="", smooth=9))["a"] == ([1, 2], [1.0, 1.5])
    assert lines(plots.over_steps([1, 2], {"a": [nan, nan]}, ylabel="", smooth=9))["a"] == ([], [])


def test_over_steps_pairs_lines_on_axes_of_the_caller():
    figure = Figure()
    axis = figure.subplots()
    for style in ("-", ":"):
        values = {f"within {style}": [1, 2], f"across {style}": [2, 3]}
        assert plots.over_steps([0, 1], values, ylabel="", style=style, ax=axis) is figure
    looks = [(line.get_color(), line.get_linestyle()) for line in axis.get_lines()]
    assert looks == [(colour, style) for style in ("-", ":") for colour in plots.COLOURS[:2]]
    assert axis.get_legend() is None


@pytest.mark.parametrize("draw", [plots.eigenvalue, lambda *a: plots.over_steps(*a, ylabel="", log=True)])
def test_log_axis_where_all_is_positive(draw):
    def scale(values):
        return draw([0, 1], values).axes[0].get_yscale()

    assert scale({"a": [1, 1e4], "b": [nan, 2]}) == "log"
    assert scale({"a": [1, 1e4], "b": [-1, 2]}) == "linear"
    assert scale({"a": [0, 1e4]}) == "linear"


def test_rates():
    figure = plots.rates([0, 1, 2], torch.tensor([0.0, 0.5, 0.25]), [0, 0.25, nan], smooth=2, method="CAGrad")
    turned, below = lines(figure).items()
    assert "turned by CAGrad" in turned[0]
    assert "below 0" in below[0]
    assert turned[1] == ([0, 1, 2], [0, 0.25, 0.375])
    assert below[1] == ([0, 1], [0, 0.125])
    axis = figure.axes[0]
    assert axis.get_ylim()[0] == 0
    assert axis.yaxis.get_major_formatter()(0.25) == "25%"
    assert len(legend(figure)) == 2


def test_weights():
    found = torch.tensor([[0.5, 0.5, nan], [0.2, 0.3, 0.5]], dtype=torch.bfloat16)
    figure = plots.weights([10, 20], found, ["de", "fr", "hi"])
    assert lines(figure)["de"] == ([10, 20], [0.5, pytest.approx(0.2, rel=0.01)])
    assert lines(figure)["hi"] == ([20], [0.5])
    many = plots.weights([0], torch.ones(1, 12), [f"task{n}" for n in range(12)])
    looks = {(line.get_color(), line.get_linestyle()) for line in many.axes[0].get_lines()}
    assert len(looks) == len(legend(many)) == 12  # in another style once the colours are through


# --------------------------------------------------------------------------------------------------------- scatter


def pairs_of(encoder, decoder):
    """``[4, 3, 3]`` for GROUPS: the pairs 01, 02, 12 have these cosines."""
    found = np.full((4, 3, 3), nan)
    for group, values in zip(range(4), ((9, 9, 9), encoder, encoder, decoder)):
        for (i, j), value in zip(((0, 1), (0, 2), (1, 2)), values):
            found[group, i, j] = found[group, j, i] = value
    return found


def test_encoder_against_decoder():
    cosine = pairs_of((0.1, 0.2, 0.5), (0.4, 0.3, nan))
    cosine[2, 0, 1] = cosine[2, 1, 0] = 0.3  # the mean with the other encoder layer is .2
    cosine[3, 2, 0] = 0.5  # the mean with the other direction is .4
    figure = plots.encoder_against_decoder(cosine, GROUPS, ["da", "sv", "es"])
    points, diagonal = figure.axes[0].get_lines()
    assert list(points.get_xdata()) == pytest.approx([0.2, 0.2])
    assert list(points.get_ydata()) == pytest.approx([0.4, 0.4])
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert [text.get_text() for text in figure.axes[0].texts] == ["da, sv"]  # no room for the other
    assert legend(figure) == []


def test_encoder_against_decoder_by_family():
    figure = plots.encoder_against_decoder(
        torch.tensor(pairs_of((0.1, 0.2, 0.5), (0.4, 0.3, 0.0))),
        gvk.ParameterGroups.from_sizes(dict.fromkeys(GROUPS, 1)),
        ["da", "sv", "es"],
        families=["Germanic", "Germanic", "Romance"],
    )
    found = lines(figure)
    assert found["within families"] == ([pytest.approx(0.1)], [pytest.approx(0.4)])
    assert found["across families"] == ([pytest.approx(0.2), pytest.approx(0.5)], [pytest.approx(0.3), 0.0])
    assert {text.get_text() for text in figure.axes[0].texts} == {"da, sv", "da, es", "sv, es"}
    assert legend(figure) == ["across families", "within families"]


def test_encoder_against_decoder_of_nothing_measured():
    plots.encoder_against_decoder(np.full((2, 2, 2), nan), ["encoder", "decoder"], ["a", "b"])


@pytest.mark.parametrize(
    ("groups", "missing"), [(["encoder", "rest"], "decoder"), (["encoders.0", "decoder.0"], "encoder")]
)
def test_encoder_against_decoder_needs_both(groups, missing):
    with pytest.raises(ValueError, match=rf"^groups: expected names with a component {missing}, got"):
        plots.encoder_against_decoder(torch.ones(2, 2, 2), groups, ["a", "b"])


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: plots.heatmap(torch.ones(2, 3), ["a", "b"]),
            ValueError,
            r"cosine: expected shape \[2, 2\], got \[2, 3\]",
        ),
        (
            lambda: plots.heatmap([["x"]], ["a", "b"]),
            TypeError,
            "cosine: expected a tensor or an array of numbers",
        ),
        (lambda: plots.heatmap(COSINE, "abcd"), TypeError, "tasks: expected a sequence of names, got 'abcd'"),
        (lambda: plots.heatmap(COSINE, [0, 1, 2, 3]), TypeError, "tasks: expected a sequence of names, got"),
        (lambda: plots.heatmap([[1]], ["a"]), ValueError, "tasks: expected at least two, got"),
        (lambda: plots.heatmap(COSINE, TASKS, control=[1]), ValueError, r"control: expected shape \[4\], got \[1\]"),
        (lambda: plots.heatmap(COSINE, TASKS, families={"da": "x"}), ValueError, "families: .* none for es, sv, it"),
        (lambda: plots.heatmap(COSINE, TASKS, families=["x"]), ValueError, "families: .* 4 tasks, got 1"),
        (
            lambda: plots.heatmap(COSINE, TASKS, families=[1, 2, 3, 4]),
            TypeError,
            "families: expected a sequence of names",
        ),
        (lambda: plots.clusters(torch.ones(2, 3)), ValueError, r"cosine: expected shape \[N, N\], got \[2, 3\]"),
        (lambda: plots.clusters([[1.0]]), ValueError, "cosine: expected at least two tasks"),
        (lambda: plots.by_layer([1, 2], ["a", "b"]), TypeError, "values: expected a mapping of lines to numbers, got"),
        (lambda: plots.by_layer({}, ["a", "b"]), ValueError, "values: expected at least one line"),
        (
            lambda: plots.by_layer({"x": torch.ones(2, 3, 4)}, ["a", "b"]),
            ValueError,
            r"values\['x'\]: expected shape \[2\] or \[2, N, N\], got \[2, 3, 4\]",
        ),
        (lambda: plots.by_layer({"x": [1]}, []), ValueError, "groups: expected at least one"),
        (lambda: plots.over_steps([], {"x": []}, ylabel=""), ValueError, r"steps: expected shape \[S\], got \[0\]"),
        (lambda: plots.over_steps([1], {"x": [1, 2]}, ylabel=""), ValueError, r"values\['x'\]: expected shape \[1\]"),
        (lambda: plots.over_steps([1], {"x": [1]}, ylabel="", smooth=0), ValueError, "smooth: expected at least 1"),
        (lambda: plots.over_steps([1], {"x": [1]}, ylabel="", smooth=2.0), TypeError, "smooth: expected an int"),
        (lambda: plots.rates([1, 2], [1], [1, 2]), ValueError, r"turned: expected shape \[2\], got \[1\]"),
        (lambda: plots.rates([1, 2], [1, 2], [1]), ValueError, r"below_zero: expected shape \[2\], got \[1\]"),
        (lambda: plots.weights([1, 2], torch.ones(3, 2), ["a", "b"]), ValueError, r"weights: expected shape \[2, 2\]"),
        (lambda: plots.eigenvalue([1], [2]), TypeError, "values: expected a mapping"),
        (
            lambda: plots.encoder_against_decoder(torch.ones(3, 2, 2), ["encoder", "decoder"], ["a", "b"]),
            ValueError,
            r"cosine: expected shape \[2, 2, 2\], got \[3, 2, 2\]",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


# ---------------------------------------------------------------------------------------------------------- pyplot


def test_figures_do_not_pass_through_pyplot(tmp_path):
    done = python(
        "import sys, matplotlib\n"
        "matplotlib.use('svg')\n"
        "from gradvac_kernels import plots\n"
        "one = [[1, .5], [.5, 1]]\n"
        f"plots.heatmap(one, ['a', 'b'], families=['x', 'y']).savefig({str(tmp_path / 'heat.png')!r})\n"
        "plots.by_layer({'x': [one]}, ['a'])\n"
        "plots.weights([1], [[1, 2]], ['a', 'b'])\n"
        "plots.rates([1], [.5], [.2])\n"
        "plots.eigenvalue([1], {'x': [1]})\n"
        f"plots.encoder_against_decoder([one, one], ['encoder', 'decoder'], ['a', 'b'])"
        f".savefig({str(tmp_path / 'scatter.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.get_backend() == 'svg'\n"
        "from matplotlib import pyplot\n"
        "assert pyplot.get_fignums() == []\n"
    )
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("heat.png", "scatter.png"))


def test_the_package_alone_imports_no_matplotlib():
    done = python("import sys, gradvac_kernels; assert not {'matplotlib', 'scipy'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["matplotlib", "scipy"])
def test_import_names_the_extra(name):
    done = python(f"import sys; sys.modules[{name!r}] = None; import gradvac_kernels.plots")
    assert "pip install gradvac_kernels[plots]" in done.stderr
    assert done.returncode == 1
