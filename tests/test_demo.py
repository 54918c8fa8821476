"""The demo: honest data, arms that differ by the method alone, and a command line that ends in figures and pictures."""

import json
import math
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

pytest.importorskip("babel", reason="the demo's extra is not installed")
pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

from babel import localedata

from gradvac_kernels import GradVac
from gradvac_kernels.demo import arms, comparison, data, experiment, report, similarity
from gradvac_kernels.demo.languages import DEFAULT, FAMILY_OF
from gradvac_kernels.demo.model import Translator
from gradvac_kernels.demo.train import Aligned, PlainSum, mean_loss, train
from gradvac_kernels.demo.vocabulary import END, UNKNOWN, Vocabulary

SMALL = ("da", "sv", "es", "oc")


@pytest.fixture(scope="module")
def split():
    return data.split(DEFAULT, held_out=100)


def setting(steps=3):
    return experiment.make_setting(
        Namespace(languages=list(SMALL), held_out=20, steps=steps, batch_size=4, measure_every=1)
    )


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gradvac_kernels.demo", *arguments], capture_output=True, text=True, timeout=120
    )


# ------------------------------------------------------------------------------------------------------------ data


def test_nothing_held_out_is_trained_on(split):
    held_out = {pair.english.casefold() for pairs in split.held_out.values() for pair in pairs}
    assert len(held_out) == 100
    for language in DEFAULT:
        trained = split.train[language]
        assert not held_out & {pair.english.casefold() for pair in trained}
        names = {pair.name.casefold() for pair in split.held_out[language]}
        assert not names & {pair.name.casefold() for pair in trained}


def test_held_out_names_are_parallel(split):
    english = [[pair.english for pair in pairs] for pairs in split.held_out.values()]
    assert all(row == english[0] for row in english)  # more than 100 things have a name in all of these languages


def test_pairs_are_what_cldr_says(split):
    own = {code: localedata.load(code, merge_inherited=False) for code in ("en", *DEFAULT)}
    for language in DEFAULT:
        known = {
            (own["en"][kind].get(code), name)
            for kind in data.KINDS
            for code, name in own[language].get(kind, {}).items()
        }
        for pair in split.train[language] + split.held_out[language]:
            assert tuple(pair) in known
            assert pair.english != pair.name
            assert max(map(len, pair)) <= data.MAX_CHARACTERS


def test_only_latin_script_and_nothing_inherited():
    assert not data.cldr_names("ru")  # Cyrillic
    assert not any("\N{UPWARDS ARROW}" in name for code in FAMILY_OF for name in data.cldr_names(code).values())
    assert len(data.cldr_names("pt_PT")) < len(data.cldr_names("pt")) / 2  # what differs from Brazil's only


def test_imbalance_is_natural(split):
    size = {language: len(pairs) for language, pairs in split.train.items()}
    assert set(data.low_resource(split.train)) == {code for code in size if 2 * size[code] < max(size.values())}
    assert {"af", "oc", "szl"} <= set(data.low_resource(split.train))
    assert 2 * size["oc"] < size["es"]
    assert 2 * size["szl"] < size["cs"]


def test_every_language_comes_in_every_batch_and_whole_passes(split):
    source = data.batches(split.train, 16, seed=0)
    passed = [pair for _ in range(2 * len(split.train["oc"]) // 16 + 1) for pair in next(source)[DEFAULT.index("oc")]]
    count = len(split.train["oc"])
    assert sorted(passed[:count]) == sorted(split.train["oc"])
    assert passed[count : 2 * count] != passed[:count]


def test_a_temperature_draws_languages_by_their_size(split):
    sizes = torch.tensor([len(pairs) for pairs in split.train.values()], dtype=torch.float64)
    for temperature in (1.0, 5.0):
        source = data.batches(split.train, 16, seed=0, temperature=temperature)
        counts = torch.tensor([[len(pairs) for pairs in next(source)] for _ in range(200)], dtype=torch.float64)
        assert bool((counts.sum(1) == 16 * len(DEFAULT)).all())
        share = sizes ** (1 / temperature) / (sizes ** (1 / temperature)).sum()
        # 38,400 draws: a share p has the standard deviation sqrt(p (1 - p) / 38400) < 0.002
        assert torch.allclose(counts.mean(0) / counts[0].sum(), share, rtol=0, atol=5 * 0.002)


def test_split_without_enough_names_is_refused():
    with pytest.raises(ValueError, match="no pairs left to train on"):
        data.split(SMALL, held_out=5000)


def test_vocabulary_round_trip():
    pairs = [data.Pair("Norway", "Norge"), data.Pair("Spain", "Španija")]
    vocabulary = Vocabulary(["da", "sl"], pairs)
    batch = vocabulary.batch([("da", pairs[0]), ("sl", pairs[1])])
    assert [vocabulary.decode(row) for row in batch.target.tolist()] == ["Norge", "Španija"]
    assert batch.target[0].tolist().count(END) == 1
    assert UNKNOWN in vocabulary.batch([("da", data.Pair("Qatar", "Qatar"))]).target


# -------------------------------------------------------------------------------------------------------- training


def test_padding_changes_no_loss():
    shared = setting()
    torch.manual_seed(0)
    model = Translator(len(shared.vocabulary))
    pairs = sorted(shared.split.train["da"], key=lambda pair: len(pair.english) + len(pair.name))
    short, long = ("da", pairs[0]), ("da", pairs[-1])
    together = model.losses(shared.vocabulary.batch([short, long]))[0]
    alone = model.losses(shared.vocabulary.batch([short]))[0]
    torch.testing.assert_close(together[: len(alone)], alone)
    assert not together[len(alone) :].any()


def test_arms_differ_by_the_method_alone():
    shared = setting()

    def vaccinated(**arguments):
        return lambda model: Aligned(model, shared, "all_layer", GradVac(**arguments))

    def plain(model):
        return PlainSum(model, shared)

    arms = {"plain": plain, "turned": vaccinated(target=0.9), "control": vaccinated(vaccinated=[])}
    records = train(arms, shared, seed=3)
    (other,) = train({"plain": plain}, shared, seed=4).values()
    first, last = ({name: record.losses[step] for name, record in records.items()} for step in (0, -1))
    assert first["plain"] == pytest.approx(first["turned"], rel=1e-5)
    assert first["plain"] != pytest.approx(other.losses[0], rel=1e-3)
    assert last["plain"] == pytest.approx(last["control"], rel=1e-3)
    assert last["plain"] != pytest.approx(last["turned"], rel=1e-3)
    assert sum(map(sum, records["turned"].turned)) > 0
    assert sum(map(sum, records["control"].measured)) == 0


def test_a_seed_repeats():
    shared = setting(steps=2)
    once, again = (train({"plain": lambda model: PlainSum(model, shared)}, shared, seed=5) for _ in range(2))
    assert once["plain"].losses[-1] == pytest.approx(again["plain"].losses[-1], rel=1e-6)


def test_streamed_training_is_that_of_the_buffer():
    shared = setting(steps=4)
    shared.measure_every = 2  # every other step is kept in the buffer and looked at

    def arm(capture):
        return lambda model: Aligned(model, shared, "all_layer", GradVac(beta=0.5), capture)

    stream, buffer = train({"stream": arm("stream"), "buffer": arm("buffer")}, shared, seed=1).values()
    assert torch.tensor(stream.losses) == pytest.approx(torch.tensor(buffer.losses), rel=1e-4)
    assert stream.turned == buffer.turned
    assert sum(map(sum, stream.turned)) > 0
    assert len(stream.apply_seconds) == len(stream.batch_cosines) == 2


@pytest.mark.parametrize("capture", ["stream", "buffer"])
def test_measured_cosines_are_those_of_the_losses(capture):
    shared = setting(steps=1)
    arms = {"method": lambda model: Aligned(model, shared, "all_matrix", GradVac(), capture)}
    (record,) = train(arms, shared, seed=0).values()
    torch.manual_seed(0)
    model = Translator(len(shared.vocabulary))
    for found, batches in (
        (record.batch_cosines, next(data.batches(shared.split.train, 4, 0))),
        (record.parallel_cosines, shared.split.held_out.values()),
    ):
        rows = []
        for language, pairs in zip(SMALL, batches):
            loss = mean_loss(model, shared.vocabulary.batch([(language, pair) for pair in pairs]))
            gradients = torch.autograd.grad(loss, list(model.decoder.layers[1].parameters()))
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
        unit = torch.nn.functional.normalize(torch.stack(rows))
        layer = found[0][record.layers.index("decoder.layers.1")]
        torch.testing.assert_close(layer, unit @ unit.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("capture", ["stream", "buffer"])
@pytest.mark.parametrize("method", arms.METHODS)
def test_every_method_trains_with_any_sampling(method, capture):
    shared = setting(steps=2)
    shared.temperature = 1.0
    shared.batch_size = 1  # some languages are missing from some batches
    options = Namespace(languages=list(SMALL), beta=0.1, target=0.5)
    chosen = arms.Arm(method, "all_layer", 1.0)

    def make(model):
        return Aligned(model, shared, "all_layer", arms.make_method(chosen, options, SMALL, 0), capture)

    records = train({"method": make, "plain": lambda model: PlainSum(model, shared)}, shared, seed=0)
    counts = [list(map(len, batch)) for batch, _ in zip(data.batches(shared.split.train, 1, 0, 1.0), range(2))]
    assert any(0 in row for row in counts)
    for record in records.values():
        assert [[math.isnan(loss) for loss in row] for row in record.losses] == [
            [n == 0 for n in row] for row in counts
        ]
    assert records["method"].losses[0] == pytest.approx(records["plain"].losses[0], rel=1e-5, nan_ok=True)
    if method == "sum":
        assert records["method"].losses[1] == pytest.approx(records["plain"].losses[1], rel=1e-4, nan_ok=True)
    assert [[weight == 0 for weight in row] for row in records["method"].weights] == [
        [n == 0 for n in row] for row in counts
    ]


def test_the_control_compares_two_batches():
    shared = setting(steps=1)
    arm = {
        "method": lambda model: Aligned(
            model, shared, "all_layer", GradVac(), control=data.batches(shared.split.train, 8, seed=7)
        )
    }
    (record,) = train(arm, shared, seed=0).values()
    torch.manual_seed(0)
    model = Translator(len(shared.vocabulary))
    source, rows = data.batches(shared.split.train, 8, seed=7), []
    for _ in range(2):
        for language, pairs in zip(SMALL, next(source)):
            loss = mean_loss(model, shared.vocabulary.batch([(language, pair) for pair in pairs]))
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    unit = torch.nn.functional.normalize(torch.stack(rows))
    torch.testing.assert_close(record.control_cosines[0], unit[:4] @ unit[4:].T, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- similarity


def test_similarity_by_hand():
    families = ["a", "a", "b", "b"]
    vectors = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.0, 0.0]], dtype=torch.float64)
    gram = vectors @ vectors.T
    names, found = similarity.by_layer(torch.stack([gram, gram]), ["encoder.layers.0.a.weight", "encoder.layers.0.b"])
    assert names == ("encoder.layers.0", similarity.WHOLE)
    torch.testing.assert_close(found[0], found[1], equal_nan=True)
    assert found[0, 0, 1] == pytest.approx((1 + 0.02) / math.sqrt(1.01 * 1.04))
    assert found[0, 3].isnan().all()
    within, across = similarity.within_and_across(found[0], families)
    assert within == pytest.approx(float(found[0, 0, 1]))
    assert across == pytest.approx(float(found[0, :2, 2].mean()))
    assert similarity.nearest_in_family(found[0, :3, :3], families[:3]) == (2, 2)


def test_verdict_follows_the_figures():
    def language(loss, chrf, low):
        return {
            "low_resource": low,
            "loss": {"plain": [1.0], "method": [loss]},
            "chrf": {"plain": [30.0], "method": [chrf]},
        }

    results = {
        "arguments": {"method": "gradvac", "seeds": [0]},
        "languages": {
            "af": language(0.9, 31.0, True),
            "da": language(1.2, 33.0, False),
            "sv": language(1.0 + 1e-7, 30.0, False),
        },
    }
    text = " ".join(report.verdict(results))
    loss, chrf = text.split("Held-out chrF:")
    assert "Held-out loss: gradvac is better for 1 of 3 languages (mean difference +0.033)" in loss
    assert "1 of 1 low-resource ones (mean difference -0.100), 0 of 2 others (mean difference +0.100)" in loss
    assert "The plain sum is better for da, and no different in the digits shown for sv." in loss
    assert "gradvac is better for 2 of 3 languages (mean difference +1.3)" in chrf
    assert "The plain sum is better for none" in chrf
    assert "one seed" in text


def test_a_comparison_says_what_exceeds_the_noise():
    def run(loss, chrf):
        return comparison.Run([loss, loss], [chrf, chrf], [0.1, 0.3])

    runs = {
        "sum": [run(1.0, 30.0), run(1.1, 31.0), run(1.2, 32.0)],
        "better": [run(0.9, 30.5), run(1.0, 30.5), run(1.1001, 32.0)],
        "noisy": [run(0.8, 30.0), run(1.4, 31.0), run(1.2, 32.1)],
        "nearly": [run(0.95, 30.0), run(1.0, 31.0), run(1.05, 32.1)],  # t = 3.5, between the 90 and the 95 % of 3 seeds
    }
    found = comparison.gather(["da", "oc"], runs, ["oc"], ["oc"]) | {"arguments": {"seeds": [0, 1, 2], "jobs": 1}}
    assert found["arms"]["better"]["loss"]["low"] == [0.9, 1.0, 1.1001]
    text = comparison.report(found)
    assert "1.100 +- 0.100" in text  # mean and deviation of the sum
    verdict = comparison.verdict(found)
    assert "better better in loss, low-resource (-0.100 [-0.100, -0.100])" in verdict
    assert "noisy" not in verdict
    assert "nearly" not in verdict
    assert "chrF" not in verdict
    one = comparison.gather(["da", "oc"], {name: found[:1] for name, found in runs.items()}, [], ["da"])
    assert "One seed" in comparison.report(one | {"arguments": {"seeds": [0], "jobs": 2}})


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("sum", arms.Arm("sum", "all_layer", None)),
        ("sum@5", arms.Arm("sum", "all_layer", 5.0)),
        ("gradvac/whole_model@1", arms.Arm("gradvac", "whole_model", 1.0)),
    ],
)
def test_arms_are_read_as_they_are_named(text, arm):
    assert arms.parse(text, "all_layer", None) == arm
    assert arm.name == text


def test_every_arm_gets_its_method():
    options = Namespace(languages=list(SMALL), beta=0.1, target=0.4)
    made = {name: arms.make_method(arms.Arm(name, "all_layer", None), options, ["oc"], seed=3) for name in arms.METHODS}
    assert {name: getattr(method, "target", "none") for name, method in made.items()} == {
        **dict.fromkeys(arms.METHODS, "none"),
        **{"gradvac": None, "pcgrad": 0.0, "fixed": 0.4},
    }
    for name in arms.TURNING:
        assert (made[name].vaccinated, made[name].beta, made[name].seed) == ((3,), 0.1, 3)
    assert [type(made[name]).__name__ for name in ("mgda", "gradnorm", "cats", "sum")] == [
        *("MGDA", "GradNorm", "CATS", "Sum")
    ]


def test_a_run_of_a_comparison_trains_as_its_arm_says():
    options = Namespace(
        **{"languages": list(SMALL), "held_out": 20, "steps": 2, "batch_size": 4, "measure_every": 1, "jobs": 1},
        **{"vaccinated": None, "beta": 0.1, "target": 0.4, "capture": "stream"},
    )
    losses = {}
    for text in ("sum", "sum@1", "mgda/whole_model", "mgda/all_matrix"):
        arm = arms.parse(text, "all_layer", None)
        losses[text] = experiment._train_one(options, arm, seed=0).loss
        again = experiment.make_setting(options, arm.temperature)
        if arm.method == "sum":
            (record,) = train({"plain": lambda model, again=again: PlainSum(model, again)}, again, seed=0).values()
            assert losses[text] == pytest.approx(record.held_out[2], rel=1e-5)
    assert len({tuple(round(loss, 4) for loss in found) for found in losses.values()}) == 4


def test_a_comparison_that_was_stopped_goes_on(tmp_path, monkeypatch):
    options = Namespace(
        **{"languages": list(SMALL), "held_out": 20, "steps": 2, "batch_size": 4, "measure_every": 1, "jobs": 1},
        **{"vaccinated": None, "beta": 0.1, "target": 0.4, "capture": "stream", "output": tmp_path, "seeds": [0, 1]},
        compare=[arms.parse(text, "all_layer", None) for text in ("sum", "sum@5")],
    )
    trained = []

    def train_one(options, arm, seed):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((arm.name, seed))
        return comparison.Run([float(len(trained))] * len(SMALL), [1.0] * len(SMALL), [0.1])

    monkeypatch.setattr(experiment, "_train_one", train_one)
    with pytest.raises(KeyboardInterrupt):
        experiment.compare(options)
    del trained[:2]  # one more may be done now than was left
    found = experiment.compare(options)
    assert trained == [("sum", 1), ("sum@5", 1)]
    assert found["arms"]["sum"]["loss"]["all"] == [1.0, 3.0]
    assert found["arms"]["sum@5"]["loss"]["all"] == [2.0, 2.0]  # the second training since
    assert not list(tmp_path.iterdir())

    trained[:] = [("", 0)] * 2
    with pytest.raises(KeyboardInterrupt):
        experiment.compare(options)
    trained.clear()
    options.steps = 3
    with pytest.raises(KeyboardInterrupt):  # three of four: the one of other arguments does not count
        experiment.compare(options)


@pytest.mark.parametrize("text", ["", "adam", "gradvac/layers", "sum@0", "sum@x"])
def test_what_is_no_arm_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|could not convert"):
        arms.parse(text, "all_layer", None)


# ------------------------------------------------------------------------------------------------------------- CLI


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = run_cli(
        *("--languages", ",".join(SMALL), "--steps", "4", "--seeds", "2", "--held-out", "10", "--batch-size", "4"),
        *("--measure-every", "2", "--vaccinated", "oc", "--output", str(folder)),
    )
    assert done.returncode == 0, done.stderr
    return done, folder


def test_cli_writes_finite_figures(finished):
    _, folder = finished
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["arguments"]["seeds"] == [0, 1]
    assert set(results["languages"]) == set(SMALL)
    for found in results["languages"].values():
        for figure in ("loss", "chrf"):
            for arm in ("plain", "method"):
                assert len(found[figure][arm]) == 2
                assert all(math.isfinite(value) for value in found[figure][arm])
    assert results["languages"]["oc"]["turned"] >= results["languages"]["oc"]["conflicting"]  # targets start at zero
    assert results["languages"]["da"]["turned"] is None
    assert results["activity"]["measured_pairs"] == 2 * 4 * 3 * (len(results["cosine"]["batch"]["layers"]) - 1)
    for found in results["cosine"].values():
        assert found["steps"] == [0, 2]
        assert -1 <= found["across"] <= 1
    assert 0 < results["time"]["aggregation_ms"] < results["time"]["method_step_ms"]


def test_cli_draws_pictures(finished):
    _, folder = finished
    pictures = list(folder.glob("*.png"))
    assert {picture.stem for picture in pictures} == {
        *("similarity", "control", "similarity_by_layer", "encoder_decoder", "activity", "weights", "loss")
    }
    for picture in pictures:
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 15_000, picture.name


def test_cli_prints_the_report(finished):
    done, folder = finished
    assert (folder / "report.txt").read_text(encoding="utf-8") in done.stdout
    assert "Over 2 seeds" in done.stdout
    assert "4/4" in done.stderr  # the progress bar


def test_cli_follows_the_similarity(finished):
    _, folder = finished
    lines = (folder / "similarity.csv").read_text().splitlines()
    groups = len(json.loads((folder / "results.json").read_text())["cosine"]["batch"]["layers"])
    assert len(lines) == 1 + 2 * groups * 4 * 3  # two windows of two steps


def test_cli_compares(tmp_path):
    done = run_cli(
        *("--compare", "sum,sum@5,gradvac,mgda", "--languages", ",".join(SMALL), "--steps", "2", "--seeds", "2"),
        *("--held-out", "10", "--batch-size", "4", "--jobs", "2", "--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert list(found["arms"]) == ["sum", "sum@5", "gradvac/all_layer", "mgda/all_layer"]
    assert all(len(arm["loss"]["all"]) == 2 for arm in found["arms"].values())
    assert (tmp_path / "comparison.txt").read_text(encoding="utf-8") in done.stdout


def test_cli_refuses_an_unknown_language():
    done = run_cli("--languages", "de,klingon")
    assert done.returncode == 2
    assert "'klingon'" in done.stderr
    assert "szl" in done.stderr  # what is possible


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "0"],
        ["--seeds", "1,1"],
        ["--seeds", ","],
        ["--languages", "de"],
        ["--vaccinated", "de", "--languages", "sv,da"],
        ["--target", "2"],
        ["--held-out", "5000"],
        ["--temperature", "0"],
        ["--compare", "sum,adam"],
        ["--compare", "sum,sum"],
    ],
)
def test_cli_refuses_senseless_arguments(arguments, capsys):
    from gradvac_kernels.demo import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0].strip("-").replace("-", " ") in capsys.readouterr().err.replace("-", " ")


def test_cli_names_the_extra(monkeypatch):
    from gradvac_kernels.demo import cli

    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sacrebleu" else object())
    with pytest.raises(SystemExit, match=r"sacrebleu: pip install gradvac_kernels\[demo\]"):
        cli.main([])
