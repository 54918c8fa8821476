"""The example of meta-learned adapters: what it trains, on which names, and a command line that ends in a table."""

import copy
import subprocess
import sys

import pytest
import torch

pytest.importorskip("babel", reason="the demo's extra is not installed")
pytest.importorskip("sacrebleu")
pytest.importorskip("tqdm")

from gradvac_kernels.demo import adapters
from gradvac_kernels.demo.adapter_training import AdaptedTranslator, Joint, MetaLearned, make_setting, train
from gradvac_kernels.demo.model import Translator

SMALL = ("da", "es", "oc")


def setting(**changes):
    arguments = {"steps": 3, "batch_size": 4, "held_out": 20, "validation": 0.2, "inner_lr": 0.1, "temperature": 5.0}
    return make_setting(SMALL, **(arguments | changes))


def weights(module):
    return copy.deepcopy(module.state_dict())


def moved(module, before):
    return any(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_names_are_apart():
    shared = setting()
    for language in SMALL:
        parts = [set(part[language]) for part in (shared.train, shared.validation, shared.held_out)]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert len(parts[1]) == round(0.2 * (len(parts[0]) + len(parts[1])))
    with pytest.raises(ValueError, match=r"da: no names left for training or validation, with 0 of"):
        setting(validation=1e-4)


def test_adapters_change_nothing_at_first_and_have_their_language():
    shared = setting()
    torch.manual_seed(0)
    model = AdaptedTranslator(len(shared.vocabulary), SMALL)
    plain = Translator(len(shared.vocabulary), 64, hidden=192)
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert all(name.startswith("adapters.") for name in missing.unexpected_keys)
    assert not missing.missing_keys
    batch = shared.vocabulary.batch([("es", pair) for pair in shared.train["es"][:4]])
    model.language = "es"
    torch.testing.assert_close(model.losses(batch), plain.losses(batch))
    model.losses(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in (*model.shared, *model.adapters["es"].parameters()))
    assert all(
        parameter.grad is None for language in ("da", "oc") for parameter in model.adapters[language].parameters()
    )
    assert len(list(model.parameters())) == len(model.shared) + 3 * 4 * 4  # languages, layers, tensors


def test_arms_start_alike_and_move_what_they_should():
    shared = setting()
    joint, learned = Joint(shared, seed=1), MetaLearned(shared, seed=1)
    assert not moved(learned.model, weights(joint.model))
    assert moved(Joint(shared, seed=2).model, weights(joint.model))
    drawn = set()
    for _ in range(3):
        before = {language: weights(learned.model.adapters[language]) for language in SMALL}
        theta = [parameter.detach().clone() for parameter in learned.model.shared]
        learned.step()
        turned = [language for language in SMALL if moved(learned.model.adapters[language], before[language])]
        assert len(turned) == 1
        drawn.update(turned)
        assert all(not torch.equal(a, b) for a, b in zip(theta, learned.model.shared))
    assert len(drawn) > 1
    before = {language: weights(joint.model.adapters[language]) for language in SMALL}
    joint.step()
    assert all(moved(joint.model.adapters[language], before[language]) for language in SMALL)


def test_a_seed_repeats():
    shared = setting(steps=2)
    once, again, other = train(shared, 5), train(shared, 5), train(shared, 6)
    for arm in ("joint", "meta"):
        # the same operations; sums of several threads may be rounded differently
        assert once[arm].held_out == pytest.approx(again[arm].held_out, rel=1e-5)
        assert once[arm].held_out != pytest.approx(other[arm].held_out, rel=1e-5)
    assert once["joint"].held_out != pytest.approx(once["meta"].held_out, rel=1e-5)


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gradvac_kernels.demo.adapters", *arguments], capture_output=True, text=True, timeout=120
    )


def test_command_line():
    run = run_cli("--steps", "2", "--seeds", "2", "--languages", "da,oc", "--held-out", "10", "--batch-size", "2")
    assert run.returncode == 0, run.stderr
    table, notes = run.stdout.strip().split("\n\n")
    lines = table.splitlines()
    assert [line.split()[0] for line in lines if "|" in line] == ["names", "da", "oc", "mean"]
    for line in lines[2:4]:
        joint, learned, difference, _, spread = line.split("|")[1].split()
        assert float(learned) - float(joint) == pytest.approx(float(difference), abs=0.0015)  # three rounded figures
        assert 2 < float(joint) < 6  # nats a character, hardly trained
        assert float(spread) >= 0
    assert "over the seeds 0, 1" in notes
    assert "Warning" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--languages", "da"], "argument --languages: expected at least two"),
        (["--languages", "da,tlh"], "unknown: 'tlh'"),
        (["--validation", "1"], "argument --validation: expected a number between 0 and 1, got 1"),
        (["--inner-lr", "inf"], "argument --inner-lr: expected a finite number, got inf"),
        (["--temperature", "0"], "argument --temperature: expected a number above 0, got 0"),
        (["--held-out", "5000"], "no pairs left to train on"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        adapters.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        adapters.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("steps", "seeds", "languages", "inner-lr", "temperature"))
    assert "Slavic: " in text
