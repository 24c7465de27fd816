"""The README's Python, each block copied alone, and where the links of all pages lead."""
import re
from pathlib import Path

import pytest
from oracle import mixture
from torch.testing import assert_close
from torch import from_numpy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def headings(page):
    """As GitHub names them in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To files that are there and headings that they have; others' addresses are not looked up."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert found or page.name == "CHANGELOG.md"
    for link in found:
        name, _, heading = link.partition("#")
        if "://" in name:
            continue
        target = page.parent / name if name else page
        assert target.is_file() or (target.is_dir() and not heading), link
        assert not heading or heading in headings(target), link


def run(block):
    """The names that a block leaves."""
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs_alone(block):
    assert len(BLOCKS) >= 3 and run(block)


def test_input_and_target_of_an_enhancement_belong_together():
    """Of one shape but for the talkers' axis, and at the level of speech: 64 times the RIRs' scale."""
    [block] = [block for block in BLOCKS if "noisy, target" in block]
    names = run(block)
    assert names["noisy"].shape == (16, 1, 48000) and names["target"].shape == (16, 1, 1, 48000)
    level = (names["target"].std((1, 2, 3)) * names["mixture"].scenes.distance[:, 0]).median()
    assert 1 < level / names["dry"].std() < 8  # the direct sound alone: 1


def test_measured_rirs_are_heard_as_they_are():
    """The recipe's audio, less noise at the SNR that was drawn: dry speech through the given RIRs, at their level."""
    [block] = [block for block in BLOCKS if "RirBatch(" in block]
    names = run(block.replace("mix(torch.randn(16, 1, 48000), ", "mix(dry := torch.randn(16, 1, 48000), "))
    heard = names["mixture"]
    for row in (0, 15):
        clean = from_numpy(mixture(names["dry"][row].double().numpy(), names["full"][row].double().numpy(), [1.0]))
        noise = heard.audio[row].double() - clean
        snr = 10 * (clean.square().mean() / noise.square().mean()).log10()
        assert_close(snr, heard.sensor_snr_db[row].double(), rtol=0, atol=1e-3)
    assert heard.scenes.cone_angle.shape == (16, 1)
