"""The reference's own RIRs, rebuilt from the draws it made: one test per case file."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_gpu.directivity import Pattern
from ssl_gpu.rir import ImageBatch, RirConfig, render_rir, unit_from_polar
from ssl_gpu.scene import make_scenes

GOLDEN = Path(os.environ.get("SSL_GPU_GOLDEN_DIR", Path(__file__).parent / "golden"))
CASES = sorted(path for path in GOLDEN.glob("case_*.npz") if path.name != "case_stats.npz")  # which holds no RIRs


def load(path):
    case = np.load(path)
    num_mics, num_src = len(case["mic_pos"]), len(case["src_pos"])

    def orientation(key, count):
        if key not in case.files:
            return None
        return torch.from_numpy(case[key]).expand(count, 2)[None]

    scenes = make_scenes(case["room_dim"][None], case["T60"][None], case["mic_pos"][None], case["src_pos"][None],
                         orientation("mic_orientation_rad_used", num_mics),
                         orientation("src_orientation_rad_used", num_src))
    low, high = case["n_image_range"].tolist()
    cfg = RirConfig(sample_rate=int(case["sr"]), num_images=(low, high - 1),
                    perturbation=(float(case["a"]), float(case["b"])), perturbation_exponent=float(case["tau"]),
                    src_pattern=Pattern(str(case["src_pattern"])), mic_pattern=Pattern(str(case["mic_pattern"])),
                    early_window_ms=tuple(case["direct_range"].tolist()))
    # sin and cos as torch computes them in float32 on a CPU: numpy's float32 sin differs and moves slots.
    azimuth, polar = torch.from_numpy(case["azimuth"]), torch.from_numpy(case["elevation"])
    cosine = None
    if "img_orientation_rad" in case.files:
        cosine = torch.from_numpy(case["img_orientation_rad"]).cos().prod(-1)[None]
    images = ImageBatch(unit_from_polar(azimuth, polar)[None], torch.from_numpy(case["dist_nearest_ratio"])[None],
                        torch.from_numpy(case["perturb_u"])[None], cosine,
                        torch.ones(1, int(case["n_image"]), dtype=torch.bool))
    return case, cfg, scenes, images


def relative_l2(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    norm = np.linalg.norm(expected)
    return np.linalg.norm(actual - expected) / norm if norm > 0 else np.linalg.norm(actual)


@pytest.mark.parametrize("path", CASES or [None], ids=lambda path: path.stem if path else "no_case")
def test_golden(path):
    """Nothing but the reference's float32 biquad, 2.9e-3 at most, lies between it and us; 2.2e-7 from its ideal."""
    assert path, f"no case_*.npz in {GOLDEN}"
    case, cfg, scenes, images = load(path)
    rirs = render_rir(cfg, scenes, images)
    full, early = rirs.full[0], rirs.early[0]
    assert full.shape == early.shape == case["rir"].shape
    assert rirs.length.tolist() == [case["rir"].shape[-1]]
    if "rir_f64_noclamp" in case.files:  # the reference's clamp bites here, which we leave out
        assert relative_l2(full[..., :-6], case["rir_f64_noclamp"][..., :-6]) <= 1e-5
        return
    assert relative_l2(full[..., :-6], case["rir_f64"][..., :-6]) <= 1e-5
    assert relative_l2(early[..., :-6], case["early_rir_f64"][..., :-6]) <= 1e-5
    assert relative_l2(full, case["rir"]) <= 5e-3
