"""Each experiment at a tiny size through its command: lines, tables, and the same again."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

from experiments.made_up import write_cifar, write_mnist, write_uci

from benchmarks.experiments.__main__ import main
from benchmarks.experiments.lines import Lines

IMAGES = "images --seeds 1 --sizes 30 --epochs 6 --test-images 40 --posterior-images 12"


def run(folder, command):
    """Finished lines of a command, whose data and results are in a folder."""
    common = ["--data", str(folder), "--out", str(folder)]
    assert main([*command.split(), *common]) == 0
    return Lines(folder / f"{command.split()[0]}.jsonl").read()


def table(folder, capsys):
    """What "tables" prints and writes."""
    capsys.readouterr()
    assert main(["tables", "--out", str(folder)]) == 0
    return capsys.readouterr().out


def by_method(lines):
    return {line.cell["method"]: line.found for line in lines}


def test_images_plain_fixed_and_tuned(tmp_path, capsys):
    """Post-hoc methods answer with the plain network's mode; a wanted cell is run once."""
    command = f"{IMAGES} --sets digits --networks mlp --augmentation none"
    some = by_method(run(tmp_path, f"{command} --methods plain,fixed,tuned"))
    ran = run(tmp_path, f"{command} --methods plain,fixed,tuned,last-layer")
    assert "1/1 " in capsys.readouterr().out  # plain, fixed and tuned were there
    found = by_method(ran)
    assert {name: found[name] for name in some} == some
    assert found["last-layer"]["nll"] == found["plain"]["nll"] != found["fixed"]["nll"]
    assert found["plain"]["evidence"] < 0 and found["tuned"]["la_nll"] > 0
    assert found["plain"].get("auroc_other") is None  # without MNIST's file
    text = table(tmp_path, capsys)
    assert "| digits | 30 | False | mlp | tuned | 1 |" in text
    assert (tmp_path / "images.md").read_text("utf-8").strip() == text.strip()


def test_images_share_what_depends_on_the_seed(tmp_path):
    """A cell alone gives what it gives after others: split, weights and order are its own."""
    write_mnist(tmp_path)
    command = f"{IMAGES} --sets mnist --networks cnn --augmentation only"
    together = by_method(run(tmp_path, f"{command} --methods plain,temperature"))
    (tmp_path / "images.jsonl").unlink()
    run(tmp_path, f"{IMAGES} --sets mnist --networks mlp --augmentation none --methods plain")
    alone = by_method(run(tmp_path, f"{command} --methods temperature"))["temperature"]
    for name in ("nll", "ece", "auroc_other", "auroc_patches", "temperature", "refit_nll"):
        assert alone[name] == together["temperature"][name]
    refit = together["temperature"]["temperature"]
    assert (together["temperature"]["refit_nll"] == together["plain"]["nll"]) == (refit == 1)


@pytest.mark.slow
def test_all_methods_of_images(tmp_path, capsys):
    write_mnist(tmp_path)
    command = f"{IMAGES} --networks cnn,vit --augmentation both"
    run(tmp_path, command)
    assert "NLL − grid, by seed" in table(tmp_path, capsys)


@pytest.mark.slow
def test_uci(tmp_path, capsys):
    """On a linear target with unit noise, tuned and grid find about that noise."""
    write_uci(tmp_path)
    command = "uci --splits 1 --sets yacht --epochs 100"
    found = by_method(run(tmp_path, command))
    assert set(found) == {"plain", "grid", "post-hoc", "tuned", "tuned-scalar"}
    for name, one in found.items():
        assert math.isfinite(one["nll"]) and 0 <= one["coverage"] <= 1
        assert one["rmse"] < 8, name  # of a target whose standard deviation is 16
    assert found["post-hoc"]["mode_rmse"] == pytest.approx(found["plain"]["rmse"], rel=1e-5)
    assert "| yacht | tuned | 1 |" in table(tmp_path, capsys)


@pytest.mark.slow
def test_wrn(tmp_path, capsys):
    """Before their first round all methods are SGD on the same batches."""
    write_cifar(tmp_path)
    sizes = "--images 20 --side 4 --epochs 5 --batch 20 --test 10 --few 3"
    lines = run(tmp_path, f"wrn {sizes} --only augment=True method=sgd,expand-mc,reduce-mc")
    found = by_method(lines)
    assert set(found) == {"sgd", "expand-mc", "reduce-mc"}
    for name in ("expand-mc", "reduce-mc"):
        assert found[name]["rounds"] == 1
        assert found[name]["nll"] == pytest.approx(found["sgd"]["nll"], rel=1e-4)
    assert "| mc | curvature_seconds |" in table(tmp_path, capsys)


def test_cost(tmp_path, capsys):
    command = "cost --networks mlp --largest 10 --vary n --objectives reduce,exact"
    lines = run(tmp_path, command)
    assert [line.cell["objective"] for line in lines] == ["reduce", "exact"]
    for line in lines:
        one = line.found
        assert one["epochs"] == pytest.approx(one["round_seconds"] / one["epoch_seconds"])
        assert 0 < one["curvature_seconds"] <= one["round_seconds"]
        assert one["parameters"] == 257 * 64 + 65 * 64 + 65 * 10
    assert "| mlp | 10 | 10 | 1 | 21258 |" in table(tmp_path, capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("uci --splits 1", "uci.npz not found"),
        ("images --only network=resnet", "no cell with resnet"),
        ("images --only network", "not of the form"),
        ("images --sets cifar", "unknown: cifar"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, command, message):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--data", str(tmp_path), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_selection(tmp_path, capsys):
    """A perfect order has correlation +1; here the report only has to be there with its figure."""
    pytest.importorskip("matplotlib")
    write_mnist(tmp_path)
    command = "selection --seeds 1 --networks mlp --depths 1,2 --widths 4,8 --size 30 --epochs 6"
    lines = run(tmp_path, command)
    assert [(one.cell["depth"], one.cell["width"]) for one in lines] == [
        (1, 4),
        (1, 8),
        (2, 4),
        (2, 8),
    ]
    assert lines[0].found["parameters"] == 257 * 4 + 5 * 10
    assert "| mlp | evidence | 4 |" in table(tmp_path, capsys)
    assert (tmp_path / "selection-mlp.png").stat().st_size > 0


def test_rotation(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_mnist(tmp_path)
    command = "rotation --seeds 1 --true 60 --grid 30,60,90 --size 20 --epochs 5 --test-images 10"
    assert [one.cell["alpha"] for one in run(tmp_path, command)] == [30, 60, 90]
    assert "| 60 |" in table(tmp_path, capsys)
    assert (tmp_path / "rotation.png").stat().st_size > 0
