import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ssl_gpu.fidelity import FIGURES, main
from ssl_gpu.ism import IsmConfig
from ssl_gpu.rir import RirConfig

DOCS = Path(__file__).parents[1] / "docs"


def test_command_draws_every_figure_and_prints_its_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    outputs = []
    for folder in ("first", "second"):
        assert main(["--out", str(tmp_path / folder), "--rooms", "2"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    lines = outputs[0].splitlines()
    for kind in ("fra, nominal", "fra, measured", "ism, sabine", "ism, eyring", "hybrid, sabine", "hybrid, eyring"):
        assert any(line.startswith(f"method: {kind}: T20/rt60 ") for line in lines)
    for name in FIGURES:
        assert any(line.startswith(f"{name}: ") for line in lines)
        pictures = [(tmp_path / folder / f"{name}.png").read_bytes() for folder in ("first", "second")]
        assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")
    assert sorted(path.stem for path in (tmp_path / "first").iterdir()) == sorted(FIGURES)


@pytest.mark.parametrize("arguments, message", [
    (["--rooms", "1"], "error: --rooms must be >= 2, got 1"),
    (["--out", __file__], f"error: [Errno 17] File exists: '{__file__}'"),
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
