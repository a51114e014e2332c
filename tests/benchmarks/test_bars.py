"""The verdicts on the bars, from made-up rows."""

import copy

import pytest

from benchmarks import bars, budget, network, roofline_report

FORMS = [("fp32", "contiguous"), ("fp32", "channels_last"), ("bf16", "contiguous"), ("bf16", "channels_last")]


def run():
    """A run in which every bar is met."""
    rows, passes = [], []
    for dtype, form in FORMS:
        for shape, small, mb in (("64x256x56x56", False, 102.8), ("64x2048x7x7", True, 12.8)):
            facts = {"case": f"{shape} {dtype} {form}", "dtype": dtype, "format": form, "mb": mb, "small": small}
            common = {**facts, "clock": "graph replay", "vs_peer": None, "error_y": 1e-3, "error_dx": 1e-3}
            common |= {"kernels_forward": 4, "kernels_backward": 4}
            slow = {"forward_of_floor": 0.5, "backward_of_floor": 0.5}
            rows.append({**common, **slow, "name": "torch", "ratio": 1.0})
            if small:
                rows.append({**common, **slow, "name": "torch compiled", "ratio": 0.95, "kernels_forward": 9})
            for name in bars.NORMS:
                rows.append({**common, "name": name, "ratio": 0.9, "forward_of_floor": 0.85, "backward_of_floor": 0.86})
            rows.append({**common, **slow, "name": "bnet", "ratio": 1.3, "vs_peer": 0.6})
            passes += [{**facts, "name": name, "of_copy": 0.9} for name in ("moments", "apply", "combine")]
            passes.append({**facts, "name": "sums", "of_copy": 0.1})
    steps = [
        {"case": f"resnet50 {mode}", "name": name, "ratio": ratio}
        for mode in network.MODES
        for name, ratio in (("torch", 1.0), ("sn", 1.03), ("afn", 3.0))
    ]
    return rows, passes, steps


def judged(rows, passes, steps):
    return {b["bar"]: b for b in bars.verdicts(rows, passes, steps)}


def only(bars, verdict):
    return [bar for bar, b in bars.items() if b["verdict"] == verdict]


def test_met():
    bars = judged(*run())
    assert only(bars, "met") == list(bars)
    assert len(bars) == 2 + 2 + 8 + 1 + 1 + 1 + 1 + 2
    assert bars["sn: at most 1.00 x nn.BatchNorm2d"]["figure"] == 0.9
    assert bars["7 x 7, CUDA graphs: at most torch.compile's BatchNorm"]["figure"] == pytest.approx(0.9 / 0.95)


CHANGES = [
    ("apply: at least 85 % of the copy", 1, "apply", "of_copy", 0.84, 0.84),
    ("combine: at least 85 % of the copy", 1, "combine", "of_copy", 0.2, 0.2),
    ("forward: at least 80 % of the floor of 3 passes", 0, "cn", "forward_of_floor", 0.79, 0.79),
    ("backward: at least 80 % of the floor of 5 passes", 0, "in", "backward_of_floor", 0.7, 0.7),
    ("gn: at most 1.00 x nn.BatchNorm2d", 0, "gn", "ratio", 1.01, 1.01),
    ("bnet: at most 0.65 x BatchNorm and depthwise convolution", 0, "bnet", "vs_peer", 0.66, 0.66),
    ("resnet50 step with sn: at most 1.05 x BatchNorm's", 2, "sn", "ratio", 1.06, 1.06),
    ("error against float64: at most nn.BatchNorm2d's", 0, "dbn", "error_dx", 2e-3, 2.0),
    ("forward: at most 4 kernels", 0, "rbn", "kernels_forward", 5, 5),
    ("backward: at most 5 kernels", 0, "bnet", "kernels_backward", 6, 6),
]


@pytest.mark.parametrize(("bar", "table", "name", "field", "value", "figure"), CHANGES, ids=lambda v: str(v)[:24])
def test_one_miss_is_enough(bar, table, name, field, value, figure):
    parts = copy.deepcopy(run())
    row = [r for r in parts[table] if r["name"] == name][-1 if table == 2 else -2]  # not the small map
    row[field] = value
    bars = judged(*parts)
    assert only(bars, "not met") == [bar]
    assert bars[bar]["figure"] == pytest.approx(figure)
    assert row["case"] in bars[bar]["where"]
    assert name in bars[bar]["where"] or table == 1


def test_a_small_map_is_compared_with_the_compiled_layer_of_its_own_case():
    rows, passes, steps = run()
    row = next(r for r in rows if r["name"] == "sn" and r["small"] and r["dtype"] == "bf16")
    row["ratio"] = 0.96
    bars = judged(rows, passes, steps)
    assert only(bars, "not met") == ["7 x 7, CUDA graphs: at most torch.compile's BatchNorm"]
    peer = next(r for r in rows if r["name"] == "torch compiled" and r["case"] == row["case"])
    peer["clock"] = "events (operation not permitted)"
    assert only(judged(rows, passes, steps), "not measured") == only(bars, "not met")


def test_what_was_not_measured_is_not_met():
    assert only(judged([], [], []), "not measured") == list(judged([], [], []))
    rows, passes, steps = run()
    rows = [r for r in rows if (r["dtype"], r["format"]) != ("bf16", "channels_last")]
    bars = judged(rows, passes, steps[:3])
    measured = {"apply: at least 85 % of the copy", "combine: at least 85 % of the copy"}
    assert set(only(bars, "met")) == measured
    assert "not measured: bf16 channels_last" in bars["bn: at most 1.00 x nn.BatchNorm2d"]["where"]
    assert "AMP channels_last" in bars["resnet50 step with sn: at most 1.05 x BatchNorm's"]["where"]
    for r in rows:
        r["ratio"] = 2.0  # a miss is a miss, however little was measured
    assert judged(rows, passes, steps)["bn: at most 1.00 x nn.BatchNorm2d"]["verdict"] == "not met"


def test_rows_that_do_not_count():
    """Compiled cases, small tensors for the bandwidth, another network, roundings of float32."""
    rows, passes, steps = run()
    sn = next(r for r in rows if r["name"] == "sn" and not r["small"])
    rows.append({**sn, "case": sn["case"] + " compiled", "ratio": 5.0, "kernels_forward": 99})
    small = next(r for r in rows if r["name"] == "torch" and r["small"])
    for r in rows:
        if r["case"] == small["case"]:
            r |= {"error_y": 3e-8}
    rows.append({**sn, "case": small["case"], "small": True, "mb": 12.8, "forward_of_floor": 0.1, "error_y": 9e-8})
    passes.append({**passes[0], "name": "apply", "mb": 12.8, "of_copy": 0.1})
    steps.append({"case": "resnet18 eager", "name": "sn", "ratio": 9.0})
    assert only(judged(rows, passes, steps), "not met") == []


def test_table():
    text = roofline_report.bars_table(bars.verdicts(*run()))
    assert "sn: at most 1.00 x nn.BatchNorm2d" in text
    assert "0.9" in text
    assert text.count(" met ") == 18
    assert budget.LARGE == 50
