import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from ssl_gpu import fidelity
from ssl_gpu.fidelity import FIGURES, main
from ssl_gpu.ism import IsmConfig
from ssl_gpu.methods import EARLY_MS, HYBRID, ISM, early_energy
from ssl_gpu.rir import RirConfig
from ssl_gpu.scene import make_scenes
from ssl_gpu.synthesis import RirBatch
from ssl_gpu.trials import MEASURED, REFERENCE, random_rooms, rendered

DOCS = Path(__file__).parents[1] / "docs"


def test_command_draws_every_figure_and_prints_its_numbers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert main(["--out", str(tmp_path / "first"), "--rooms", "2"]) == 0
    lines, again = capsys.readouterr().out.splitlines(), ["bands", "method"]
    for kind in ("fra, nominal", "fra, measured", "ism, sabine", "ism, eyring", "hybrid, sabine", "hybrid, eyring"):
        assert any(line.startswith(f"method: {kind}: T20/rt60 ") for line in lines)
    for name in FIGURES:
        assert any(line.startswith(f"{name}: ") for line in lines)
        assert (tmp_path / "first" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.stem for path in (tmp_path / "first").iterdir()) == sorted(FIGURES)
    monkeypatch.setattr(fidelity, "FIGURES", {name: FIGURES[name] for name in again})
    assert main(["--out", str(tmp_path / "second"), "--rooms", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [line for name in again for line in lines
                                                    if line.startswith(f"{name}: ")]
    for name in again:
        pictures = [(tmp_path / folder / f"{name}.png").read_bytes() for folder in ("first", "second")]
        assert pictures[0] == pictures[1]


def test_early_energy_counts_what_has_arrived():
    """3.4 m are tap 160: as much again after 1.5 ms, twice that after 40."""
    scenes = make_scenes([[6, 5, 3]], [0.3], [[[1, 2, 1]]], [[[4.4, 2, 1]]])
    full = torch.zeros(1, 1, 1, 4800)
    full[..., 160] = 0.1
    alone = RirBatch(full.clone(), None, torch.tensor([4800]), 16000)
    full[..., 160 + 24] = 0.1
    full[..., 160 + 640] = -0.1 * 2 ** 0.5
    assert EARLY_MS == (1, 2, 5, 50)
    assert early_energy([(scenes, replace(alone, full=full))], [(scenes, alone)]) == [0, 3.0, 3.0, 6.0]


def test_only_rooms_of_measured_decay_have_no_gap():
    """As docs/fidelity.md says, and recommends hybrid rooms for."""
    eyring, found = IsmConfig("eyring"), {}
    scenes = random_rooms(40, 0, 0.2, 0.6)
    direct = list(rendered(ISM, scenes, 0, replace(eyring, max_order=0)))
    for name, cfg in (("nominal", REFERENCE), ("measured", MEASURED), ("hybrid", HYBRID)):
        found[name] = early_energy(list(rendered(cfg, scenes, 0, eyring)), direct)
    assert abs(found["nominal"][1]) <= 0.1 >= abs(found["hybrid"][1]) and found["measured"][1] > 0.8
    assert found["measured"][0] > 0.4 and found["hybrid"][2] > 1.5 and found["nominal"][2] < 0.3


@pytest.mark.parametrize("arguments, message", [
    (["--rooms", "1"], "error: --rooms must be >= 2, got 1"),
    (["--seed", "-1"], "error: --seed must satisfy 0 <= seed <= 18446744073709551615, got -1"),
    (["--out", __file__], f"error: --out must be a folder that can be written to, or a place where one can be made, "
                          f"got {__file__}"),
])
def test_what_cannot_be_is_one_line(tmp_path, capsys, arguments, message):
    pytest.importorskip("matplotlib")  # or that is what is said
    assert main(["--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.strip() == message


def test_nothing_is_left_where_matplotlib_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("error: plots need matplotlib, install it with pip install matplotlib")
    assert not (tmp_path / "new").exists()


def test_the_document_shows_every_figure():
    """Its figures are there and small, and it names every field that has a choice or belongs to rooms by images."""
    text = (DOCS / "fidelity.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"figures/{name}.png" in text
        assert (DOCS / "figures" / f"{name}.png").stat().st_size < 100_000
    names = [field.name for field in fields(RirConfig)]
    for name in [*names[names.index("image_directions"):], "rir.method=ism", "rir.hybrid_share", "rir.ism_share",
                 *(f"ism.{field.name}" for field in fields(IsmConfig))]:
        assert f"`{name}" in text
