import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from lightning_norm.cli import compare
from lightning_norm.cli.compare import command, training
from lightning_norm.cli.compare.comparison import Report, matplotlib
from lightning_norm.cli.compare.intervals import compare_paired
from lightning_norm.cli.compare.runs import all_runs, read_contenders, read_sweeps
from lightning_norm.cli.compare.store import RunStore
from lightning_norm.cli.main import main
from lightning_norm.errors import WriteError

ROOT = Path(__file__).parents[2]
JOB = {
    "model": {"class_path": "tests.cli.own_job.Classifier"},
    "data": {"class_path": "tests.cli.own_job.Stripes"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
}


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def job():
    def write(**more):
        Path("job.yaml").write_text(yaml.safe_dump({**JOB, **more}))
        return ["--config", "job.yaml", "--metric", "val/acc", "--norms", "bn,sn"]

    return write


def trained(monkeypatch):
    """Names of the runs that are trained from here on."""
    names, train = [], training.train
    monkeypatch.setattr(training, "train", lambda run, *a: names.append(run.name.rpartition("-")[0]) or train(run, *a))
    return names


def made_up(label, seed, value, sweep=None, step=10.0, swap=None):
    record = {"format": 1, "name": f"{label}-{seed}", "label": label, "seed": seed}
    record |= {"sweep": sweep or {}, "swap": swap or {}, "set": {}, "settings": {"a": "1"}}
    record |= {"history": {"val/acc": [0.5, value]}, "test": {}, "steps": 4, "step_ms": step, "peak_mb": 5.0}
    return record | {"parameters": 1000, "seconds": 2.0, "versions": {"torch": "x"}, "device": "cpu"}


def test_a_job_of_ones_own_stopped_and_gone_on(job, capsys, monkeypatch):
    names = trained(monkeypatch)
    counted = training.train

    def interrupted(run, *rest):
        if len(names) == 3:
            raise KeyboardInterrupt
        return counted(run, *rest)

    monkeypatch.setattr(training, "train", interrupted)
    arguments = [*job(), "--seeds", "3"]
    with pytest.raises(SystemExit) as stopped:
        compare.run(arguments)
    assert stopped.value.code == 130
    told = capsys.readouterr().err
    assert "3 of 6 runs done. The same command goes on." in told
    assert "Run 2/6  sn seed 0\n" in told  # lines and no bar, for nothing here is a terminal
    assert "\r" not in told
    assert names == ["bn-seed0", "sn-seed0", "bn-seed1"]
    assert len(list(Path("compare/runs").iterdir())) == 3

    names.clear()
    monkeypatch.setattr(training, "train", counted)
    compare.run(arguments)
    assert names == ["sn-seed1", "bn-seed2", "sn-seed2"]
    shown = capsys.readouterr().out
    assert "An interval that contains 0 is no evidence of a difference." in shown
    assert "One more seed costs about" in shown
    assert "+12" in shown  # sn's two layers add 2 x 6 parameters
    page = Path("compare/index.html").read_text()
    assert page.count("data:image/png;base64,") >= 1
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    with open("compare/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["norm"] for r in rows] == ["bn", "sn"]
    assert json.loads(Path("compare/results.json").read_text())["rows"][1]["seeds"] == 3

    names.clear()
    compare.run(["--report", "compare", "--metric", "train/loss"])
    assert names == []
    assert "train/loss of the last epoch; lower is better" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no metric 'val/ac'. Did you mean 'val/acc'\?"):
        compare.run(["--report", "compare", "--metric", "val/ac"])
    with pytest.raises(ValueError, match=r"data.init_args.size: '16' then, '32' now.*--out"):
        compare.run([*arguments, "--data.init_args.size", "32"])


def test_the_swap_of_the_job_is_kept_but_for_its_normalizer(job, monkeypatch):
    """include stays, wherever the job says it; norm and norm_args are each contender's own."""
    seen = []
    monkeypatch.setattr(training.Recorder, "on_train_end", lambda self, trainer, module: seen.append(str(module)))
    section = {"norm": "gn", "norm_args": {"eps": 0.1}, "include": ["net.1"]}
    compare_one = ["--seeds", "1", "--run", "1", "--trainer.max_epochs", "1"]
    compare.run([*job(norm=section), *compare_one, "--out", "a"])
    trainer = {**JOB["trainer"], "callbacks": [{"class_path": "lightning_norm.NormSwap", "init_args": section}]}
    compare.run([*job(trainer=trainer), *compare_one, "--out", "b"])
    for text in seen:
        assert text.count("SwitchableNorm") == 1
        assert text.count("BatchNorm2d") == 1
        assert "eps=0.1" not in text
    compare.run([*job(norm=section), "--seeds", "1", "--run", "0", "--trainer.max_epochs", "1", "--out", "a"])
    assert seen[-1].count("BatchNorm2d") == 2


def test_entries_of_the_configuration_for_one_contender(job):
    norms = "bn, wide: {norm: bn, set: {model.init_args.width: 8}}"
    arguments = [*job(), "--norms", norms, "--seeds", "1", "--trainer.max_epochs", "1"]
    compare.run(arguments)
    plain, wide = RunStore(Path("compare")).read_all()
    assert wide["parameters"] > plain["parameters"]
    compare.run([*arguments, "--list"])  # the same settings: nothing remains, and nothing is refused
    with pytest.raises(ValueError, match="wide"):
        compare.run([*arguments, "--norms", "bn, wide: {norm: bn, set: {model.init_args.width: 6}}"])


def test_a_sweep_over_any_entry(job, capsys):
    norms = "bn, half: {norm: sn, include: [net.1]}"
    arguments = [
        *job(),
        "--norms",
        norms,
        "--seeds",
        "1",
        "--sweep",
        "data.init_args.batch_size=4,8",
        "--metric",
        "test/acc",
    ]
    compare.run([*arguments, "--trainer.max_epochs", "1"])
    shown = capsys.readouterr().out
    assert "too few for a verdict" in shown
    assert "optimizer steps of each run 4 at batch_size=4; 2 at batch_size=8" in shown
    assert Path("compare/sweep_batch_size.png").read_bytes().startswith(b"\x89PNG")
    records = RunStore(Path("compare")).read_all()
    assert {(r["label"], r["sweep"]["data.init_args.batch_size"], r["steps"]) for r in records} == {
        ("bn", "4", 4), ("bn", "8", 2), ("half", "4", 4), ("half", "8", 2),
    }  # fmt: skip


def test_points_of_a_sweep_stand_in_their_order():
    records = [made_up("bn", 0, 0.5, {"batch": b}) for b in ("128", "2", "32")]
    assert [dict(p)["batch"] for p in Report(records, "val/acc", True, False, "bn").points] == ["2", "32", "128"]


def test_a_second_configuration_wins_over_the_first(job, monkeypatch):
    Path("full.yaml").write_text("trainer: {max_epochs: 1}")
    compare.run([*job(), "--config", "full.yaml", "--seeds", "1", "--norms", "bn"])
    assert [len(r["history"]["val/acc"]) for r in RunStore(Path("compare")).read_all()] == [1]


def test_hparams_of_runs_with_different_arguments_unite():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    swap = {"norm": {"class_path": "ubn", "init_args": {"threshold": 0.9}}}
    records = [made_up("bn", 0, 0.5), made_up("ubn", 0, 0.6, swap=swap)]
    Report(records, "val/acc", True, False, "bn").save(Path("out"))
    columns = []
    for folder in sorted(Path("out/tensorboard").glob("*/hparams")):
        events = EventAccumulator(str(folder))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        columns.append({name: value.WhichOneof("kind") for name, value in start.hparams.items()})
        (last,) = events.Scalars("val/acc")
        assert last.value in (0.5, pytest.approx(0.6))
        assert last.step == 4  # where the run's curve ends
    assert len(columns) == 2
    assert columns[0] == columns[1]
    assert set(columns[0]) == {"norm", "seed", "threshold"}


def test_the_list_is_the_runs_as_commands(job, capsys):
    arguments = [*job(), "--seeds", "1", "--trainer.max_epochs", "1"]
    compare.run([*arguments, "--list"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("lightning-norm compare ")
    words = second.split()
    assert "--list" not in words
    main(words[1:])
    assert capsys.readouterr().out == ""  # no report of one run
    compare.run([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines() == [first]


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "lightning_norm", "compare", *arguments]
    # A shell that runs the tests in the background has Ctrl-C ignored, and processes inherit that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **heard)


@pytest.mark.slow
def test_two_processes_share_a_folder(job):
    arguments = [*job(), "--seeds", "3"]
    both = [start(*arguments), start(*arguments)]
    for process in both:
        out, error = process.communicate()
        assert process.returncode == 0, error
        assert "bn is the network as it is" in out
    records = RunStore(Path("compare")).read_all()
    assert len(records) == 6


def test_one_process_at_a_time_writes_the_report(job):
    compare.run([*job(), "--seeds", "1"])
    (results := Path("compare") / "results.csv").unlink()
    drawing = threading.Thread(target=compare.run, args=[["--report", "compare", "--metric", "val/loss"]])
    with RunStore(Path("compare")).writes_report():
        drawing.start()
        drawing.join(2)
        assert drawing.is_alive()
        assert not results.exists()
    drawing.join()
    assert results.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_ends_all_jobs_and_the_same_command_goes_on(job, jobs, sent, status):
    """Only the runs of seed 0 end by themselves: no machine is so slow that the others have ended as well."""
    arguments = [*job(model={"class_path": "tests.cli.own_job.WaitsForAFile"}), "--seeds", "2"]
    process = start(*arguments, "--jobs", jobs)
    while not list(Path(".").glob("compare/runs/*.json")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(sent)
    _, error = process.communicate()
    assert process.returncode == status, error
    assert "The same command goes on" in error
    assert len(RunStore(Path("compare")).read_all()) <= 2
    Path("go").touch()
    compare.run(arguments)
    assert len(RunStore(Path("compare")).read_all()) == 4


@pytest.mark.parametrize(("model", "status"), [("SwallowsCtrlC", 130), ("Swallows", 143)])
def test_a_signal_whose_exception_is_dropped_ends_it_too(job, capsys, model, status):
    # A shell that runs the tests in the background has Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            compare.run([*job(model={"class_path": f"tests.cli.own_job.{model}"}), "--seeds", "2"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == status
    assert "Stopped: 0 of 4 runs done" in capsys.readouterr().err


def test_processes_that_do_not_end_are_killed_and_waited_for(monkeypatch):
    monkeypatch.setattr(command, "PATIENCE", 0.1)
    deaf = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers = [subprocess.Popen([sys.executable, "-c", deaf], **pipes) for _ in range(2)]
    for worker in workers:
        worker.stdout.readline()  # now it is deaf
    command._end(workers)
    for worker in workers:
        assert worker.poll() == -signal.SIGKILL
        worker.communicate()


def test_a_process_that_says_more_than_a_pipe_holds(job, monkeypatch, tmp_path):
    """Nobody reads what a process writes to stderr before it ends."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(RuntimeError, match="ended with status 1:\n(?s:.*)it is over"):
        compare.run([*job(model={"class_path": "tests.cli.own_job.Talks"}), "--seeds", "1", "--jobs", "2"])


def test_a_damaged_file_is_told(tmp_path):
    store = RunStore(tmp_path)
    store.write("a", {**made_up("bn", 0, 0.5), "name": "a"})
    path = tmp_path / "runs" / "a.json"
    text = path.read_text()
    for cut in (0, 1, len(text) // 2, len(text) - 2):
        path.write_text(text[:cut])
        with pytest.raises(ValueError, match=r"a\.json is damaged.*trained again"):
            store.read("a")
    whole = json.loads(text)
    for entry in ("name", "label", "seed", "sweep", "swap", "set", "settings", "history", "test", "steps"):
        for changed in ({k: v for k, v in whole.items() if k != entry}, {**whole, entry: None}):
            path.write_text(json.dumps(changed))
            with pytest.raises(ValueError, match=rf"a\.json is damaged \(no '{entry}'\).*trained again"):
                store.read("a")
    for content in (b"\xff\xfe" + text.encode(), b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json is damaged.*trained again"):
            store.read("a")
    path.write_text('{"format": 0}')
    with pytest.raises(ValueError, match="no run of this version"):
        store.read_all()
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"a\.json is damaged.*Is a directory"):
        store.read_all()


INSIDE = {
    "history": [{"val/acc": []}, {"val/acc": 0.5}, {"val/acc": [0.5, None]}, {"val/acc": [True]}, {"val/acc": ["x"]}],
    "test": [{"acc": "x"}, {"acc": None}],
    "settings": [{"a": 1}],
    "sweep": [{"a": {"b": 1}}],
    **{entry: ["fast", [1.0], True] for entry in ("step_ms", "peak_mb", "parameters", "seconds")},
}


@pytest.mark.parametrize("entry", INSIDE)
def test_what_is_wrong_inside_of_an_entry_is_told(tmp_path, entry):
    store = RunStore(tmp_path)
    for value in INSIDE[entry]:
        store.write("bn-0", {**made_up("bn", 0, 0.5), entry: value})
        with pytest.raises(ValueError, match=rf"bn-0\.json is damaged \({entry} must .*, got .*trained again"):
            store.read("bn-0")
    store.write("bn-0", {**made_up("bn", 0, math.nan), "test": {"acc": 1}, "step_ms": None, "seconds": 3})
    assert store.read("bn-0")["seconds"] == 3


def test_two_files_of_one_run_are_no_two_runs(tmp_path):
    store = RunStore(tmp_path)
    store.write("bn-0", made_up("bn", 0, 0.5))
    store.write("bn-1", {**made_up("bn", 0, 0.6), "name": "bn-1"})
    with pytest.raises(ValueError, match=r"two runs of 'bn' with seed 0, bn-0\.json and bn-1\.json: delete one"):
        store.read_all()
    store.write("bn-1", {**made_up("bn", 0, 0.6, sweep={"a": "1"}), "name": "bn-1"})
    assert len(store.read_all()) == 2


@pytest.mark.parametrize("way", ["report", "run"])
def test_a_folder_that_cannot_be_written_into(tmp_path, job, way):
    """A file in the place of its folder of locks stops root as well, as a read-only disk would."""
    store = RunStore(tmp_path / "out")
    for label in ("bn", "sn"):
        store.write(f"{label}-0", made_up(label, 0, 0.5))
    store.locks.write_text("")
    arguments = ["--report", "out"] if way == "report" else [*job(), "--seeds", "1", "--out", "other"]
    if way == "run":
        Path("other").mkdir()
        Path("other/locks").write_text("")
    with pytest.raises(WriteError, match=r"cannot write into '.*locks': File exists\. Type --out FOLDER"):
        compare.run([*arguments, "--metric", "val/acc"] if way == "report" else arguments)


def written(folder):
    """The content of all files in a folder but for locks."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent.name != "locks"}


@pytest.mark.parametrize("place", ["tensorboard", "tensorboard/bn-0", "tensorboard/bn-0/hparams"])
def test_a_file_in_the_place_of_a_folder_of_the_report(tmp_path, place):
    store = RunStore(tmp_path)
    store.write("bn-0", made_up("bn", 0, 0.5))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("")
    with pytest.raises(WriteError, match=r"cannot write '.*hparams.*': (Not a directory|File exists)"):
        compare.run(["--report", str(tmp_path), "--metric", "val/acc"])


def test_a_full_disk_leaves_the_row_of_a_run_in_tensorboard_as_it_was(tmp_path, monkeypatch):
    """Everything else of the report still finds room: the events of TensorBoard are the last that is written."""
    RunStore(tmp_path).write("bn-0", made_up("bn", 0, 0.5))
    compare.run(report := ["--report", str(tmp_path), "--metric", "val/acc"])
    before = written(tmp_path / "tensorboard")
    assert len(before) == 1
    flush = os.fsync

    def full(file):
        if "tfevents" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="No space left on device"):
            compare.run(report)
    assert written(tmp_path / "tensorboard") == before
    compare.run(report)
    assert len(written(tmp_path / "tensorboard")) == 1


@pytest.mark.parametrize("place", ["runs", "runs/bn-0.json"])
def test_what_may_not_be_read_is_not_called_damaged_or_missing(tmp_path, monkeypatch, place):
    """Root may read everything, so the refusal of the system is made up."""
    RunStore(tmp_path).write("bn-0", made_up("bn", 0, 0.5))

    def refused(self, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_text" if place.endswith("json") else "iterdir", refused)
    with pytest.raises(ValueError, match=rf"cannot read .*{place}: Permission denied"):
        compare.run(["--report", str(tmp_path), "--metric", "val/acc"])


def other_process(monkeypatch, store, after, **change):
    """Another process writes a run into the folder while this one trains its run of the number ``after``."""
    train, trainings = training.train, []

    def train_beside(run, *arguments):
        record = train(run, *arguments)
        trainings.append(run)
        if len(trainings) == after:
            store.write("gn-0", {**made_up("gn", 0, 0.5), "settings": record["settings"], **change})
        return record

    monkeypatch.setattr(training, "train", train_beside)
    return trainings


@pytest.mark.parametrize("after", [1, 2])
def test_two_comparisons_that_begin_at_once_do_not_mix(job, monkeypatch, after):
    """Both met an empty folder. Nothing of the second one is written, and no report is made of the two."""
    store = RunStore(Path("compare"))
    trainings = other_process(monkeypatch, store, after, settings={"optimizer.lr": "5"})
    with pytest.raises(ValueError, match=r"holds runs with other settings .*Choose another folder with --out"):
        compare.run([*job(), "--seeds", "1"])
    assert len(trainings) == after
    assert len([*store.runs.iterdir()]) == after
    assert not (store.folder / "results.json").exists()


def test_a_process_with_other_normalizers_shares_the_folder(job, monkeypatch):
    other_process(monkeypatch, RunStore(Path("compare")), 1)
    compare.run([*job(), "--seeds", "1"])
    assert len(RunStore(Path("compare")).read_all()) == 3


def test_a_run_that_ends_while_a_report_waits_is_in_it(tmp_path, capsys):
    """The other process writes its own report in between, which an older one would replace."""
    store = RunStore(tmp_path)
    store.write("bn-0", made_up("bn", 0, 0.5))
    drawing = threading.Thread(target=compare.run, args=[["--report", str(tmp_path), "--metric", "val/acc"]])
    with store.writes_report():
        drawing.start()
        drawing.join(2)
        store.write("sn-0", made_up("sn", 0, 0.6))
    drawing.join()
    assert [row["norm"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == ["bn", "sn"]
    assert "1 run has ended since, and is below" in capsys.readouterr().out


def test_a_folder_that_was_put_together_by_hand(tmp_path):
    """A copy is no second run, and runs of different settings make no table."""
    store = RunStore(tmp_path)
    for record in (made_up("bn", 0, 0.5), made_up("sn", 0, 0.6)):
        store.write(record["name"], record)
    compare.run(["--report", str(tmp_path), "--metric", "val/acc"])
    copy = tmp_path / "runs" / "sn-0 (copy).json"
    copy.write_bytes((tmp_path / "runs" / "sn-0.json").read_bytes())
    with pytest.raises(ValueError, match=r"sn-0 \(copy\)\.json is a copy of sn-0\.json: delete it"):
        compare.run(["--report", str(tmp_path), "--metric", "val/acc"])
    copy.unlink()
    store.write("sn-0", {**made_up("sn", 0, 0.6), "settings": {"a": "2"}})
    with pytest.raises(ValueError, match=r"other settings \(a: '1' then, '2' now\)"):
        compare.run(["--report", str(tmp_path), "--metric", "val/acc"])
    other = {**made_up("sn", 0, 0.6), "settings": {"a": "2"}}
    store.write("sn-0", {**other, "set": {"a": "2"}})
    compare.run(["--report", str(tmp_path), "--metric", "val/acc"])
    store.write("sn-0", {**other, "sweep": {"a": "2"}})
    with pytest.raises(ValueError, match=r"--sweep: \[\] then, \['a'\] now"):
        compare.run(["--report", str(tmp_path), "--metric", "val/acc"])
    store.write("bn-0", {**made_up("bn", 0, 0.5), "sweep": {"a": "1"}})
    compare.run(["--report", str(tmp_path), "--metric", "val/acc"])


def test_labels_of_any_length_are_names_of_files(tmp_path):
    contenders = read_contenders(f"{'ä' * 300}: sn, {'ä' * 301}: sn, bn")
    names = [r.name for r in all_runs(contenders, [("optimizer.lr", ["0.1" * 100])], [0])]
    assert len(set(names)) == 3
    store = RunStore(tmp_path)
    for name in names:
        with store.claim(name):
            store.write(name, {**made_up("x", 0, 0.5), "name": name})
        assert store.read(name)


def test_a_claim_belongs_to_one_process(tmp_path):
    hold = (
        "import sys, pathlib; from lightning_norm.cli.compare.store import RunStore\n"
        "with RunStore(pathlib.Path(sys.argv[1])).claim('r') as mine: print(mine, flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", hold, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as other:
        assert other.stdout.readline() == "True\n"
        with RunStore(tmp_path).claim("r") as mine:
            assert not mine
        other.kill()  # the lock ends with its process
    with RunStore(tmp_path).claim("r") as mine:
        assert mine


def test_a_sweep_that_goes_on_counts_the_seeds_of_what_has_run():
    def run(label, size, seed):
        value = 0.5 + seed / 100
        return {
            "label": label, "seed": seed, "sweep": {"size": size}, "history": {}, "test": {"acc": value}, "steps": 9,
            "seconds": 1.0,
        }  # fmt: skip

    pairs = [("bn", "2"), ("sn", "2"), ("bn", "4")]
    records = [run(label, size, seed) for label, size in pairs for seed in range(3)]
    notes = Report(records, "acc", higher=True, best=False, baseline="bn").notes()
    assert "1 of 4 rows without a run so far; the same command goes on." in notes
    assert not any("too few" in note for note in notes)


@pytest.mark.parametrize("comparisons", [1, 4])
def test_the_interval_is_students(comparisons):
    differences = [0.01, -0.02, 0.03, 0.015]
    level = 1 - 0.05 / comparisons
    low, high = stats.t.interval(level, 3, np.mean(differences), stats.sem(differences))
    d = compare_paired([0.5 + x for x in differences], [0.5] * 4, comparisons)
    assert (d.low, d.high) == (pytest.approx(low), pytest.approx(high))
    assert d.verdict == "no evidence"


def test_verdicts():
    assert compare_paired([1.0, 1.1], [0.5, 0.6]).verdict == "no verdict from 2 seeds"
    assert compare_paired([1.0, 1.1, 1.2], [0.5, 0.6, 0.71]).verdict == "higher"
    assert compare_paired([0.5, 0.6, 0.71], [1.0, 1.1, 1.2]).verdict == "lower"
    assert "diverged" in compare_paired([1.0, math.nan, 1.0], [1.0] * 3).verdict
    assert compare_paired([], []).verdict == "no seed in common"


def test_pairs_are_of_the_same_seed_and_divergence_is_counted():
    values = (0.5, 0.9, 0.7)
    records = [made_up("bn", s, a) for s, a in enumerate(values)]
    records += [made_up("sn", s, a + 0.01, step=15.0) for s, a in reversed(list(enumerate(values)))]
    records += [made_up("gn", s, math.nan if s == 1 else 0.5) for s in range(3)]
    report = Report(records, "val/acc", True, False, "bn")
    sn = next(line for line in report.text().splitlines() if line.startswith("sn "))
    assert "+0.0100 [+0.0100, +0.0100]" in sn  # the same difference at every seed, however they spread
    assert "1.50 x" in sn
    gn = next(line for line in report.text().splitlines() if line.startswith("gn "))
    assert "1 of 3 diverged" in gn
    assert any("sn: better than bn" in note for note in report.notes())
    json.loads(json.dumps(report.rows()[0]))


def test_another_baseline_where_bn_is_missing():
    text = Report([made_up(n, s, 0.5) for n in ("ln", "sn") for s in (0, 1)], "val/acc", True, False, "ln").text()
    assert "vs ln" in text
    assert "unswapped" not in text


def test_best_is_the_best_epoch():
    record = made_up("bn", 0, 0.25)
    assert Report([record], "val/acc", True, True, "bn").value(record) == 0.5
    assert Report([record], "val/acc", False, True, "bn").value(record) == 0.25


def test_labels_and_numbers():
    runs = all_runs(
        read_contenders("bn,{class_path: sn, init_args: {momentum: 0.2}}"), read_sweeps(["a.b=1,2"]), [0, 1]
    )
    assert len({r.name for r in runs}) == len(runs) == 8
    assert [r.seed for r in runs] == [0] * 4 + [1] * 4
    assert runs[1].contender.label == "sn(momentum=0.2)"


@pytest.mark.parametrize("option", ["--out", "--report"])
@pytest.mark.parametrize("empty", ["", " "])
def test_no_folder_at_all(option, empty, capsys, monkeypatch):
    names = trained(monkeypatch)
    with pytest.raises(SystemExit) as end:
        compare.run(["--norms", "bn", "--seeds", "1", option, empty])
    assert end.value.code == 2
    assert f"argument {option}: expected a path, got {empty!r}. Type {option} compare" in capsys.readouterr().err
    assert names == []
    assert [*Path(".").iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--norms", "snn"], "Did you mean 'sn'"),
        (["--norms", "bn sn"], "separated by commas. Type --norms bn,sn"),
        (["--norms", "bn,bn"], "two normalizers are called 'bn'"),
        (["--norms", "bn,{norm: sn"], "cannot be read"),
        (["--norms", "bn,{exclud: 1, norm: sn}"], "Did you mean 'exclude'"),
        (["--norms", "bn,{norm: sn, norm: gn}"], "'norm' stands there twice"),
        (["--norms", "gn(num_groups=2)"], "norm_args: {name: value}"),
        (["--norms", "bn,gn: {num_groups: 2}"], "{norm: gn, norm_args:"),
        (["--norms", "1"], "names no normalizer"),
        (["--norms", ","], "at least one|names no normalizer|cannot be read"),
        (["--seeds", "0"], "at least 1"),
        (["--sweep", "lr"], "ENTRY=VALUE"),
        (["--sweep", "lr=1", "--sweep", "lr=2"], "twice"),
        (["--baseline", "gn"], "none of the normalizers"),
        (["--config", "job.yaml"], "needs the metric"),
        (["--report", "nowhere"], "no finished run"),
        (["--run", "99"], "the runs are numbered 0 to 8"),
    ],
)
def test_bad_input(arguments, said):
    with pytest.raises(ValueError, match=said):
        compare.run(arguments)
    assert not Path("compare").exists()


def test_what_is_missing_is_told_before_anything_is_trained(monkeypatch, job):
    names = trained(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-norm\[examples\]"):
        compare.run([*job(), "--seeds", "1"])
    assert names == []
    monkeypatch.undo()
    assert matplotlib()


@pytest.mark.parametrize(
    ("norms", "more", "said"),
    [
        ("bn,{norm: gn, norm_args: {group: 2}}", [], "Did you mean 'num_groups'"),
        ("bn,{norm: gn, norm_args: {num_groups: 5}}", [], "num_groups must divide them"),
        ("bn,late: {rules: {'layer9.*': sn}}", [], "matched none of the"),
        ("bn,x: {set: {trainer.max_epoks: 3}}", [], "trainer.max_epochs"),
        ("bn,sn", ["--sweep", "data.init_args.size=8,x"], "size"),
    ],
)
def test_a_mistake_in_any_run_is_told_before_the_first(job, monkeypatch, capsys, norms, more, said):
    names = trained(monkeypatch)
    with pytest.raises((ValueError, TypeError, SystemExit)) as error:
        compare.run([*job(), "--norms", norms, *more])
    assert said in f"{error.value}{capsys.readouterr().err}"
    assert names == []
    assert not Path("compare").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_metric_that_the_first_run_lacks_ends_the_command(job, jobs):
    # Of those that wait for a file none ends, and none is waited for.
    model = {"class_path": f"tests.cli.own_job.{'WaitsForAFile' if jobs == '2' else 'Classifier'}"}
    arguments = [*job(model=model), "--seeds", "4", "--jobs", jobs]
    with pytest.raises(ValueError, match=r"no metric 'val/ac'. Did you mean 'val/acc'"):
        compare.run([*arguments, "--metric", "val/ac"])
    done = list(Path("compare/runs").iterdir())
    assert 1 <= len(done) < 8
    with pytest.raises(ValueError, match="no metric 'val/ac'"):
        compare.run([*arguments, "--metric", "val/ac"])
    assert list(Path("compare/runs").iterdir()) == done


def test_a_folder_takes_runs_of_one_comparison(job, monkeypatch):
    compare.run([*job(), "--seeds", "1", "--norms", "bn"])
    names = trained(monkeypatch)
    for other in (["--sweep", "data.init_args.batch_size=8"], ["--trainer.max_epochs", "1"]):
        with pytest.raises(ValueError, match="runs of different settings do not compare"):
            compare.run([*job(), "--seeds", "1", "--norms", "sn", *other])
    with pytest.raises(ValueError, match=r"job\.yaml is no folder"):
        compare.run([*job(), "--out", "job.yaml"])
    assert names == []


def test_a_report_is_of_the_metric_of_the_last_one(tmp_path, capsys):
    store = RunStore(tmp_path)
    for record in (made_up("bn", 0, 0.5), made_up("sn", 0, 0.6)):
        store.write(record["name"], record)
    compare.run(["--report", str(tmp_path), "--metric", "val/acc", "--mode", "min"])
    capsys.readouterr()
    compare.run(["--report", str(tmp_path)])
    assert "val/acc of the last epoch; lower is better" in capsys.readouterr().out
    compare.run(["--report", str(tmp_path), "--mode", "max"])
    assert "val/acc of the last epoch; higher is better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("norms", "said"), [("bn", "bn alone, with nothing"), ("sn", "Type --norms 'bn,sn'"), ("bn,sn", "")]
)
def test_one_normalizer_alone_is_told_before_the_training(capsys, norms, said):
    command._check_before_training(command.parser().parse_args(["--norms", norms, "--run", "0"]), norms.split(","))
    assert not capsys.readouterr().err  # whoever trains a run of a list has seen the list
    command._check_before_training(command.parser().parse_args(["--norms", norms]), norms.split(","))
    err = capsys.readouterr().err
    assert said in err
    assert bool(err) == bool(said)


def test_the_same_seed_gives_the_same_run(job):
    arguments = [*job(), "--seeds", "1", "--run", "1", "--trainer.max_epochs", "1"]
    for out in ("a", "b"):
        compare.run([*arguments, "--out", out])
    first, second = (RunStore(Path(out)).read_all()[0] for out in "ab")
    for entry in ("history", "test", "parameters", "settings", "steps"):
        assert first[entry] == second[entry]


def test_help_shows_commands(capsys):
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--help"])
    assert "lightning-norm compare --config job.yaml" in capsys.readouterr().out
