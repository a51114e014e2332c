"""Manifests, plans, headers and pickles that are damaged or malicious: a typed error, and the model as it was."""

import copy
import functools
import http.server
import os
import random
import subprocess
import threading

import pytest
import torch
import yaml
from torch import nn

import lightning_norm
from lightning_norm import NormSwap, swap
from lightning_norm.errors import CheckpointError, OtherFileWarning, PlanError
from lightning_norm.layers.swap_record import MANIFEST_KEY
from lightning_norm.surgery.manifest import rebuild_from
from tests.callbacks.toy import Net, loader, trainer


class TwoNorms(Net):
    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm2d(6))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    run = trainer(NormSwap("sn"), max_steps=1)
    run.fit(TwoNorms(), loader())
    run.save_checkpoint(path)
    return path


def norm_of(row, **entries):
    row["norm"].update(entries)


ROW = {
    "norm None": lambda r: r.update(norm=None),
    "norm a number": lambda r: r.update(norm=3),
    "init_args a list": lambda r: norm_of(r, init_args=[1]),
    "init_args text": lambda r: norm_of(r, init_args="a"),
    "init_args with a number as name": lambda r: norm_of(r, init_args={3: 4}),
    "no class_path": lambda r: r["norm"].pop("class_path"),
    "class_path a number": lambda r: norm_of(r, class_path=3),
    "class_path unknown": lambda r: norm_of(r, class_path="snn"),
    "an argument that it does not take": lambda r: norm_of(r, init_args={"nope": 1}),
    "a value out of range": lambda r: norm_of(r, init_args={"momentum": 7}),
    "a value of another kind": lambda r: norm_of(r, init_args={"choices": 3}),
    "no name": lambda r: r.pop("name"),
    "name a number": lambda r: r.update(name=3),
    "name empty": lambda r: r.update(name=""),
    "source a number": lambda r: r.update(source=3),
    "no source": lambda r: r.pop("source"),
    "num_features text": lambda r: r.update(num_features="6"),
    "sync": lambda r: r.update(sync="maybe"),
}
OF_MANIFESTS = {
    "before a number": lambda r: r.update(before=3),
    "before of numbers": lambda r: r.update(before=[3]),
    "before unknown": lambda r: r.update(before=[{"class_path": "snn", "init_args": {}}]),
    "a second step that fails": lambda r: r.update(
        before=[{"class_path": "bcn", "init_args": {}}], norm={"class_path": "sn", "init_args": {"momentum": 7}}
    ),
    "also a number": lambda r: r.update(also=3),
    "options a number": lambda r: r.update(options=3),
    "backend": lambda r: r["options"].update(backend="cuda"),
    "sync_group": lambda r: r["options"].update(sync_group=-3),
    "compile": lambda r: r["options"].update(compile="perhaps"),
    "sync of options": lambda r: r["options"].update(sync="maybe"),
    "scheduled None": lambda r: r["options"].update(scheduled=None),
    "scheduled a list": lambda r: r["options"].update(scheduled=[0.5]),
    "a scheduled value of another kind": lambda r: r["options"].update(scheduled={"radius": [0.5]}),
    "a scheduled value out of range": lambda r: r["options"].update(scheduled={"radius": 7}),
    "another number of channels": lambda r: r.update(num_features=99),
    "a layer that is gone": lambda r: r.update(name="net.9"),
    "a convolution": lambda r: r.update(name="net.0"),
}
ALL_ROWS = {
    "rows None": lambda c: c.update(layers=None),
    "rows a mapping": lambda c: c.update(layers={}),
    "a row that is a list": lambda c: c["layers"].append([1]),
    "two rows of one name": lambda c: c["layers"].append(copy.deepcopy(c["layers"][0])),
}


def untouched(model):
    return [type(m) for m in model.net] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.BatchNorm2d]


@pytest.mark.parametrize("edit", [*ROW, *OF_MANIFESTS, *ALL_ROWS])
def test_manifests(edit, good, tmp_path):
    content, path = torch.load(good, weights_only=True), tmp_path / "bad.ckpt"
    manifest = content[MANIFEST_KEY]
    change = {**ROW, **OF_MANIFESTS}.get(edit)
    change(manifest["layers"][1]) if change else ALL_ROWS[edit](manifest)
    if edit == "sync":
        return  # an entry of plans alone
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        lightning_norm.load_from_checkpoint(TwoNorms, path)
    model = TwoNorms()
    with pytest.raises(CheckpointError):
        rebuild_from(model, content)
    assert untouched(model)


def test_a_row_of_a_later_version_is_told(good, tmp_path):
    """Its layer may need what this version does not know; a plan is typed by hand, and there it is a mistake."""
    content, path = torch.load(good, weights_only=True), tmp_path / "later.ckpt"
    for row in content[MANIFEST_KEY]["layers"]:
        row["temperature"] = 2
    torch.save(content, path)
    with pytest.warns(OtherFileWarning, match=r"later\.ckpt.*rows have entries .*: temperature.*Update lightning_norm"):
        lightning_norm.load_from_checkpoint(TwoNorms, path)
    with pytest.warns(OtherFileWarning, match="temperature"):
        NormSwap(plan=path)


def test_a_checkpoint_without_a_swapped_layer_is_no_plan(good, tmp_path):
    content, path = torch.load(good, weights_only=True), tmp_path / "none.ckpt"
    content[MANIFEST_KEY]["layers"] = []
    torch.save(content, path)
    with pytest.raises(PlanError, match=r"none\.ckpt' swaps no layer: its manifest has no rows.*Type norm='sn'"):
        NormSwap(plan=path)


@pytest.mark.parametrize("entry", [{}, {"init_args": None}])
def test_arguments_may_be_left_out(entry, good, tmp_path):
    content = torch.load(good, weights_only=True)
    content[MANIFEST_KEY]["layers"][1]["norm"] = {"class_path": "sn", **entry}
    torch.save(content, tmp_path / "a.ckpt")
    assert type(lightning_norm.load_from_checkpoint(TwoNorms, tmp_path / "a.ckpt").net[3]).__name__ == "SwitchableNorm"


@pytest.mark.parametrize("edit", [*ROW, *ALL_ROWS, "a layer that is gone"])
def test_plans(edit, tmp_path):
    plan = swap(TwoNorms(), "sn", dry_run=True).to_dict()
    change = {**ROW, **OF_MANIFESTS}.get(edit)
    change(plan["layers"][1]) if change else ALL_ROWS[edit](plan)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    model = TwoNorms()
    if edit in ("norm None", "no source"):  # which leaves the layer alone, and is looked up in the model
        return
    if edit == "rows a mapping":
        plan["layers"] = {}
    with pytest.raises(PlanError, match=r"plan\.yaml"):
        trainer(NormSwap(plan=str(tmp_path / "plan.yaml"))).fit(model, loader())
    assert untouched(model)


@pytest.mark.parametrize(
    "row",
    [
        {"init_args": {"sparse": True}},
        {"norm_args": {"sparse": True}},
        {"sparse": True},
        {"norm": {"class_path": "sn", "init_args": {"eps": float("inf")}}},
        {"activation": "net.9"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_a_row_that_was_typed_by_hand(row, tmp_path):
    """What stands in the wrong place would have no effect, and what only the layer refuses would not name the file."""
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"layers": [{"name": "net.1", "norm": "sn", **row}]}))
    model = TwoNorms()
    with pytest.raises(PlanError, match=r"plan\.yaml"):
        trainer(NormSwap(plan=tmp_path / "plan.yaml")).fit(model, loader())
    assert untouched(model)


def test_every_entry_of_a_report_may_stand_in_a_plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(swap(TwoNorms(), rules={"net.1": "sn"}, dry_run=True).to_yaml())
    assert list(NormSwap(plan=tmp_path / "plan.yaml").options.rules) == [r"net\.1", r"net\.3"]


@pytest.mark.parametrize("name", ["plan", "warm_start"])
def test_a_path_that_is_none(name):
    with pytest.raises(TypeError, match=f"{name} must be the path of a file, got 3"):
        NormSwap(**{name: 3, **({} if name == "plan" else {"norm": "sn"})})


def test_the_path_before_the_class(good):
    with pytest.raises(TypeError, match="the class of the module and then the path"):
        lightning_norm.load_from_checkpoint(good, TwoNorms)


# Each line holds the one before it nine times.
LINES = [f"{chr(i)}: &{chr(i)} [{','.join([f'*{chr(i - 1)}'] * 9)}]" for i in range(98, 120)]
BOMB = "\n".join(["a: &a [x, x]", *LINES, "layers: [*w, *w]"]).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"- 1",
        b"layers: [",
        b"\x00\x01",
        b"\xff\xfe\xfa",
        b"layers: !!python/object/apply:os.system ['echo']",
        BOMB,
        b"layers:\n- {name: net.1, norm: sn}\nlayers:\n- {name: net.3, norm: sn}",
        b"layers:\n- name: net.1\n  norm: sn\n  norm: bn",
    ],
    ids=["empty", "list", "broken", "binary", "no text", "code", "bomb", "two plans", "two norms"],
)
def test_plans_that_are_none(text, tmp_path):
    (tmp_path / "plan.yaml").write_bytes(text)
    with pytest.raises(PlanError, match=r"cannot read the plan '.*plan\.yaml'"):
        NormSwap(plan=tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", "three"),
        ("global_step", None),
        ("pytorch-lightning_version", "two"),
        ("pytorch-lightning_version", 2),
        ("loops", 3),
        ("callbacks", []),
        ("optimizer_states", {}),
        ("lr_schedulers", 1),
        ("hyper_parameters", "a"),
    ],
)
def test_headers(name, value, good, tmp_path):
    content = torch.load(good, weights_only=True)
    torch.save({**content, name: value}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=rf"bad\.ckpt': its entry '{name}' must be"):
        lightning_norm.load_from_checkpoint(TwoNorms, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=rf"bad\.ckpt': its entry '{name}' must be"):
        trainer(NormSwap("sn")).fit(TwoNorms(), loader(), ckpt_path=str(tmp_path / "bad.ckpt"))


class MoreNorms(TwoNorms):
    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm2d(6))


@pytest.mark.parametrize("way", ["test", "fit", "warm_start"])
def test_a_network_of_other_layers_is_no_other_swap(way, good, tmp_path):
    """No plan would make the file fit, so that none is advised."""
    larger = tmp_path / "larger.ckpt"
    run = trainer(NormSwap("sn"), max_steps=1)
    run.fit(MoreNorms(), loader())
    run.save_checkpoint(larger)
    for path, network, said in (
        (larger, TwoNorms, r"has sn at 'net\.\d', and this TwoNorms has nothing there"),
        (good, MoreNorms, r"has nothing at 'net\.\d', and this MoreNorms has sn there"),
    ):
        warm, resumed = (str(path), None) if way == "warm_start" else (None, str(path))
        run = trainer(NormSwap("sn", warm_start=warm), max_steps=2)
        stage = run.test if way == "test" else run.fit
        with pytest.raises(CheckpointError, match=rf"{path.name}' {said}\. Build it with the arguments it was"):
            stage(network(), loader(), ckpt_path=resumed)


def test_a_file_without_the_weights_that_the_user_left_out(good, tmp_path):
    """Rows of frozen layers whose weights were taken out of the file are of this network all the same."""
    checkpoint = torch.load(good, weights_only=True)
    (gone,) = (name for name in checkpoint["state_dict"] if name.endswith("mean_weight") and "net.1." in name)
    prefix = gone.rpartition(".")[0]
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(prefix)}
    torch.save(checkpoint, tmp_path / "part.ckpt")
    job = TwoNorms()
    job.strict_loading = False
    trainer(NormSwap("sn")).test(job, loader(), ckpt_path=str(tmp_path / "part.ckpt"))


def test_a_warm_start_that_fails_leaves_the_model_as_it_was(good, tmp_path):
    content = torch.load(good, weights_only=True)
    edits = {
        "another swap": lambda c: c[MANIFEST_KEY]["layers"][1]["norm"].update(init_args={"momentum": 0.5}),
        "another shape at the end": lambda c: c["state_dict"].update({"net.3.mean_weight": torch.zeros(2)}),
        "a key too many": lambda c: c["state_dict"].update(more=torch.zeros(2)),
        "a key is missing": lambda c: c["state_dict"].pop("net.0.bias"),
    }
    for edit in edits.values():
        changed = copy.deepcopy(content)
        edit(changed)
        torch.save(changed, tmp_path / "bad.ckpt")
        model = TwoNorms()
        modules, state = list(model.net), copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
            trainer(NormSwap("sn", warm_start=str(tmp_path / "bad.ckpt"))).fit(model, loader())
        assert list(model.net) == modules
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("way", ["load_from_checkpoint", "warm_start", "plan", "fit", "validate"])
@pytest.mark.parametrize("function", [os.system, subprocess.getoutput, eval, exec])
def test_a_malicious_pickle_is_called_that_and_not_run(function, way, good, tmp_path):
    content, path, ran = torch.load(good, weights_only=True), tmp_path / "evil.ckpt", tmp_path / "ran"
    command = f"open({str(ran)!r}, 'w')" if function in (eval, exec) else f"touch {ran}"
    torch.save({**content, "x": Evil(function, command)}, path)
    ways = {
        "load_from_checkpoint": lambda: lightning_norm.load_from_checkpoint(TwoNorms, path),
        "warm_start": lambda: trainer(NormSwap("sn", warm_start=path)).fit(TwoNorms(), loader()),
        "plan": lambda: NormSwap(plan=path),
        "fit": lambda: trainer(NormSwap("sn")).fit(TwoNorms(), loader(), ckpt_path=str(path)),
        "validate": lambda: trainer(NormSwap("sn")).validate(TwoNorms(), loader(), ckpt_path=str(path)),
    }
    with pytest.raises(CheckpointError, match=r"evil\.ckpt' would run code when it is loaded"):
        ways[way]()
    assert not ran.exists()


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Return the address at which the files of ``tmp_path`` are served."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_checkpoint_from_the_web_runs_no_code(web, good, tmp_path):
    content, ran = torch.load(good, weights_only=True), tmp_path / "ran"
    torch.save({**content, "x": Evil(os.system, f"touch {ran}")}, tmp_path / "evil.ckpt")
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="would run code"):
        trainer(NormSwap("sn")).fit(TwoNorms(), loader(), ckpt_path=f"{web}/evil.ckpt")
    with pytest.raises(CheckpointError, match="would run code"):
        lightning_norm.load_from_checkpoint(TwoNorms, f"{web}/evil.ckpt")
    assert not ran.exists()
    run = trainer(NormSwap("sn"), max_epochs=2)
    run.fit(TwoNorms(), loader(), ckpt_path=f"{web}/a.ckpt")
    assert run.global_step == 3
    model = lightning_norm.load_from_checkpoint(TwoNorms, f"{web}/a.ckpt")
    assert torch.equal(model.net[3].mean_weight, content["state_dict"]["net.3.mean_weight"])


def test_an_archive_of_several_parts(good, tmp_path):
    data = bytearray(good.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 4] = 1  # the number of the part that the index is in
    (tmp_path / "bad.ckpt").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged archive"):
        lightning_norm.load_from_checkpoint(TwoNorms, tmp_path / "bad.ckpt")


def test_damaged_bytes(good, tmp_path):
    raw, rng, bad = good.read_bytes(), random.Random(0), tmp_path / "bad.ckpt"
    state = torch.load(good, weights_only=True)["state_dict"]
    for i in range(120):
        data = bytearray(raw)
        if i % 2:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(8):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        bad.write_bytes(bytes(data))
        try:
            model = lightning_norm.load_from_checkpoint(TwoNorms, bad)
        except CheckpointError as error:
            assert "bad.ckpt" in str(error)  # noqa: PT017
        else:
            assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
