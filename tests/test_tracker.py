"""SimilarityTracker against cosines of explicit vectors, through windows, subsets, checkpoints and exports."""

import csv
import math

import pytest
import torch

import gradvac_kernels as gvk
from gradvac_kernels.tracker import MEASURES

GROUPS = gvk.ParameterGroups.from_sizes({"encoder.0": 50, "encoder.1": 300, "head": 20})
TASKS = ("de", "fr", "hi", "tr")


def gradients(step, tasks=4):
    """[T, P], some agreeing and some not."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(tasks, GROUPS.numel, generator=generator)
    shared = torch.randn(GROUPS.numel, generator=generator)
    return rows + torch.linspace(-0.5, 1.0, tasks)[:, None] * shared


def explicit(grads):
    """Cosine and norm similarity [K + 1, T, T] of each group and of the whole, from float64 vectors."""
    cosines, norms = [], []
    for begin, end in [*GROUPS.bounds.tolist(), (0, GROUPS.numel)]:
        rows = grads[:, begin:end].double()
        length = rows.norm(dim=1)
        cosines.append(torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2))
        norms.append(2 * length[:, None] * length / (length[:, None] ** 2 + length**2))
    return torch.stack(cosines), torch.stack(norms)


def same(a, b, tolerance=1e-6):
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("alone", [True, False])
def test_means_are_those_of_explicit_vectors(alone):
    tracker, method = gvk.SimilarityTracker(GROUPS, TASKS, window=7), gvk.GradVac(beta=0.3)
    cosines, norms, below, turned = [], [], [], []
    for step in range(20):
        grads = gradients(step)
        found = method(grads, GROUPS)
        tracker.update(gvk.gram(grads, GROUPS) if alone else found)
        cosine, norm = explicit(grads)
        cosines.append(cosine)
        norms.append(norm)
        below.append((found.similarity < 0).double())
        turned.append(found.corrected.double())
    assert tracker.steps == 20
    assert tracker.window_steps() == [(0, 6), (7, 13), (14, 19)]
    for windows, steps in ((slice(None), slice(0, 20)), (slice(1, 2), slice(7, 14)), (slice(-1, None), slice(14, 20))):
        # 1e-6: Gram matrices are within 1e-7 |g_i||g_j|
        assert same(tracker.mean("cosine", windows), torch.stack(cosines[steps]).mean(0))
        assert same(tracker.mean("norm_similarity", windows), torch.stack(norms[steps]).mean(0))
        assert same(tracker.mean("conflicting", windows), (torch.stack(cosines[steps]) < 0).double().mean(0))
        for measure, each in (("below_zero", below), ("turned", turned)):
            shares = torch.stack(each[steps]).mean(0)
            shares[:, range(4), range(4)] = torch.nan  # nobody meets itself
            shares = torch.cat([shares, torch.full((1, 4, 4), torch.nan)])
            assert same(tracker.mean(measure, windows), torch.full_like(shares, torch.nan) if alone else shares)


def test_some_tasks_and_bad_rows_are_not_counted():
    tracker = gvk.SimilarityTracker(GROUPS, TASKS)
    tracker.update(gvk.gram(gradients(0, 2), GROUPS), [3, 1])
    second = gradients(1)
    second[0, 3] = torch.inf  # encoder.0 of "de", and so the whole
    second[2, 50:350] = 0  # encoder.1 of "hi"
    tracker.update(gvk.gram(second, GROUPS), torch.tensor([0, 1, 2, 3]))
    first, _ = explicit(gradients(0, 2))
    want, _ = explicit(second)
    want[0, 0] = want[0, :, 0] = want[3, 0] = want[3, :, 0] = torch.nan
    want[1, 2] = want[1, :, 2] = torch.nan
    for i, j, a, b in ((3, 1, 0, 1), (1, 3, 1, 0), (3, 3, 0, 0), (1, 1, 1, 1)):
        want[:, i, j] = (want[:, i, j] + first[:, a, b]) / 2
    assert same(tracker.mean("cosine"), want)


def test_scale_does_not_matter():
    want = None
    for scale in (1e-15, 1.0, 1e15):  # squares in float32's range
        tracker = gvk.SimilarityTracker(GROUPS, 4)
        tracker.update(gvk.gram(gradients(0) * scale, GROUPS))
        found = tracker.mean("cosine")
        want = found if want is None else want
        assert same(found, want, 1e-6)  # products with 1e15 are rounded


def test_it_keeps_no_graph_and_takes_inference_tensors():
    tracker = gvk.SimilarityTracker(GROUPS, TASKS)
    with torch.inference_mode():
        tracker.update(gvk.gram(gradients(0), GROUPS))
    tracker.update(gvk.gram(gradients(1), GROUPS).requires_grad_())
    assert tracker.steps == 2
    assert not tracker.mean("cosine").requires_grad


def test_one_group_is_the_whole():
    groups = gvk.ParameterGroups.from_sizes({"all": 30})
    tracker = gvk.SimilarityTracker(groups, 2)
    assert tracker.groups == ("all",)
    assert tracker.tasks == ("0", "1")


def test_the_table_is_tidy(tmp_path):
    tracker, method = gvk.SimilarityTracker(GROUPS, TASKS, window=2), gvk.GradVac(vaccinated=[2], num_tasks=4)
    for step in range(3):
        tracker.update(method(gradients(step), GROUPS))
    tracker.to_csv(tmp_path / "similarity.csv")
    rows = list(tracker.rows())
    assert len(rows) == 2 * 4 * 12
    with open(tmp_path / "similarity.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    names = {name: index for index, name in enumerate(TASKS)}
    for row, text in zip(rows, read):
        windows = slice(0, 1) if row["first_step"] == 0 else slice(1, 2)
        assert (row["last_step"], row["steps"]) == ((1, 2) if row["first_step"] == 0 else (2, 1))
        k, i, j = tracker.groups.index(row["group"]), names[row["task"]], names[row["other"]]
        assert row["met"] == (row["steps"] if i == 2 and k < 3 else 0)
        for measure in MEASURES:
            value = float(tracker.mean(measure, windows)[k, i, j])
            assert (row[measure] is None) == math.isnan(value) == (text[measure] == "")
            if not math.isnan(value):
                assert float(text[measure]) == row[measure] == value
    import pandas

    frame = tracker.to_pandas()
    assert list(frame.columns) == list(rows[0])
    assert frame["cosine"].tolist() == [row["cosine"] for row in rows]
    frame.to_parquet(tmp_path / "similarity.parquet")
    assert pandas.read_parquet(tmp_path / "similarity.parquet").equals(frame)


def test_tensorboard_gets_the_means_over_pairs(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tracker, writer = gvk.SimilarityTracker(GROUPS, TASKS, window=2), SummaryWriter(tmp_path)
    with pytest.raises(ValueError, match="windows: expected at least one"):
        tracker.log(writer)
    grads = [gradients(step) for step in range(3)]
    grads[2][1, : GROUPS.sizes[0]] = 0  # has no cosines in the first group
    for each in grads:
        tracker.update(gvk.gram(each, GROUPS))
    tracker.log(writer)
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    last, _ = explicit(grads[2])
    last[0, 1] = last[0, :, 1] = torch.nan
    pairs = ~torch.eye(4, dtype=torch.bool)
    for k, group in enumerate((*GROUPS.names, "whole_model")):
        (event,) = read.Scalars(f"cosine/{group}")
        assert event.value == pytest.approx(float(last[k][pairs].nanmean()), abs=1e-6)
        assert event.step == 3
    assert not any(tag.startswith("turned") for tag in read.Tags()["scalars"])
    assert not read.Tags()["images"]


def test_tensorboard_gets_heatmaps(tmp_path):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tracker, writer = gvk.SimilarityTracker(GROUPS, TASKS), SummaryWriter(tmp_path)
    tracker.update(gvk.gram(gradients(0), GROUPS))
    tracker.log(writer, 7, heatmaps=True)
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["images"]) == {f"cosine/{group}" for group in tracker.groups}
    assert read.Images("cosine/head")[0].step == 7


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    tracker = gvk.SimilarityTracker(GROUPS, TASKS, window=4)
    for step in range(6):
        tracker.update(gvk.gram(gradients(step), GROUPS))
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    fresh = gvk.SimilarityTracker(GROUPS, TASKS, window=4)
    fresh.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    for each in (tracker, fresh):
        each.update(gvk.gram(gradients(6), GROUPS))
    assert list(tracker.rows()) == list(fresh.rows())
    assert tracker.window_steps() == fresh.window_steps() == [(0, 3), (4, 6)]


def test_a_bad_state_changes_nothing():
    tracker = gvk.SimilarityTracker(GROUPS, TASKS, window=4)
    tracker.update(gvk.gram(gradients(0), GROUPS))
    good, before = tracker.state_dict(), list(tracker.rows())
    ((first, last, sums),) = good["windows"]
    bad = [None, {}, good | {"x": 1}, good | {"tasks": ["a"]}, good | {"window": 5}, good | {"groups": []}]
    bad += [good | {"windows": [window]} for window in ((first, last, sums.float()), (1, 1, sums), (0, 4, sums))]
    bad.append(good | {"windows": [(0, 0, sums[:, :1])]})
    bad += [good | {"windows": windows} for windows in (None, [1], [(0, 0, sums), (1, 1, sums)], [(0, 0.0, sums)])]
    for state in bad:
        with pytest.raises((TypeError, ValueError), match="state"):
            tracker.load_state_dict(state)
        assert list(tracker.rows()) == before


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((GROUPS, 0), ValueError, "tasks"),
        ((GROUPS, []), ValueError, "tasks"),
        ((GROUPS, "de"), TypeError, "tasks"),
        ((GROUPS, [1, 2]), TypeError, "tasks"),
        ((GROUPS, ["a", "a"]), ValueError, "tasks"),
        (("groups", 2), TypeError, "groups"),
    ],
)
def test_bad_arguments(arguments, error, name):
    with pytest.raises(error, match=f"{name}: expected"):
        gvk.SimilarityTracker(*arguments)


@pytest.mark.parametrize(
    ("found", "ids", "error", "name"),
    [
        ("G", None, TypeError, "found"),
        (torch.zeros(2, 4, 4, dtype=torch.float64), None, ValueError, "found"),
        (torch.zeros(3, 4, 4), None, TypeError, "found"),
        (torch.zeros(3, 4, 4, dtype=torch.float64, device="meta"), None, ValueError, "found"),
        (
            gvk.Vaccination(*[torch.zeros(3, 2, 2)] * 4, torch.zeros(3, 4, 4, dtype=torch.float64)),
            None,
            ValueError,
            "found",
        ),
        (torch.zeros(3, 2, 2, dtype=torch.float64), None, ValueError, "task_ids"),
        (torch.zeros(3, 2, 2, dtype=torch.float64), [0, 4], ValueError, "task_ids"),
        (torch.zeros(3, 2, 2, dtype=torch.float64), [1, 1], ValueError, "task_ids"),
        (torch.zeros(3, 2, 2, dtype=torch.float64), [1, 2, 3], ValueError, "task_ids"),
        (torch.zeros(3, 2, 2, dtype=torch.float64), torch.tensor([1, 9]), ValueError, "task_ids"),
        (torch.zeros(3, 2, 2, dtype=torch.float64), torch.tensor([0.0, 1.0]), TypeError, "task_ids"),
    ],
)
def test_bad_updates_change_nothing(found, ids, error, name):
    tracker = gvk.SimilarityTracker(GROUPS, TASKS)
    with pytest.raises(error, match=f"{name}: expected"):
        tracker.update(found, ids)
    assert tracker.steps == 0
    with pytest.raises(TypeError, match="windows: expected a slice"):
        tracker.mean("cosine", 0)
    with pytest.raises(ValueError, match="windows: expected"):
        tracker.mean("cosine")
    with pytest.raises(ValueError, match="measure: expected one of"):
        tracker.mean("cos")
