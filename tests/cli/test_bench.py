import json

import pytest
import torch

import lightning_norm
from lightning_norm.bench import contenders, formulas, shapes
from lightning_norm.cli.bench import run


def test_eager_run_prints_a_table_and_writes_data_and_picture(tmp_path, capsys):
    rows = run(
        ["--shapes", "8x6x5x5,9x6", "--norms", "bn,sn", "--repeats", "3", "--no-compile", "--save", str(tmp_path)]
    )
    text = capsys.readouterr().out
    assert "8x6x5x5 channels_last" in text
    assert {r["name"] for r in rows if r["shape"] == "8x6x5x5"} == {"torch", "bn", "bn naive", "sn", "sn naive"}
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rows"] == rows
    assert data["machine"]["torch"] == torch.__version__
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert "| x" not in text
    for row in rows:
        base = next(r for r in rows if r["shape"] == row["shape"] and r["name"] == "torch")
        assert row["ratio"] == pytest.approx(row["ms"] / base["ms"])


def test_a_naive_formula_starts_from_the_layers_random_values():
    rows = run(["--shapes", "8x6x5x5", "--norms", "afn,asr", "--repeats", "2", "--no-compile"])
    assert {r["name"] for r in rows} == {"torch", "afn", "afn naive", "asr", "asr naive"}
    layer = lightning_norm.create("afn", 6)
    formula = formulas.Naive(layer)
    x = torch.randn(8, 6, 5, 5)
    x.requires_grad_()
    for each in (layer, formula):
        contenders.check("afn", each, x, torch.randn_like(x))
        assert each.dropout == 0.3  # off while the results are compared


def test_only_x_is_kept_for_the_backward_pass():
    rows = run(["--shapes", "4x6x32x32", "--norms", "sn", "--repeats", "2", "--no-compile"])
    ours = [r["saved"] for r in rows if r["name"] == "sn"]
    # x itself is 1; a hundred (N, C) tensors in float64 would be 100 * 2 / 1024 = 0.2
    assert all(1.0 <= s < 1.2 for s in ours)


def test_bnet_stands_beside_a_batch_norm_and_a_convolution():
    rows = run(["--shapes", "4x6x9x8,9x6", "--norms", "bnet", "--repeats", "2", "--no-compile"])
    by_name = {r["name"]: r for r in rows if r["shape"] == "4x6x9x8"}
    assert set(by_name) == {"torch", "torch + depthwise", "bnet", "bnet naive"}
    peer = by_name["torch + depthwise"]
    assert by_name["bnet"]["vs_peer"] == pytest.approx(by_name["bnet"]["ms"] / peer["ms"])
    assert peer["saved"] > 2 > by_name["bnet"]["saved"]  # it keeps the normalized map as well
    assert {r["name"]: r["vs_peer"] for r in rows if r["shape"] == "9x6"} == {"torch": None, "bnet": None}


def test_a_wrong_peer_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(contenders, "depthwise_peer", lambda c: torch.nn.BatchNorm2d(c))
    with pytest.raises(ArithmeticError, match=r"torch \+ depthwise: the output differs from float64"):
        shapes.bench_shape((8, 6, 5, 5), ["bnet"], False, "cpu", 2, False)


@pytest.mark.slow
def test_compiled_contenders():
    rows = run(["--shapes", "8x6x5x5", "--norms", "sn", "--repeats", "2"])
    assert {"sn compiled", "sn naive compiled"} <= {r["name"] for r in rows}


def test_a_wrong_result_stops_the_benchmark(monkeypatch):
    monkeypatch.setitem(formulas.FORMULAS, "sn", lambda x, p: 2 * x)
    with pytest.raises(ArithmeticError, match="sn: the output differs from float64"):
        shapes.bench_shape((8, 6, 5, 5), ["sn"], False, "cpu", 2, False)


def test_without_a_formula_a_layer_is_compared_with_itself_in_float64(monkeypatch):
    monkeypatch.delitem(formulas.FORMULAS, "sn")
    layer = contenders.ready("sn", (8, 6, 5, 5), "cpu")
    x, dy = torch.randn(8, 6, 5, 5).requires_grad_(), torch.randn(8, 6, 5, 5)
    assert 0 < max(contenders.check("sn", layer, x, dy)) < 1e-5
    with pytest.raises(ArithmeticError, match="sn: the output differs from float64"):
        contenders.check("sn", torch.nn.Sequential(layer, torch.nn.Tanh()), x, dy)


def test_bad_input():
    with pytest.raises(ValueError, match="no normalizer called 'sm'"):
        run(["--norms", "sm"])
    with pytest.raises(ValueError, match="'8y6' is no shape"):
        run(["--shapes", "8y6"])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device found"):
            run(["--device", "cuda"])


def test_context_normalization_is_timed_with_contexts():
    rows = run(["--shapes", "12x6x5x5", "--norms", "cn", "--repeats", "2", "--no-compile"])
    assert {r["name"] for r in rows} == {"torch", "cn", "cn naive"}


def test_group_norm_and_silu_stand_beside_torchs():
    shapes_of = "1x32x4x4,1x32x2x3x4"
    arguments = ["--shapes", shapes_of, "--norms", "gn", "--activation", "silu", "--repeats", "2", "--no-compile"]
    rows = run(arguments)
    assert {r["name"] for r in rows} == {"torch", "torch GroupNorm", "gn", "gn naive"}
    assert [*dict.fromkeys(r["shape"] for r in rows)] == [
        "1x32x4x4 + silu",
        "1x32x4x4 channels_last + silu",
        "1x32x2x3x4 + silu",
        "1x32x2x3x4 channels_last + silu",
    ]
    assert all(r["vs_peer"] for r in rows if r["name"] == "gn")


def test_inputs_without_positions():
    every = ",".join(lightning_norm.normalizers())
    rows = run(["--shapes", "8x6", "--norms", every, "--repeats", "2", "--no-compile"])
    assert {r["name"] for r in rows} >= {"torch", "bn", "gn", "sn"}
    assert not {r["name"] for r in rows} & {"in", "asr", "ibn", "frn"}  # one value per statistic


def test_one_round_has_no_quartiles():
    with pytest.raises(ValueError, match="--repeats must be 2 or more"):
        run(["--shapes", "8x6", "--repeats", "1"])
