"""Every benchmark from end to end in this process, as small as it gets: what it promises to write, and the tables."""
import contextlib
import importlib
import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for those who call pytest without python -m

from benchmarks import all as benchmark_all  # noqa: E402
from benchmarks import (ablations, accuracy_tables, bench_convolve, bench_rir, bench_simulate,  # noqa: E402
                        bench_train, common, floors, lanes, localize_windows, peers, report, traffic)
from ssl_gpu import runtime, synthesis, train  # noqa: E402
from ssl_gpu.checkpoint import save_checkpoint  # noqa: E402
from ssl_gpu.commandline import end_with  # noqa: E402
from ssl_gpu.config import RunConfig, from_mapping, to_mapping  # noqa: E402
from ssl_gpu.mixture import MixtureConfig  # noqa: E402
from ssl_gpu.pretrained import build_localizer  # noqa: E402
from ssl_gpu.scene import SceneConfig  # noqa: E402
from ssl_gpu.simulator import Simulator, SimulatorConfig  # noqa: E402

CONDITIONS = {"benchmark", "command", "date", "machine", "versions", "commit", "workload", "rows"}
TIMES = {"name", "median_s", "p10_s", "p90_s"}
SIMULATION = TIMES | {"batch", "calls", "scenes_per_s", "audio_s_per_s", "peak_bytes", "error"}
FAKE_REFERENCE = """
import numpy as np

def FRAM_RIR(mic_pos, sr, T60, room_dim, src_pos):
    if room_dim[0] > {longest}:
        raise ValueError("too long a room")
    return (np.ones((len(mic_pos), len(src_pos), int(np.ceil(T60 * sr))), np.float32),) * 2
"""


def fake_reference(folder, monkeypatch, longest):
    """Points FRA_RIR_PATH at a reference that takes no time and refuses rooms longer than `longest` m."""
    (folder / "FRAM_RIR.py").write_text(FAKE_REFERENCE.format(longest=longest))
    monkeypatch.setenv("FRA_RIR_PATH", str(folder))


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# A network that takes no time, for tests of what is around it.
SMALL = ("speech.clip_s=0.5", "model.dim=32", "model.depth=1", "model.channels=4", "features.num_bands=4",
         "features.num_delays=9", "features.mask_width=8")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """A median of two: what is measured matters here, not how long it takes."""
    monkeypatch.setattr(common, "LEAST_CALLS", 2)


def run(benchmark, tmp_path, *arguments):
    """The results that the benchmark's command line writes."""
    path = tmp_path / "results.json"
    assert benchmark.main([*arguments, "--device", "cpu", "--threads", "1", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def check(results, keys):
    """What every file of results must say."""
    assert CONDITIONS <= set(results)
    assert set(results["machine"]) == {"device", "slug", "gpu", "cores", "threads", "driver"}
    assert results["machine"]["threads"] == 1
    assert {"torch", "python", "ssl_gpu"} <= set(results["versions"])
    assert results["rows"]
    for row in results["rows"]:
        assert keys <= set(row)
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]


@pytest.mark.parametrize("benchmark, rows, without_error", [(bench_rir, 4, 1), (bench_simulate, 3, 0)])
def test_simulation_benchmark(benchmark, rows, without_error, tmp_path, capsys):
    results = run(benchmark, tmp_path, "--batch", "2", "--seconds", "0", "--check", "1")
    check(results, SIMULATION)
    errors = [row["error"] for row in results["rows"]]
    assert len(errors) == rows and errors.count(None) == without_error
    # An RIR is compared without its last 6 taps; a mixture hears them, where the reference cuts off its 8x signal.
    assert all(error is None or error < (3e-7 if benchmark is bench_rir else 1e-3) for error in errors)
    shown = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cells[:2] for cells in shown[2:]] == [[f"| {row['name']}", str(row["batch"])] for row in results["rows"]]
    assert [cells[-1] == "- |" for cells in shown[2:]] == [error is None for error in errors]


@pytest.mark.parametrize("scene, mixture, graph", [
    (SceneConfig(), bench_simulate.NOISY, False), (SceneConfig(bank=3), bench_simulate.NOISY, True),
    (SceneConfig(num_mics=1, num_src=3), MixtureConfig(), True)], ids=["noise", "bank", "array"])
def test_error_of_a_row_is_that_of_what_was_timed(scene, mixture, graph, monkeypatch):
    """Of the very call, captured or not: one that gives something else has an error, though the simulator is right."""
    way = {"compiled": False, "fused": False, "graph": graph}
    row, error = bench_simulate.measure("x", 2, way, scene, mixture, 1, torch.device("cpu"), 0.0)
    assert row["error"] is None and error() < 1e-3
    name = "captured" if graph else "__call__"
    real = getattr(Simulator, name)

    def louder(*args, **kwargs):
        found = real(*args, **kwargs)
        return (lambda dry: replace(made := found(dry), audio=1.1 * made.audio)) if graph else replace(
            found, audio=1.1 * found.audio)

    monkeypatch.setattr(Simulator, name, louder)
    _, error = bench_simulate.measure("x", 2, way, scene, mixture, 1, torch.device("cpu"), 0.0)
    assert 0.09 < error() < 0.11


def test_least_time_of_a_mixture_is_that_of_its_bytes(tmp_path, capsys):
    """Two sources and two microphones of 3 s in float32; the best row stands against it."""
    results = run(bench_simulate, tmp_path, "--batch", "1", "2", "--seconds", "0", "--check", "0")
    least = results["floor"]
    assert least["bytes_per_scene"] == 4 * 48000 * 4 and 1e9 < least["bytes_per_s"] < 1e13
    assert least["us_per_scene"] == pytest.approx(1e6 * least["bytes_per_scene"] / least["bytes_per_s"])
    best = min(1e6 / row["scenes_per_s"] for row in results["rows"] if row["name"] == "endless rooms")
    said = (f"Memory floor: 0.77 MB a scene, to read the dry speech and write the mixture, at "
            f"{least['bytes_per_s'] / 1e9:,.0f} GB/s of a copy are {report.number(least['us_per_scene'])} us; endless "
            f"rooms take {report.number(best / least['us_per_scene'])} times as long.")
    assert said in capsys.readouterr().out
    del results["floor"]
    assert "Memory floor" not in report.markdown(results)               # of an older file


def test_a_floor_that_cannot_be_measured_costs_no_row(tmp_path, monkeypatch, capsys):
    def full(device):
        raise RuntimeError("CUDA error: out of memory\nmore of it")

    monkeypatch.setattr(common, "copy_speed", full)
    results = run(bench_simulate, tmp_path, "--batch", "1", "--seconds", "0", "--check", "0")
    assert len(results["rows"]) == 3 and results["complete"] and "floor" not in results
    assert capsys.readouterr().err == "no floor of the memory: CUDA error: out of memory\n"


def test_printed_table_is_in_the_units_of_its_head(capsys):
    """Per scene, not per call; a row that was not compared has a dash."""
    device = torch.device("cpu")
    rows = [{**common.row(name, 4, common.Timing(0.002, 0.001, 0.004, 7), 12.0, device), "peak_bytes": 3 << 20}
            for name in ("render", "draw")]
    results = common.Results("bench_rir", device, ["--batch", "4"], None)
    results.measure([common.Task("render", 4, False, lambda: (rows[0], lambda: 1.234e-7)),
                     common.Task("draw", 4, False, lambda: (rows[1], None))])
    assert results.finish() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        f"### Room impulse responses: {results.content['machine']['device']}", "",
        "|  | batch | ms per scene (p10 to p90) | scenes/s | s of audio per s | peak MiB | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| render | 4 | 0.5 (0.25 to 1) | 2,000 | 6,000 | 3 | 1.2e-07 |",
        "| draw | 4 | 0.5 (0.25 to 1) | 2,000 | 6,000 | 3 | - |"]
    assert lines[7].endswith(": `python -m benchmarks.bench_rir --batch 4`")


def test_convolution_benchmark(tmp_path):
    results = run(bench_convolve, tmp_path, "--batch", "1", "--seconds", "0", "--check", "1")
    check(results, SIMULATION)
    assert len(results["rows"]) == 7 and all(row["error"] < 2e-6 for row in results["rows"])
    first = results["rows"][0]
    assert first["scenes_per_s"] == 1 / first["median_s"] and first["audio_s_per_s"] == 3 / first["median_s"]


@pytest.mark.parametrize("text, message", [
    ("foo", "error: --set: override 'foo' must be of the form section.key=value\n"),
    ("train.nope=1", "error: --set: ")])
def test_wrong_settings_are_no_measurement_that_fails(text, message, capsys):
    with pytest.raises(SystemExit) as end:
        bench_train.main(["--device", "cpu", "--set", text])
    assert end.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_oracle_notices_a_wrong_convolution():
    dry, rir = torch.randn(2, 2000), torch.randn(2, 2, 50)
    heard = common.oracle_mixture(dry, rir)
    assert common.relative_l2(torch.from_numpy(heard), heard) == 0
    assert common.relative_l2(torch.from_numpy(heard).roll(1, -1), heard) > 0.1


def test_training_benchmark_shares_a_step_out(tmp_path, capsys):
    results = run(bench_train, tmp_path, "--batch", "2", "--seconds", "0", "--compile", "no", "--overlap", "both",
                  "--profile", "3", "--set", "train.precision=float32", *SMALL)
    check(results, SIMULATION | {"share", "parameters", "bfloat16", "compiled", "overlap", "fixed_step_s"})
    out = capsys.readouterr().out
    assert all(len(row["operations"]) == 3 for row in results["rows"])
    assert all(f"  {each['name']}\n" in out for row in results["rows"] for each in row["operations"])
    assert "\nlibrispeech, overlap: ms, share and calls of a step\n" in out
    assert [row["overlap"] for row in results["rows"]] == [False, True]
    for row in results["rows"]:
        assert row["simulation_cost"] == pytest.approx(1 - row["fixed_step_s"] / row["median_s"])
        share = row["share"]
        assert set(share) == {"simulate", "wait", "forward", "backward", "update"} and not row["bfloat16"]
        assert all(part > 0 for part in share.values()) and share["simulate"] <= share["wait"]  # on a CPU
        assert 0.8 < sum(share.values()) - share["simulate"] <= 1
    text = report.markdown(results)
    assert f"librispeech, {results['rows'][0]['parameters'] / 1e6:.2f} M, overlapped | 2 | float32" in text
    assert f"| {100 * results['rows'][0]['simulation_cost']:.1f} |" in text and "| simulation costs, % |" in text


def results_of(tmp_path):
    return common.Results("bench_rir", torch.device("cpu"), [], tmp_path / "results.json")


def tasks_of(*checks):
    """A row each, whose error a check is to find."""
    row = {"name": "draw", "batch": 2, "compiled": False, "median_s": 1.0, "p10_s": 1.0, "p90_s": 1.0,
           "scenes_per_s": 2.0, "audio_s_per_s": None, "peak_bytes": 0, "error": None}
    return [common.Task("draw", 2, False, lambda check=check: (dict(row), check)) for check in checks]


def test_a_device_that_a_row_has_spoiled_costs_rows_and_not_what_was_measured(tmp_path, monkeypatch, capsys):
    """Of three rows the second cannot even be begun."""
    begun = []

    def release(device):
        begun.append(device)
        if len(begun) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runtime, "release_memory", release)
    results = results_of(tmp_path)
    results.measure(tasks_of(lambda: 1e-7, lambda: 1e-7, lambda: 3e-7))
    assert results.finish() == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row.get("error") for row in rows] == [1e-7, None, 3e-7] and "illegal memory access" in rows[1]["failed"]


def test_errors_that_are_found_outlast_what_ends_the_next(tmp_path):
    results = results_of(tmp_path)

    def interrupted():
        raise KeyboardInterrupt

    results.measure(tasks_of(lambda: 1e-7, interrupted))
    with pytest.raises(KeyboardInterrupt):
        results.finish()
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["error"] for row in content["rows"]] == [1e-7, None] and not content["complete"]


class FakeProfiler(contextlib.nullcontext):
    """What a GPU's would have found in three steps: kernels, and the calls of the CPU that launched them."""

    def key_averages(self):
        kind = [SimpleNamespace(name=name) for name in ("CUDA", "CPU")]
        return [SimpleNamespace(key=key, device_type=kind[cpu], count=count, self_device_time_total=time,
                                is_user_annotation="#" in key)
                for key, cpu, count, time in (("small", 0, 6, 300.0), ("aten::mm", 1, 9, 0.0), ("large", 0, 3, 900.0),
                                              ("Optimizer.step#AdamW.step", 0, 3, 1000.0))]


@pytest.mark.parametrize("gpu", [False, True])
def test_operations_of_a_step(gpu, monkeypatch):
    """As torch's profiler finds them; each call of a kernel is one of a step, whatever the CPU does."""
    device, taken = torch.device("cpu"), []
    steps = SimpleNamespace(run=SimpleNamespace(device=device), take=lambda count: taken.append(count) or [
        torch.ones(300, 300) @ torch.ones(300, 300) + 1 for _ in range(count)])
    if gpu:
        monkeypatch.setattr(runtime, "is_gpu", lambda device: True)
        monkeypatch.setattr(runtime, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.profiler, "profile", lambda activities, acc_events: FakeProfiler(FakeProfiler()))
        assert bench_train.operations(steps, 9) == [
            {"name": "large", "ms": pytest.approx(0.3), "calls": 1, "share": 0.75},
            {"name": "small", "ms": pytest.approx(0.1), "calls": 2, "share": 0.25}]
    else:
        found = bench_train.operations(steps, 2)
        assert len(found) == 2 and found[0]["ms"] >= found[1]["ms"] > 0 and sum(each["share"] for each in found) <= 1
        names = {each["name"]: each["calls"] for each in bench_train.operations(steps, 99)}
        assert names["aten::mm"] == 1 and names["aten::add"] == 1 and names["aten::ones"] == 2
    assert set(taken) == {bench_train.PROFILED}


def test_operations_that_cannot_be_had_cost_a_line(tmp_path, monkeypatch, capsys):
    """As where a GPU's counters are not for everyone."""
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(
        SimpleNamespace(key_averages=list)))
    results = run(bench_train, tmp_path, "--batch", "1", "--seconds", "0", "--compile", "no", "--profile", "3", "--set",
                  *SMALL)
    assert results["complete"] and "operations" not in results["rows"][0]
    assert "no operations of librispeech: torch's profiler saw nothing that the device did\n" in capsys.readouterr().err


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_with_one_batch_simulate_nothing(overlap, monkeypatch):
    """The half of a row's steps that simulation is not part of; they train all the same."""
    simulated, runs = [], []
    monkeypatch.setattr(train, "draw_batch", lambda run, step, draw=train.draw_batch:
                        simulated.append(step) or draw(run, step))
    monkeypatch.setattr(bench_train, "prepare", lambda *arguments, prepare=bench_train.prepare:
                        runs.append(prepare(*arguments)) or runs[-1])
    row, _ = bench_train.measure("librispeech", 1, False, overlap, torch.device("cpu"), 0.0, 1, SMALL)
    steps = bench_train.BURN_IN + common.LEAST_CALLS
    assert row["calls"] == common.LEAST_CALLS and runs[0].step == 2 * steps
    assert simulated == list(range(steps + 1))  # the last one is the batch that is kept


def test_captured_steps_have_no_shares_and_cost_what_they_cost(monkeypatch):
    """On a CPU, where the calls of a graph are plain: first with new rooms, then with one batch."""
    drawn = []
    monkeypatch.setattr(bench_train, "uses_graph", lambda *_: True)
    monkeypatch.setattr(train, "draw_from", lambda *arguments, draw=train.draw_from:
                        drawn.append(None) or draw(*arguments))
    row, _ = bench_train.measure("librispeech", 1, False, False, torch.device("cpu"), 0.0, 1, SMALL,
                                 graph=True)
    assert row["graph"] and row["share"] == {}
    assert row["simulation_cost"] == pytest.approx(1 - row["fixed_step_s"] / row["median_s"])
    steps = runtime.Graphed.WARM_UP + bench_train.BURN_IN + common.LEAST_CALLS
    assert len(drawn) == steps + 1                                      # and the batch that is kept
    table = report.train_table({"rows": [row, {**row, "graph": False, "overlap": True, "share": {
        "simulate": 0.3, "forward": 0.2, "backward": 0.3, "update": 0.1, "wait": 0.25}}]})
    assert ", captured | 1 |" in table[2] and " | - | - | " in table[2] and " | 30 / 20 / 30 / 10 | 25 | " in table[3]


def test_graphs_are_refused_on_a_cpu_by_their_row(tmp_path):
    path = tmp_path / "results.json"
    assert bench_train.main(["--batch", "1", "--seconds", "0", "--compile", "no", "--graph", "yes", "--device", "cpu",
                             "--threads", "1", "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert [row["failed"] for row in rows] == ["ValueError: train.graph must be false or null on a cpu, got true"]


@pytest.fixture
def weights(tmp_path):
    """Of an untrained network."""
    cfg = from_mapping(RunConfig, {
        "model": {"channels": 4, "dim": 16, "depth": 1, "heads": 2}, "features": {"num_bands": 4, "num_delays": 17},
        "train": {"device": "cpu", "steps": 1}, "scene": {"spacing_jitter_m": 0.003}, "rir": {"num_images": [64, 128]},
        "speech": {"clip_s": 1.0, "voices_speakers": 4, "voices_utterances": 2, "voices_duration_s": 1.0}})
    save_checkpoint(tmp_path / "checkpoint.pt", model=build_localizer(cfg), optimizer=None, ema=None, step=7,
                    config=to_mapping(cfg), extra={})
    return str(tmp_path / "checkpoint.pt")


def test_localize_windows_measures_the_rows_that_it_names(weights, tmp_path, monkeypatch, capsys):
    """What stands in a room is what the row says; the front end is told the same, and that of the training."""
    measurement = localize_windows.Measurement(weights, [], 3)
    told, heard = [], []
    monkeypatch.setattr(localize_windows, "tell_spacing", lambda localizer, cfg, spacing: told.append(spacing))
    original = localize_windows.build_eval_set

    def build(*arguments):
        found = original(*arguments)
        mic_pos = found.mixture.scenes.mic_pos
        heard.extend(torch.linalg.vector_norm(mic_pos[:, 1] - mic_pos[:, 0], dim=-1).tolist())
        return found

    monkeypatch.setattr(localize_windows, "build_eval_set", build)
    lengths = []
    monkeypatch.setattr(measurement, "errors", lambda audio, cone: lengths.append(audio.shape[-1]))
    rows = measurement.by_spacing()
    spacings = [0.1 * (1 + percent / 100) for percent in localize_windows.OFF_PERCENT]
    assert [row["off_percent"] for row in rows] == list(localize_windows.OFF_PERCENT)
    assert heard == pytest.approx([spacing for spacing in spacings for _ in range(3)])
    assert told == pytest.approx([x for spacing in spacings for x in (spacing, 0.1)] + [0.1])
    lengths.clear()
    measurement.by_window([0.25, 1.0, 1.5])
    assert lengths == [4000, 16000, 16000, 16000, 24000, 24000]


def test_localize_windows_writes_its_tables(weights, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert localize_windows.main([weights, "--clips", "3", "--windows", "0.25", "1", "--json", str(path)]) == 0
    found, text = json.loads(path.read_text()), capsys.readouterr().out
    assert found["command"] == (f"python -m benchmarks.localize_windows {os.path.basename(weights)} --clips 3 "
                                "--windows 0.25 1")
    assert found["steps"] == 7 and found["clips"] == 3
    home = next(row for row in found["spacing"] if row["off_percent"] == 0)
    assert home["told"] == home["not_told"] == found["window"][1]["as_it_is"] == found["window"][1]["filled"]
    assert found["spacing"][0]["told"] != found["spacing"][0]["not_told"]
    assert found["window"][0]["as_it_is"] != found["window"][0]["filled"]
    for row in found["spacing"]:
        assert f"{row['told']['mae_deg'][0]:.2f} / {row['told']['mae_deg'][1]:.2f} +- " in text
    assert localize_windows.main([weights, "--clips", "3", "--windows", "0.01"]) == 2
    assert capsys.readouterr().err == "error: --windows must be >= 0.032 s, what the network takes, got 0.01\n"
    for name in ("none", "r=1"):                         # whose name is no override either
        assert localize_windows.main([str(tmp_path / name), "--clips", "3"]) == 2
        assert capsys.readouterr().err == (
            "error: weights must be a run, its checkpoint.pt or a folder of ssl_gpu.pretrained, got "
            f"{tmp_path / name}: there is nothing of that name\n")


def test_simulation_benchmark_with_more_microphones_and_sources(tmp_path):
    results = run(bench_simulate, tmp_path, "--batch", "2", "--seconds", "0", "--check", "0", "--arrays", "1x3", "3x1",
                  "--array-batch", "1")
    assert [(row["name"], row["batch"]) for row in results["rows"][-2:]] == [
        ("endless rooms, 1x3", 1), ("endless rooms, 3x1", 1)]
    with pytest.raises(SystemExit):
        bench_simulate.main(["--arrays", "2"])


def test_compiled_rows_are_marked(tmp_path, monkeypatch):
    """By what the compiler is asked for; it takes a minute, so it is not waited for."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    for benchmark, rows in ((bench_rir, 7), (bench_simulate, 6)):
        results = run(benchmark, tmp_path, "--batch", "1", "--seconds", "0", "--check", "0", "--compile", "both")
        assert [row["compiled"] for row in results["rows"]].count(True) == 3 and len(results["rows"]) == rows
        assert asked and all(options["fullgraph"] for options in asked)
        del asked[:]


@pytest.mark.parametrize("benchmark, rows", [(bench_rir, 7), (bench_simulate, 8)])
def test_fused_rows_are_marked_and_asked_for(benchmark, rows, tmp_path, monkeypatch, capsys):
    """Arrays are measured either way, too. On a CPU the numbers are those of the plain path, and so is the error."""
    pytest.importorskip("triton")
    asked, real, ways = [], synthesis.add_kernels, common.ways
    if benchmark is bench_rir:
        monkeypatch.setattr(synthesis, "add_kernels", lambda *args: asked.append(args[-1]) or real(*args))
    else:
        monkeypatch.setattr(SimulatorConfig, "fused_on", lambda self, device: asked.append(self.fused))
    monkeypatch.setattr(common, "ways", lambda args, device: ways(args, torch.device("cuda")))
    arrays = ("--arrays", "1x1") if benchmark is bench_simulate else ()
    results = run(benchmark, tmp_path, "--batch", "1", "--seconds", "0", "--check", "1", "--fused", "both", *arrays)
    fused = [row for row in results["rows"] if row.get("fused")]
    assert len(results["rows"]) == rows and len(fused) == rows // 2 and asked == sorted(asked) and {*asked} == {0, 1}
    assert all(row["error"] < 1e-5 for row in fused if row["name"] in ("render", "endless rooms"))
    assert capsys.readouterr().out.count(", fused |") == len(fused)


def mixtures(batch, us_per_scene, name="endless rooms", compiled=False, peak=2e9, fused=False):
    return {"name": name, "batch": batch, "median_s": 1e-6 * us_per_scene * batch, "compiled": compiled, "fused": fused,
            "scenes_per_s": 1e6 / us_per_scene, "peak_bytes": peak}


def training_row(examples_per_s, cost, overlap, name="original"):
    return {"name": name, "batch": 1024, "bfloat16": True, "compiled": True, "overlap": overlap,
            "scenes_per_s": examples_per_s, "share": {"simulate": 0.3, "wait": 0.01}, "simulation_cost": cost}


def failed_row(name):
    return {"name": name, "batch": 512, "compiled": True, "failed": "OutOfMemoryError: too little of it"}


def test_targets_are_met_or_missed_by_what_was_measured():
    good = {"simulate": {"rows": [mixtures(256, 5.0), mixtures(512, 5.2), mixtures(1024, 5.5, peak=7.9e9),
                                  mixtures(4096, 5.9), mixtures(512, 10.0, "endless rooms, 2x4"),
                                  mixtures(512, 24.0, "endless rooms, 4x4"), mixtures(64, 99.0, "bank of rooms")]},
            "train": {"rows": [training_row(9_000, 0.3, False), training_row(11_000, 0.05, True),
                               training_row(12_000, 0.3, True, "original-fft"), failed_row("original")]}}
    good["simulate"]["rows"].append(failed_row("endless rooms"))
    found = benchmark_all.verdicts(good)
    assert len(found) == 7 and all(verdict.met for verdict in found)
    assert found[0].measured == "192,308 scenes/s, batch 512" and found[1].measured == "7.90 GB"
    assert found[5].measured == "11,000 examples/s, original, batch 1024, compiled, overlapped"
    assert found[6].measured.startswith("5.0 % over steps with one batch (1.0 % waiting, 30.0 %")
    good["train"]["rows"].append({**training_row(13_000, 0.04, False), "graph": True, "share": {}})
    assert [verdict.measured for verdict in benchmark_all.verdicts(good)[5:]] == [
        "13,000 examples/s, original, batch 1024, compiled, captured", "4.0 % over steps with one batch"]
    bad = {"simulate": {"rows": [mixtures(256, 7.0), mixtures(512, 7.1), mixtures(1024, 7.0, peak=8.1e9),
                                 mixtures(4096, 8.5), mixtures(512, 20.0, "endless rooms, 2x4"),
                                 mixtures(512, 40.0, "endless rooms, 4x4")]},
           "train": {"rows": [training_row(9_000, 0.11, True), {**training_row(99_000, 0.0, True), "bfloat16": False}]}}
    found = benchmark_all.verdicts(bad)
    assert not any(verdict.met for verdict in found) and all(verdict.measured for verdict in found)
    fused = {"simulate": {"rows": [mixtures(*row, fused=way) for way, us in ((False, 9.0), (True, 5.0)) for row in (
        (256, us), (512, us), (4096, us), (512, 2 * us, "endless rooms, 2x4"))]}}
    found = benchmark_all.verdicts(fused)
    assert found[0].measured == "200,000 scenes/s, batch 512, fused"
    assert [verdict.measured for verdict in found if "flat" in verdict.target] == [
        "256: 9 us, 512: 9 us, 4096: 9 us", "256: 5 us, 512: 5 us, 4096: 5 us, fused"]
    assert [verdict.measured for verdict in found if "2x4" in verdict.target] == [
        "1.00 times, batch 512", "1.00 times, batch 512, fused"]
    found = benchmark_all.verdicts({})
    assert len(found) == 7 and not any(verdict.met or verdict.measured for verdict in found)
    assert "| not measured | - |" in benchmark_all.summary("a GPU", {"rir": (False, 1.0)}, found)


def broken(monkeypatch, module, name, calls):
    """The calls of a function of those numbers raise; what it did in others, it does."""
    original, count = getattr(module, name), []

    def function(*arguments, **keywords):
        count.append(None)
        if len(count) in calls:
            raise RuntimeError("CUDA error: an illegal | access\nand much more of it")
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("benchmark, arguments, rows, overlap", [
    (bench_rir, ("--batch", "1", "--compile", "both"), 7, {}),
    (bench_simulate, ("--batch", "1", "--arrays", "1x1"), 4, {}),
    (bench_convolve, ("--batch", "1"), 7, {}),
    (bench_train, ("--overlap", "both", "--compile", "no"), 2, {"overlap": True, "graph": False})])
def test_row_that_fails_costs_no_other(benchmark, arguments, rows, overlap, tmp_path, monkeypatch, capsys):
    """The file is there from the first row on, and says of the second what went wrong."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if benchmark is bench_train:
        monkeypatch.setattr(common, "LEAST_CALLS", 1)
        arguments += ("--batch", "1", "--set", *SMALL)
        broken(monkeypatch, bench_train, "readings_of", [3])
    else:
        arguments += ("--check", "0")
        broken(monkeypatch, common, "measure", [2])
    path, lengths = tmp_path / "results.json", []
    monkeypatch.setattr(common, "write_json", lambda path, content, write=common.write_json:
                        write(path, content) or lengths.append(len(json.loads(path_of(path))["rows"])))
    assert benchmark.main([*arguments, "--seconds", "0", "--device", "cpu", "--threads", "1", "--json", str(path)]) == 1
    results = json.loads(path.read_text())
    again = [rows] * (1 + (benchmark is bench_simulate))                # with the floor of the memory
    assert lengths == [*range(1, rows + 1), *again] and results["complete"]
    assert [index for index, row in enumerate(results["rows"]) if "failed" in row] == [1]
    bad, line = results["rows"][1], "RuntimeError: CUDA error: an illegal | access"
    more = {bench_rir: {"fused": False}, bench_simulate: {"fused": False, "graph": False}}.get(benchmark, overlap)
    assert bad == {"name": bad["name"], "batch": 1, "compiled": False, "failed": line, **more}
    assert [bool(row.get("compiled")) for row in results["rows"]] == sorted(bool(row.get("compiled"))
                                                                            for row in results["rows"])
    out, err = capsys.readouterr()
    assert f"failed: {bad['name']}, batch 1: {line}\n" in err
    assert len({line.count("|") for line in out.splitlines() if line.startswith("|")}) == 1
    assert "| failed: RuntimeError: CUDA error: an illegal / access |" in out
    partial = report.markdown({**results, "rows": results["rows"][:1], "complete": False})
    assert "`, stopped before it was done" in partial and "stopped" not in out


def path_of(path):
    """Its text, as another program would find it."""
    return Path(path).read_text()


@pytest.mark.parametrize("error, line", [(lambda: 1 / 0, "ZeroDivisionError: division by zero"),
                                         (lambda: float("nan"), "ValueError: the error against the oracle must be "
                                                                "finite, got nan")])
def test_row_that_cannot_be_compared_keeps_its_times_and_fails(error, line, tmp_path):
    device, timing = torch.device("cpu"), common.Timing(1.0, 1.0, 1.0, 5)
    results = common.Results("bench_rir", device, [], str(tmp_path / "results.json"))
    results.measure([common.Task("render", 2, False, lambda: (common.row("render", 2, timing, 3.0, device), error))])
    assert results.finish() == 1
    row, = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["median_s"], row["error"], row["failed"]) == (1.0, None, line)


def test_file_that_cannot_be_written_ends_the_benchmark_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: cannot write .*: No such file or directory$"):
        common.Results("bench_rir", torch.device("cpu"), [], str(tmp_path / "none" / "results.json")).save()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_every_part_is_a_command_that_its_benchmark_understands(on_gpu, quick, capsys):
    for part in benchmark_all.parts_of(on_gpu, quick)[1:]:
        module = importlib.import_module(part.arguments[1])
        said = refused(module, capsys, *part.arguments[2:], "--device", "gpu")
        assert said.startswith("--device must be auto")                    # past the reading of arguments


def test_all_goes_on_when_a_part_fails_and_says_so(tmp_path, monkeypatch, capfd):
    short = ("--batch", "1", "--seconds", "0", "--check", "0")
    parts = [benchmark_all.Part("broken", ("-c", "import sys; sys.exit(3)")),
             benchmark_all.Part("silent", ("-c", "")), benchmark_all.Part("tests", ("-c", ""), benchmark=False),
             benchmark_all.Part("rir", ("-m", "benchmarks.bench_rir", *short))]
    monkeypatch.setattr(benchmark_all, "parts_of", lambda on_gpu, quick: parts)
    assert benchmark_all.main(["--device", "cpu", "--threads", "1", "--out", str(tmp_path / "new")]) == 1
    assert "failed: broken, silent\n" in capfd.readouterr().err
    results, summary = sorted((tmp_path / "new").iterdir())
    content = json.loads(results.read_text())
    check(content, SIMULATION)
    assert results.name == f"{content['date']}-{content['machine']['slug']}-rir.json"
    text = summary.read_text()
    assert "| broken | FAILED |" in text and "| silent | FAILED |" in text and "| rir | well |" in text
    assert benchmark_all.main(["--device", "cpu", "--only", "tests", "--out", str(tmp_path / "new")]) == 0
    assert results.exists() and "| rir |" not in summary.read_text()
    capfd.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        benchmark_all.main(["--device", "cpu", "--out", str(results)])
    assert capfd.readouterr().err == f"error: --out must be a folder, cannot make {results}: File exists\n"


@pytest.mark.alone
def test_part_that_takes_too_long_is_ended_and_keeps_its_rows(tmp_path, monkeypatch, capfd):
    program = ("import json, sys, time; open(sys.argv[-1], 'w').write(json.dumps({'rows': [1]})); "
               "print('written', flush=True); time.sleep(600)")
    parts = [benchmark_all.Part("slow", ("-c", program)), benchmark_all.Part("tests", ("-c", ""), benchmark=False)]
    monkeypatch.setattr(benchmark_all, "parts_of", lambda on_gpu, quick: parts)
    assert benchmark_all.main(["--device", "cpu", "--out", str(tmp_path), "--limit", "0.05"]) == 1
    out, err = capfd.readouterr()
    assert "written" in out and "slow: ended after --limit 0.05 min\nfailed: slow\n" in err
    results, summary = sorted(tmp_path.iterdir())
    assert json.loads(results.read_text()) == {"rows": [1]}
    assert "| slow | FAILED | 3 |" in summary.read_text() and "| tests | well |" in summary.read_text()


def test_slug_of_a_device():
    assert common.slug("NVIDIA H200") == "nvidia-h200" and common.slug(" AMD (R) EPYC ") == "amd-r-epyc"


def test_traffic_counts_operands_once_and_no_views():
    x, y = torch.zeros(1000), torch.zeros(1, dtype=torch.float64).expand(1000)
    with traffic.Traffic() as counted:
        x.view(10, 100).add_(1)
        x + y
    assert counted.calls == {"add_": 1, "add": 1} and counted.bytes == {"add_": 8000, "add": 4000 + 8 + 8000}


def test_traffic_of_a_batch_grows_with_its_scenes(capsys):
    few, more = traffic.count(2), traffic.count(6)
    assert few.calls == more.calls and few.calls["scatter_add_"] == 16
    assert more.bytes["scatter_add_"] == 3 * few.bytes["scatter_add_"]
    assert traffic.main(["--scenes", "2"]) == 0
    assert f"{few.bytes.total() / 1e9:.3f} GB {few.calls.total():5d} in all\n" in capsys.readouterr().out
    # What was counted on fakes has left no fake behind in the tables.
    mixture = Simulator(rir=bench_simulate.RIR)(torch.zeros(2, 2, 48000), generator=torch.Generator().manual_seed(0))
    assert type(mixture.audio) is torch.Tensor and mixture.audio.isfinite().all()


def test_copy_to_the_device_is_a_row_of_its_own_on_a_gpu(monkeypatch):
    """What the copy takes is added to the RIRs alone, and counted in no other stage."""
    tools, _ = peers.find_tools(["own-models"], torch.device("cpu"))
    assert all(peers.COPIED not in tool.stages for tool in tools)
    scene = peers.Ours(1, torch.device("cpu"), 0).each()[0]
    monkeypatch.setitem(peers.PEERS, "fake", lambda device: [peers.Tool(
        "fake", "cpu", lambda scene: np.zeros((2, 2, 10), np.float32))])
    [tool], _ = peers.find_tools(["fake"], torch.device("cuda"))
    assert tool.stages == (peers.FULL, peers.COPIED, peers.MIXTURE)
    clock = iter([(1.0, 0.5), (10.0, 5.0), (100.0, 50.0)])              # RIRs, mixture, copy

    def timed(function, device):
        return function(), next(clock)

    monkeypatch.setattr(peers, "timed", timed)
    monkeypatch.setattr(peers, "convolve", lambda dry, rirs: dry)       # which needs scipy
    assert peers.time_scene(tool, scene, torch.zeros(2, 100), torch.device("cpu")) == {
        peers.FULL: (1.0, 0.5), peers.COPIED: (101.0, 50.5), peers.MIXTURE: (11.0, 5.5)}


def test_peers_compares_what_it_finds(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    fake_reference(tmp_path, monkeypatch, 100)
    results = run(peers, tmp_path, "--only", "reference", "gpuRIR", "--scenes", "4", "--batch", "2")
    check(results, TIMES | {"stage", "on", "scenes", "refused", "mean_s", "ratio", "ratio_cpu", "target", "met"})
    ours, theirs = results["rows"][:3], results["rows"][3:]
    assert [row["stage"] for row in ours] == [row["stage"] for row in theirs] == [peers.BOTH, peers.FULL, peers.MIXTURE]
    assert [row["scenes"] for row in theirs] == [4, 4, 4] and [row["refused"] for row in theirs] == [0, 0, 0]
    assert [row["target"] for row in theirs] == [20, 20, 14]
    for mine, other in zip(ours, theirs):  # the fake one takes no time at all, so it wins, and that is what is said
        assert other["ratio"] == pytest.approx(other["mean_s"] / mine["mean_s"]) and other["ratio"] < 1
        assert other["met"] is False
    assert results["skipped"] == {"gpuRIR": "it needs a GPU"}
    assert "Skipped: gpuRIR, it needs a GPU." in report.markdown(results)


def test_peers_counts_refused_scenes_for_neither(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    fake_reference(tmp_path, monkeypatch, 6)
    tool, = peers.reference(torch.device("cpu"))
    ours = peers.Ours(8, torch.device("cpu"), 0)
    short = sum(scene.room_dim[0] <= 6 for scene in ours.each())
    assert 0 < short < 8
    assert peers.compare(tool, ours, record=True, patience=60) is None
    assert tool.taken == [short] and tool.refused == 8 - short and len(tool.times[peers.FULL]) == short
    theirs = sum(wall for wall, _ in tool.times[peers.FULL])
    (call,), = tool.ours[peers.FULL]
    assert tool.ratio(peers.FULL, 0) == pytest.approx(theirs / (short * call[0]))


def test_peers_lose_patience_within_a_batch(tmp_path, monkeypatch):
    """On a clock that a scene takes 10 s of: two of eight are taken and a third ends it, for the tool and for ours."""
    pytest.importorskip("scipy")
    fake_reference(tmp_path, monkeypatch, 100)
    monkeypatch.setattr(peers, "time_scene", lambda tool, *_: {stage: (10.0, 10.0) for stage in tool.stages})
    monkeypatch.setattr(peers.Ours, "run", lambda ours, stage: (8.0, 8.0))
    results = run(peers, tmp_path, "--only", "reference", "--scenes", "16", "--batch", "8", "--patience", "25")
    theirs = results["rows"][-1]
    assert (theirs["scenes"], theirs["refused"], theirs["ratio"]) == (3, 0, pytest.approx(10.0))
    assert results["stopped"] == {"FRA-RIR, the reference": "out of patience (25 s) after 3 scenes"}
    assert "Stopped: FRA-RIR, the reference, out of patience (25 s) after 3 scenes." in report.markdown(results)


def test_peers_keeps_what_it_has_after_every_batch(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    fake_reference(tmp_path, monkeypatch, 100)
    broken(monkeypatch, peers.Ours, "each", [3])  # the first is to warm up
    with pytest.raises(RuntimeError):
        run(peers, tmp_path, "--only", "reference", "--scenes", "4", "--batch", "2")
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["complete"] and [row["scenes"] for row in results["rows"][3:]] == [2, 2, 2]


def test_peers_says_why_the_reference_is_left_out(tmp_path, monkeypatch):
    monkeypatch.delenv("FRA_RIR_PATH", raising=False)
    assert peers.find_tools(["reference"], torch.device("cpu"))[1] == {
        "reference": "the environment variable FRA_RIR_PATH is not set"}
    (tmp_path / "FRAM_RIR.py").write_text("1 / 0")
    monkeypatch.setenv("FRA_RIR_PATH", str(tmp_path))
    assert peers.find_tools(["reference"], torch.device("cpu"))[1] == {
        "reference": "ZeroDivisionError at import: division by zero"}


def test_results_name_no_folder(tmp_path):
    results = run(bench_rir, tmp_path, "--batch", "1", "--seconds", "0", "--check", "0")
    assert str(tmp_path) not in json.dumps(results)
    assert results["command"] == ("python -m benchmarks.bench_rir --batch 1 --seconds 0 --check 0 --device cpu "
                                  "--threads 1")


def test_report_takes_the_newest_of_each_kind(tmp_path):
    results = run(bench_rir, tmp_path, "--batch", "1", "--seconds", "0", "--check", "0")
    (tmp_path / "results.json").unlink()
    for date in ("2026-01-02", "2026-01-10"):
        (tmp_path / f"{date}-cpu-rir.json").write_text(json.dumps({**results, "date": date}))
    other = {**results, "machine": {**results["machine"], "threads": 2}, "date": "2026-01-05"}
    (tmp_path / "2026-01-05-cpu2-rir.json").write_text(json.dumps(other))
    gpu = {**results, "machine": {**results["machine"], "gpu": True}, "date": "2026-01-20"}
    (tmp_path / "2026-01-20-gpu-rir.json").write_text(json.dumps(gpu))
    assert [found["date"] for found in report.newest(tmp_path, False)] == ["2026-01-10", "2026-01-05"]
    assert [found["date"] for found in report.newest(tmp_path, True)] == ["2026-01-20"]
    row = results["rows"][0]
    for date, names in (("2026-02-01", "a"), ("2026-02-02", "b"), ("2026-02-03", "ab"), ("2026-02-04", "a")):
        steps = {**gpu, "benchmark": "bench_train", "date": date, "rows": [{**row, "name": name} for name in names]}
        (tmp_path / f"{date}-gpu-train.json").write_text(json.dumps(steps))
    assert [found["date"] for found in report.newest(tmp_path, True)] == ["2026-01-20", "2026-02-03", "2026-02-04"]


def test_report_writes_and_checks_the_tables(tmp_path, capsys):
    run(bench_rir, tmp_path, "--batch", "1", "--seconds", "0", "--check", "0")
    readme, where = tmp_path / "README.md", ["--results", str(tmp_path)]
    readme.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    assert report.main([*where, "--check", str(readme)]) == 1
    assert report.main([*where, "--write", str(readme)]) == 0
    assert report.main([*where, "--check", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| draw and render | 1 |" in text
    for wrong, problem in (("no markers\n", "a pair of markers"),
                           ("<!-- other:begin -->\n<!-- other:end -->\n", "got other")):
        readme.write_text(wrong)
        assert report.main([*where, "--write", str(readme)]) == 2
        assert readme.read_text() == wrong and problem in capsys.readouterr().err


def test_recipes_are_told_with_what_they_took(tmp_path):
    runs = [recipe for recipe in accuracy_tables.RECIPES if recipe.name]
    before = accuracy_tables.RECIPES[0].after
    for number, recipe in enumerate([*runs, *(recipe for recipe in before if recipe not in runs)]):
        evaluation, result = recipe.files(tmp_path)
        errors = {name: {"cone_mae_deg": [number, 0.5]} for name in accuracy_tables.RECIPE_SETS}
        evaluation.write_text(json.dumps(errors))
        result.write_text(json.dumps({"minutes": 59.14, "device": "AMD EPYC", "precision": "float32",
                                      "examples": 1000 * number}))
    rows = accuracy_tables.recipes(tmp_path).splitlines()[2:]
    assert "packaged" in rows[0] and len(rows) == len(accuracy_tables.RECIPES)
    last = json.loads((accuracy_tables.PACKAGED / accuracy_tables.RESULT).read_text())
    assert rows[0].split(" | ")[1] == (
        "59.1 of an AMD EPYC, float32, then 59.1 of one or two cores of an AMD EPYC, float32, then "
        f"{last['minutes']:.1f} of two cores of an {last['device']}, {last['precision']}")
    assert rows[3].split(" | ")[1:] == ["59.1 of two slow cores of an AMD EPYC, float32", "2,000",
                                        *["2.00 / 0.50"] * 3, "2.00 / 0.50 |"]


def test_published_tables_are_those_of_the_results():
    pages = "README.md", "docs/accuracy.md", "docs/masks.md", "docs/performance.md"
    assert report.main(["--check", *(str(common.ROOT / name) for name in pages)]) == 0
    for gpu in (False, True):
        tables = report.report(report.RESULTS, gpu)
        assert all(results["commit"] in tables for results in report.newest(report.RESULTS, gpu))


def test_mixtures_of_a_gpu_side_by_side(tmp_path):
    """A launch per kernel beside captured ones, kind by kind; what failed, and what only one way has, are dashes."""
    rows = [{"name": name, "batch": batch, "fused": True, "compiled": False, "graph": graph, "peak_bytes": peak << 20,
             "reserved_bytes": 2 * peak << 20, "scenes_per_s": rate} for name, batch, graph, peak, rate in (
        ("rooms", 256, False, 3, 1000.0), ("noise", 256, False, 3, 900.0), ("rooms", 512, False, 5, 1500.0),
        ("rooms", 256, True, 1, 2000.0))] + [{"name": "rooms", "batch": 512, "fused": True, "compiled": False,
                                              "graph": True, "failed": "no"}]
    results = {"benchmark": "bench_simulate", "machine": {"device": "GPU", "gpu": True, "threads": 1}, "date": "today",
               "versions": {"torch": "2"}, "commit": "abc", "command": "python -m it", "rows": rows}
    (tmp_path / "2026-01-20-gpu-simulate.json").write_text(json.dumps(results))
    assert report.gpu_short(tmp_path).splitlines()[2:5] == [
        "| rooms | 256 | 1,000 | 2,000 | 3 | 2 |", "| rooms | 512 | 1,500 | - | 5 | - |",
        "| noise | 256 | 900 | - | 3 | - |"]
    assert report.gpu_short(tmp_path).endswith("`python -m it`")
    results["rows"] = [row for row in rows if row["graph"]]
    (tmp_path / "2026-01-20-gpu-simulate.json").write_text(json.dumps(results))
    assert report.gpu_short(tmp_path).splitlines()[:3] == [
        "| mixtures/s | batch | one CUDA graph | MiB, one CUDA graph |", "| --- | ---: | ---: | ---: |",
        "| rooms | 256 | 2,000 | 2 |"]
    other = {**results, "date": "tomorrow", "rows": [{**row, "name": "rooms, 2x4"} for row in results["rows"][:1]]}
    (tmp_path / "2026-01-21-gpu-simulate.json").write_text(json.dumps(other))
    assert "2x4" not in report.gpu_short(tmp_path) and "| rooms | 256 | 2,000 | 2 |" in report.gpu_short(tmp_path)
    other["rows"] *= len(results["rows"])                               # as many rows, and newer
    (tmp_path / "2026-01-21-gpu-simulate.json").write_text(json.dumps(other))
    assert "| rooms, 2x4 | 256 | 2,000 | 2 |" in report.gpu_short(tmp_path)


def test_simulators_on_cpus_side_by_side(tmp_path):
    """RIRs beside mixtures, machine by machine; of a GPU and of other stages nothing, what was not measured a dash."""
    def row(name, stage, mean, ratio):
        return {"name": name, "stage": stage, "scenes": 1234, "mean_s": mean, "ratio": ratio}

    rows = [row("ours", peers.BOTH, 3e-3, None), row("ours", peers.FULL, 2e-3, None),
            row("ours", peers.MIXTURE, 4e-3, None), row("theirs", peers.FULL, 0.1, 50.0)]
    results = {"benchmark": "peers", "machine": {"device": "CPU", "threads": 1}, "date": "today", "commit": "abc",
               "command": "python -m it", "rows": rows}
    (tmp_path / "2026-01-20-cpu-peers.json").write_text(json.dumps(results))
    gpu = {**results, "machine": {"device": "GPU", "gpu": True, "threads": 1}}
    (tmp_path / "2026-01-21-gpu-peers.json").write_text(json.dumps(gpu))
    other = {**results, "machine": {"device": "another", "threads": 2}, "rows": rows[3:], "complete": False}
    (tmp_path / "2026-01-22-other-peers.json").write_text(json.dumps(other))
    assert report.cpu_short(tmp_path).splitlines()[2:] == [
        "| ours | CPU | 1,234 | 2 | 4 | - | - |", "| theirs | CPU | 1,234 | 100 | - | 50 | - |",
        "| theirs | another | 1,234 | 100 | - | 50 | - |", "", "CPU, 1 CPU thread, commit abc, today: `python -m it`",
        "", "another, 2 CPU threads, commit abc, today: `python -m it`, stopped before it was done"]
    assert report.SHORT_STAGES == (peers.FULL, peers.MIXTURE)


def result_of(cone, azimuth, rooms=0, talkers=0):
    """What evaluation of one set writes, as far as the tables need it."""
    row = {"num_clips": 2000, "cone_mae_deg": [cone] * 2, "azimuth_class_mae_deg": [azimuth] * 2, "both_at_10": 0.9,
           "interval_95": {"cone_mae_deg": [[1, 2]] * 2}, "cone_median_deg": 1.0,
           **{f"acc_at_{limit}": 0.5 for limit in (5, 10, 15)}}
    return {**row, "baseline": row, "baseline_mean": row, "chance": row, "set_version": 1,
            "floor": {"exact_cone": [6.8, 6.9], "exact_cone_and_distance": [6.6, 6.7]}, "eval_digest": f"{cone}abc",
            "leaked_rooms": rooms, "leaked_talkers": talkers}


def test_tables_mark_what_is_leaked():
    """By rooms or by talkers; the baselines know nothing of either."""
    results = {"e1": result_of(2, 7), "e1n5": result_of(3, 8, talkers=1), "e2": result_of(4, 9, rooms=5),
               "e3": result_of(5, 10, talkers=None)}
    for table in (accuracy_tables.evaluation(results), accuracy_tables.short(results)):
        rows = [line for line in table.splitlines() if line.startswith(("| **e", "| e1", "| e2", "| e3"))]
        assert ["LEAKED" in row.split("|")[1] for row in rows] == [False, True, True, False]
        assert table.count("LEAKED") == 2


def test_targets_are_met_by_both_angles_or_missed(tmp_path):
    """One angle alone meets none, nor does a mean; a share may miss by itself."""
    names = {"e1": 1.1, "e1n5": 4.9, "e2": 3.0, "e3": 2.5}
    results = {name: {**result_of(cone, 7), "acc_at_10": 0.99} for name, cone in names.items()}
    results["e0b"] = result_of(1, 7)
    hour = {"minutes": 59, "steps_before": 0, "device": "AMD EPYC"}
    minutes = {"minutes": 9.5, "steps_before": 0, "device": "NVIDIA card"}

    def write(name, cone, run, share=0.99):
        for kind in ("evaluation", "result"):
            row = {**result_of(cone, 7), "acc_at_10": share}
            (tmp_path / f"{kind}-{name}.json").write_text(json.dumps({"e1": row, **run}))

    for name in accuracy_tables.HOURS:
        write(name, 2.4, hour)
    write(accuracy_tables.GPU_RUN, 1.3, minutes)

    def table(size=5e6, parameters=2.5e6):
        rows = accuracy_tables.targets(results, {"parameters": parameters}, int(size), tmp_path).splitlines()[2:]
        return [tuple(row.strip("| ").split(" | ")) for row in rows]

    said = dict(table())
    assert said["cone MAE on e1 at most 2.0 (aim 1.2), 98 % within 10 degrees"] == \
        "1.10 / 1.10, 99.0 %: met, the aim too"
    assert said["cone MAE on e2 at most 4.0 (aim 2.5)"] == "3.00 / 3.00: met"
    assert said["azimuth class MAE on e0b within 1.0 of its floor"] == "7.00 / 7.00 with 6.60 / 6.70: met"
    quick = "within 10 minutes on a GPU, cone MAE on e1 at most 2.0 (aim 1.2), 98 % within 10 degrees"
    assert said[quick] == (
        "the H200 weights, 1.30 / 1.30, 99.0 % after 9.5 minutes from nothing, NVIDIA card: met "
        "([evaluation](results/evaluation-h200-patches.json), [result.json](results/result-h200-patches.json))")
    assert said["at most 3 M parameters, 6 MB of weights"] == "2.50 M, 5.0 MB: met"
    of_hours = "within an hour on two CPU cores, cone MAE on e1 at most 2.5"
    assert said[of_hours].count("2.40 / 2.40 after 59.0 minutes from nothing: met") == 3
    for changed in (dict(parameters=3.1e6), dict(size=6.1e6)):
        assert sum("missed" in text for _, text in table(**changed)) == 1, changed
    for cone, changed in ((1.3, {"minutes": 10.1}), (1.3, {"steps_before": 9}), (1.3, {"device": "AMD"}), (2.1, {})):
        write(accuracy_tables.GPU_RUN, cone, {**minutes, **changed})
        assert [what for what, text in table() if "missed" in text] == [quick], changed
    write(accuracy_tables.GPU_RUN, 1.3, minutes, share=0.9796)
    assert "1.30 / 1.30, 97.96 % after 9.5 minutes from nothing, NVIDIA card: **missed**" in dict(table())[quick]
    write(accuracy_tables.GPU_RUN, 1.3, {**minutes, "minutes": 10.04})
    assert "99.0 % after 10.04 minutes from nothing, NVIDIA card: **missed**" in dict(table())[quick]
    write(accuracy_tables.GPU_RUN, 1.3, minutes)
    for cone, changed in ((2.4, {"minutes": 61}), (2.4, {"steps_before": 9}), (2.4, {"device": "NVIDIA"}), (2.6, {})):
        write("masks-hour", cone, {**hour, **changed})
        assert dict(table())[of_hours].count("**missed**") == 1, changed
        assert sum("missed" in text for _, text in table()) == 1
    write("masks-hour", 2.4, hour)
    results["e1n5"]["cone_mae_deg"], results["e3"]["cone_mae_deg"] = [5.1, 4.6], [1.9, 2.1]
    said = dict(table())
    assert said["cone MAE on e1n5 at most 5.0"] == \
        "5.10 / 4.60: **missed** by the smaller angle; 4.850 in the mean of both"
    of_rooms = "cone MAE on e3 at most 3.0 (aim 2.0), 96 % within 10 degrees"
    assert said[of_rooms] == "1.90 / 2.10, 99.0 %: met, the aim for the smaller angle only"
    results["e1n5"]["cone_mae_deg"], results["e3"]["acc_at_10"] = [5.0004, 4.6], 0.9596
    said = dict(table())
    assert said["cone MAE on e1n5 at most 5.0"].startswith("5.0004 / 4.6000: **missed** by the smaller angle")
    assert said[of_rooms] == "1.90 / 2.10, 95.96 %: **missed** by the share"
    results["e1n5"]["cone_mae_deg"], results["e3"]["acc_at_10"] = [5.0 + 1e-15, 4.6], 0.96 - 1e-16
    results["e3"]["cone_mae_deg"] = [2.004, 1.9996]
    said = dict(table())
    assert said["cone MAE on e1n5 at most 5.0"] == "5.00 / 4.60: met"
    assert said[of_rooms] == "2.0040 / 1.9996, 96.0 %: met, the aim for the larger angle only"
    results["e1n5"]["cone_mae_deg"], results["e3"]["cone_mae_deg"] = [5.1, 4.6], [1.9, 2.1]
    results["e3"]["acc_at_10"], results["e0b"]["azimuth_class_mae_deg"] = 0.95, [7.0, 7.8]
    results["e1"]["cone_mae_deg"] = [2.1, 2.2]
    said = dict(table())
    assert [what for what, text in said.items() if "**missed**" in text] == [
        quick.split(", ", 1)[1], "cone MAE on e1n5 at most 5.0", of_rooms,
        "azimuth class MAE on e0b within 1.0 of its floor"]
    assert said[of_rooms] == "1.90 / 2.10, 95.0 %: **missed** by the share"
    assert said[quick.split(", ", 1)[1]] == \
        "2.10 / 2.20, 99.0 %: **missed** by both angles; 2.150 in the mean of both"


def test_a_table_of_ablations_does_not_lose_its_rows_with_its_file(tmp_path):
    with pytest.raises(ValueError, match="^the table of ablations needs .*none.jsonl, which is not there$"):
        accuracy_tables.ablations(tmp_path / "none.jsonl")


def test_leak_is_a_table_in_order_or_a_line(tmp_path):
    assert accuracy_tables.leak(tmp_path) == "These runs have not been made yet."
    for name, e0, rooms in (("law-300", 9, 0), ("original-300", 6, 200)):
        results = {"e0": result_of(1, e0, rooms=rooms), "e0b": result_of(1, 7)}
        (tmp_path / f"leak-{name}.json").write_text(json.dumps(results))
    lines = accuracy_tables.leak(tmp_path).splitlines()
    assert lines[2:] == [
        "| small network, 300 of the original's rooms, with e0's 200 | 6.00 / 6.00, LEAKED | 7.00 / 7.00 | 200 |",
        "| small network, 300 other rooms of the law | 9.00 / 9.00 | 7.00 / 7.00 | 0 |", "",
        "Floors: 6.6 / 6.7 on e0 and 6.6 / 6.7 on e0b."]


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    for main, status, line in ((interrupted, 130, "interrupted\n"), (lambda: 1, 1, "")):
        with pytest.raises(SystemExit) as end:
            end_with(main)
        assert end.value.code == status and capsys.readouterr().err == line
    texts = {path: path.read_text() for path in Path(report.__file__).parent.glob("*.py")}
    commands = {path for path, text in texts.items() if "\ndef main(" in text}
    assert len(commands) > 10
    assert all(texts[path].endswith('\nif __name__ == "__main__":\n    end_with(main)\n') for path in commands)


def test_a_benchmark_that_is_interrupted_says_so(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssl_gpu.scene.sample_scenes", interrupted)
    monkeypatch.setattr(sys, "argv", ["floors"])
    monkeypatch.delitem(sys.modules, "benchmarks.floors")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("benchmarks.floors", run_name="__main__")
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_results_name_their_command_without_places(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    words = ["--json", "x y.json", f"speech.eval={folder}", "--batch", "2", "scene.rt60_s=[0.1,0.7]", str(folder)]
    assert common.told_command("masks", words) == (
        "python -m benchmarks.masks 'speech.eval=a folder' --batch 2 'scene.rt60_s=[0.1,0.7]' 'a folder'")
    assert common.told_command("masks", ["--json=x", "--seconds=2"]) == "python -m benchmarks.masks --seconds=2"
    (tmp_path / "r=1").mkdir()
    (tmp_path / "link").symlink_to(folder)
    words = [str(tmp_path / "r=1"), f"speech.eval={tmp_path}/r=1", f"speech.eval={tmp_path / 'link'}"]
    assert common.told_command("masks", words) == "python -m benchmarks.masks r=1 speech.eval=r=1 speech.eval=link"


def test_unknown_device_is_one_line(capsys):
    assert refused(bench_rir, capsys, "--device", "gpu") == "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"


def test_ablations_train_and_judge_each_variant_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "COUNTS", {"e1": 3})
    monkeypatch.setattr(ablations, "QUIET", (*ablations.QUIET, "eval.num_clips=2", "train.device=cpu", *SMALL))
    path, speech = tmp_path / "found.jsonl", ["speech.voices_speakers=4", "speech.voices_utterances=1"]
    trained, real = [], ablations.train
    monkeypatch.setattr(ablations, "train", lambda arguments: trained.append(arguments) or real(arguments))
    asked = [*speech, "--out", str(path), "--steps", "1", "--variants", "recipe", "azimuth", "--seeds", "0", "1"]
    assert ablations.main(asked) == 0
    rows = ablations.read(path)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in ("recipe", "azimuth")]
    assert list(rows[0]["scores"]) == list(ablations.READINGS) and list(rows[1]["scores"]) == [""]
    assert rows[0]["scores"][""] != rows[0]["scores"]["argmax"] and "target.angle=azimuth" in rows[1]["overrides"]
    assert rows[0]["scores"][""] != rows[2]["scores"][""]
    before = path.read_text()
    assert ablations.main(asked) == 0 and path.read_text() == before    # nothing is done twice
    assert len(trained) == 4 and all("train.steps=2" in arguments for arguments in trained)  # of 16 mixtures
    other = ["--steps", "1", "--variants", "batches of 32", "--out", str(tmp_path / "32.jsonl"), "--plain"]
    assert ablations.main([*speech, *other]) == 0
    assert [list(row["scores"]) for row in ablations.read(tmp_path / "32.jsonl")] == [[""]]
    assert "train.steps=1" in trained[-1]                               # as many mixtures
    assert ablations.recipe_digest("azimuth", speech) == rows[1]["recipe"] != rows[0]["recipe"]
    assert ablations.recipe_digest("azimuth", [*speech, "train.lr=1e-3"]) != rows[1]["recipe"]  # another recipe's rows
    capsys.readouterr()
    assert ablations.main(["--table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    means = [sum(row["scores"][""]["e1"]["cone_mae_deg"]) / 2 for row in (rows[1], rows[3])]
    assert lines[-1].startswith(f"| azimuth | 2 | {sum(means) / 2:.2f} ({min(means):.2f} to {max(means):.2f}) | ")
    assert len(lines) == 2 + len(ablations.READINGS) + 1
    assert ablations.main(["--table", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: --table must be a file of such results, got {tmp_path / 'none'}\n"


ROW = '{"variant": "recipe", "seed": 0, "steps": 1, "scores": {}}\n'
LINE_RULE = "must be a JSON mapping with variant, seed, steps, scores, got "


@pytest.mark.parametrize("content, message", [
    (ROW + ROW[:31] + "\n", ", line 2 " + LINE_RULE + "'{\"variant\": \"recipe\", \"seed\": 0'"),
    (ROW + ROW + "\n", ", line 3 " + LINE_RULE + "''"), ("[1]\n", ", line 1 " + LINE_RULE + "'[1]'"),
    ('{"variant": "recipe", "seed": 0}\n', ", line 1 " + LINE_RULE + "'{\"variant\": \"recipe\", \"seed\": 0}'"),
    ("\udcff\n", ", line 1 " + LINE_RULE + "'\N{REPLACEMENT CHARACTER}'")])
def test_ablations_name_a_bad_line_before_they_train(content, message, tmp_path, monkeypatch, capsys):
    """The table of such a file names it, too."""
    monkeypatch.setattr(ablations, "Sets", unwanted)
    path = tmp_path / "found.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    for option in ("--out", "--table"):
        assert ablations.main([option, str(path)]) == 2
        assert capsys.readouterr().err == f"error: {path}{message}\n"
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_ablations_find_a_bad_file_before_they_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "Sets", unwanted)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, reason in (("", "Is a directory"), ("/none/a.jsonl", "No such file or directory")):
        assert ablations.main(["--out", f"~{text}"]) == 2
        assert capsys.readouterr().err == ("error: --out must be a file that can be appended to, got "
                                           f"{tmp_path}{text}: {reason}\n")


def unwanted(*_):
    raise AssertionError("no work is to be done")


@pytest.mark.parametrize("benchmark, work", [(floors, "truth_of"), (localize_windows, "Measurement")])
def test_a_file_that_cannot_be_written_is_found_before_the_work(benchmark, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, work, unwanted)
    try:
        status = benchmark.main(["--json", str(tmp_path / "none" / "a.json")])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert capsys.readouterr().err == ("error: --json must be a file in an existing folder, got "
                                       f"{tmp_path}/none/a.json\n")


def test_floors_are_those_of_scoring_on_other_scenes_than_e1s(monkeypatch, tmp_path, capsys):
    """Knowing the distances, too, helps; and of every draw there is a pair."""
    monkeypatch.setattr(floors, "NUM_CLIPS", 300)
    path = tmp_path / "floors.json"
    assert floors.main(["--draws", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["azimuth_class_mae_deg"]
    assert [len(values) for values in found.values()] == [2, 2]
    for exact, both in zip(found["exact_cone"], found["exact_cone_and_distance"]):
        assert 4 < sum(both) / 2 < sum(exact) / 2 < 9
    assert found["exact_cone"][0] != found["exact_cone"][1]
    assert "exact_cone_and_distance: mean " in capsys.readouterr().out


def test_lanes_take_turns_with_threads(monkeypatch, capsys):
    monkeypatch.setattr(lanes, "prepare", lambda name, batch, device, more: bench_train.prepare(
        name, 2, device, [*more, *SMALL]))
    drawn, draw = [], train.draw_examples
    monkeypatch.setattr(train, "draw_examples", lambda run, step: (drawn.append(step), draw(run, step))[1])
    assert lanes.main(["--cores", "2", "--steps", "1"]) == 0
    assert sorted(drawn) == sorted([*range(6), *range(4)])               # in lanes a batch ahead, each once
    lines = capsys.readouterr().out.splitlines()
    assert [line[:19].strip() for line in lines] == ["2 threads", "2 lanes", "1 thread"]
    assert all(float(line.split()[-6]) > 0 for line in lines)                           # ms


def test_lanes_measure_a_compiled_network_too(monkeypatch, capsys):
    monkeypatch.setattr(lanes, "prepare", lambda name, batch, device, more: bench_train.prepare(
        name, 2, device, [*more, *SMALL]))
    asked = []

    def compiled(function, enabled=True):
        if isinstance(function, torch.nn.Module):
            asked.append(enabled)
        return function

    monkeypatch.setattr(lanes.runtime, "compiled", compiled)
    assert lanes.main(["--cores", "2", "--steps", "1", "--compile"]) == 0
    names = [line[:19].strip() for line in capsys.readouterr().out.splitlines()]
    assert names == [name + more for more in ("", ", compiled") for name in ("2 threads", "2 lanes", "1 thread")]
    assert asked == [False, True]


def test_no_cpu_captures_a_batch(capsys):
    said = refused(bench_simulate, capsys, "--device", "cpu", "--graph", "both")
    assert said == "--graph must be no on a cpu, got both"


@pytest.mark.parametrize("benchmark", [bench_rir, bench_simulate])
def test_no_cpu_runs_triton_kernels(benchmark, capsys):
    """Its rows would be called fused, and their times would be those of the plain path."""
    assert refused(benchmark, capsys, "--device", "cpu", "--fused", "yes") == "--fused must be no on a cpu, got yes"


@pytest.mark.parametrize("option, value, rule", [
    ("--check", "-1", ">= 0, got -1"), ("--seconds", "nan", ">= 0, got nan"), ("--batch", "0", ">= 1, got 0")])
def test_what_cannot_be_measured_is_refused(option, value, rule, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        bench_rir.main([option, value])
    assert capsys.readouterr().err == (f"error: argument {option}: must be {rule}; options are listed by python -m "
                                       "benchmarks.bench_rir --help\n")


def refused(benchmark, capsys, *arguments):
    """What a benchmark that ends with status 2 says after `error: `."""
    with pytest.raises(SystemExit, match="^2$"):
        benchmark.main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said[7:-1]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_rir, "tasks", None)
    with pytest.raises(SystemExit) as error:
        bench_rir.main(["--device", "cpu", "--json", str(tmp_path / "nowhere" / "a.json")])
    assert error.value.code == 2
    assert "--json must be a file in an existing folder" in capsys.readouterr().err


@pytest.mark.parametrize("older", ["2026-01-01", "2026-03-03"])
def test_what_is_said_of_peers_stands_once_and_as_it_was_said_last(older, tmp_path):
    """Two files of two machines, whose words changed in between, whichever table comes first."""
    results = json.loads((common.ROOT / "benchmarks" / "results" / "2026-11-27-amd-epyc-peers.json").read_text())
    for number, date in enumerate((older, "2026-02-02")):
        text = {**results, "date": date, "notes": f"said on {date}",
                "machine": {**results["machine"], "device": f"CPU {number}"}}
        (tmp_path / f"{number}.json").write_text(json.dumps(text))
    found = report.report(tmp_path)
    assert found.count("### Other simulators") == 2 and found.count("said on") == found.count(
        f"said on {max(older, '2026-02-02')}") == 1
