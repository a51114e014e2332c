"""The command line of ``lightning-norm compare``.

'bn' is the network as it is; any other entry of --norms swaps its normalization layers. It is a key, or
YAML: {class_path: ubn, init_args: {threshold: 0.9}}, or entries of the section norm:, as {rules: {'layer4.*': sn}}, and
may have a label of its own: 'late: {rules: {...}}'. Entries of the whole configuration that hold for one of them
alone go under set: 'recalibrated: {norm: bn, set: {trainer.callbacks+: NormRecalibrate}}'.

Each finished run is one file in OUT/runs. The same command goes on where it stopped, and any number of processes may
share OUT: each takes the runs that no other one has. A scheduler of a cluster runs the lines of --list.

Examples:
  lightning-norm compare --norms bn,sn,bcn --seeds 5
  lightning-norm compare --config job.yaml --metric val/acc --norms 'bn,{class_path: ubn, init_args: {threshold: 0.9}}'
  lightning-norm compare --config job.yaml --norms bn,gn --sweep data.init_args.batch_size=2,8,32 --metric val/acc
  lightning-norm compare --config job.yaml --norms bn,sn --metric val/acc --list > jobs.txt
  lightning-norm compare --report compare --metric val/loss
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import Self

from lightning_norm.cli.compare.runs import BASELINE, Run, all_runs, read_contenders, read_sweeps
from lightning_norm.cli.compare.store import Record, RunStore
from lightning_norm.cli.parsing import CommandParser, own_options, path_of
from lightning_norm.errors import counted, did_you_mean

DESCRIPTION = """Train one job with several normalizers: same seeds, same data, same everything else.

The job is your own configuration of `lightning-norm fit` (--config FILE), or the built-in one on scikit-learn's digits.
Options that compare does not know are the job's: --trainer.max_epochs 3, --data FashionMNIST --root data.
"""
BUILT_IN = ("--model", "ImageClassifier", "--data", "Digits")
PATIENCE = 60.0
"""Seconds that a process has to end its batch in, before it is killed."""
LOWER_IS_BETTER = ("loss", "err", "mse", "mae", "rmse", "perplexity", "fid", "nll")


def run(argv: Sequence[str]) -> None:
    """Train what is missing, then print the table and write the report.

    1. Runs whose files are there, with the same settings, are not trained again.
    2. Of the others each normalizer and each point of the sweep is tried: a mistake is told within seconds.
    3. They are trained in this process, or in ``--jobs`` processes that take them one after another. A metric that
       the first one did not log ends the command.
    4. When all are there, the report is written. A worker, and a process with ``--run``, writes none.

    Args:
        argv: the arguments behind ``compare``.

    Raises:
        ValueError: an argument cannot be read, or OUT holds runs of other settings.
        SystemExit: with status 130 after Ctrl-C, 143 after SIGTERM.
    """
    # What this parser does not know belongs to the job, and LightningCLI refuses it if it is wrong.
    options, job = parser().parse_known_args(argv)
    if options.report:
        report_only(options, job)
        return
    job = job_of(options, job)
    runs, labels, baseline = _read(options)
    metric, higher = metric_of(options)
    if not options.list and not options.worker:
        _check_before_training(options, labels)
    store = RunStore(Path(options.out))
    settings = _settings_of(job, runs[0], store.folder)
    _check_folder(store, runs, settings)
    remaining = [r for r in runs if not _finished(store, r, settings)]
    # A worker was started, and a run of a list typed, by what has tried them.
    if not options.worker and options.run is None:
        check_metric(_records(store, runs), metric)
        _try(job, remaining, store.folder)
    if options.list:
        # A list that was read from a file has several lines, and each command is to be one.
        argv = [part.replace(options.norms, options.norms.replace("\n", " ")) for part in argv]
        for r in remaining:
            # The number and not the name: it is short, and the same command line gives the same numbers.
            print(shlex.join(["lightning-norm", "compare", *_without(argv, "--list"), "--run", str(runs.index(r))]))
        return
    if options.run is not None:
        if not 0 <= options.run < len(runs):
            raise ValueError(f"--run {options.run}: the runs are numbered 0 to {len(runs) - 1}.")
        remaining = [r for r in remaining if r is runs[options.run]]
    interruption = Interruption()
    try:
        with interruption:
            if options.jobs > 1 and len(remaining) > 1:
                _spread(argv, options.jobs, store, remaining, metric, interruption)
            else:
                _train(store, remaining, job, options, interruption, settings)
    except KeyboardInterrupt:
        # Read from the folder, for other processes may have finished some.
        done = len(_records(store, runs))
        print(f"\nStopped: {done} of {counted(len(runs), 'run')} done. The same command goes on.", file=sys.stderr)
        raise SystemExit(interruption.status) from None
    # The process that started the workers, or a later command, writes the report.
    if options.worker or options.run is not None:
        return
    # What other processes have trained here in the meantime may be of another job.
    for r in runs:
        _finished(store, r, settings)
    _report(store, lambda: _records(store, runs), options, baseline, metric, higher)


def _read(options: argparse.Namespace) -> tuple[list[Run], list[str], str]:
    """Return all runs, the labels of the normalizers, and that of the baseline.

    Raises:
        ValueError: an option cannot be read, or names nothing that there is.
    """
    if options.seeds < 1 or options.jobs < 1:
        raise ValueError(f"compare needs --seeds and --jobs of at least 1, got {options.seeds} and {options.jobs}.")
    contenders = read_contenders(options.norms)
    labels = [c.label for c in contenders]
    baseline = options.baseline or (BASELINE if BASELINE in labels else labels[0])
    if baseline not in labels:
        raise ValueError(f"--baseline {baseline!r} is none of the normalizers compared: {', '.join(labels)}.")
    return all_runs(contenders, read_sweeps(options.sweep), range(options.seeds)), labels, baseline


def _records(store: RunStore, runs: Sequence[Run]) -> list[Record]:
    """Return those that have finished."""
    return [record for record in (store.read(r.name) for r in runs) if record is not None]


def _check_before_training(options: argparse.Namespace, labels: Sequence[str]) -> None:
    """Tell before hours of training what would be missed after them.

    Args:
        options: what was typed.
        labels: of the normalizers.
    """
    from lightning_norm.cli.compare.comparison import check_pictures

    check_pictures()
    # No error: a sweep of one normalizer is a curve.
    if len(labels) == 1 and options.run is None:
        both = ",".join([BASELINE, "sn"] if labels == [BASELINE] else [BASELINE, options.norms.strip()])
        print(f"{labels[0]} alone, with nothing to compare it with. Type --norms '{both}', say.", file=sys.stderr)


def job_of(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the arguments of the job, as `lightning-norm fit` takes them.

    Raises:
        ValueError: they name a norm, and each run has its own.
    """
    if any(argument.split("=")[0] in ("--norm", "--norm.norm") for argument in rest):
        raise ValueError("compare takes the normalizers as --norms bn,sn: leave out --norm.")
    # In front, so that options of the command line win over the files.
    files = [text for file in options.config for text in ("--config", file)]
    return [*(files or BUILT_IN), *rest]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options."""
    made = CommandParser("compare", DESCRIPTION, __doc__)
    made.add_argument("--norms", default="bn,sn,bcn", help="normalizers, separated by commas (default: %(default)s)")
    made.add_argument(
        "--config", action="append", default=[], metavar="FILE",
        help="the job, as `lightning-norm fit --config` takes it; of several, each wins over those before it",
    )  # fmt: skip
    made.add_argument(
        "--seeds", type=int, default=3, help="runs per normalizer, seeds 0, 1, ... (default: %(default)s)"
    )
    made.add_argument("--metric", help="what is compared, a name that the job logs (built-in job: test_acc)")
    made.add_argument("--mode", choices=("max", "min"), help="which is better; by default told by the metric's name")
    made.add_argument(
        "--take", choices=("last", "best"), default="last",
        help="the last epoch's value, or the best one's; 'best' tests the monitored checkpoint (default: last)",
    )  # fmt: skip
    made.add_argument(
        "--sweep", action="append", default=[], metavar="ENTRY=A,B",
        help="train with each value of an entry of the configuration; may be given several times",
    )  # fmt: skip
    made.add_argument("--baseline", help="which normalizer the others are held against (default: bn, or the first)")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine (default: %(default)s)")
    made.add_argument("--list", action="store_true", help="print the runs that remain, one command each, and stop")
    made.add_argument("--run", type=int, metavar="N", help="train only the run of that number, without a report")
    made.add_argument(
        "--report", type=path_of("--report compare"), metavar="FOLDER",
        help="draw the results in FOLDER again, without training",
    )  # fmt: skip
    made.add_argument(
        "--out", type=path_of("--out compare"), default="compare", help="folder of the results (default: %(default)s)"
    )
    # For processes that this command starts itself, with --jobs.
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def metric_of(options: argparse.Namespace) -> tuple[str, bool]:
    """Return the metric's name and whether more of it is better.

    Args:
        options: what was typed: ``metric``, ``mode`` and ``config``.

    Raises:
        ValueError: no metric was named for a job of one's own.

    >>> metric_of(argparse.Namespace(metric="val/loss", mode=None, config=["job.yaml"]))
    ('val/loss', False)
    """
    metric = options.metric
    if metric is None:
        if options.config:
            raise ValueError(
                "compare needs the metric: --metric NAME, a name that your model logs, such as the one that your "
                "ModelCheckpoint monitors."
            )
        metric = "test_acc"
    # Typed by the user, so it wins over the guess from the name.
    if options.mode:
        return metric, options.mode == "max"
    return metric, not any(part in metric.lower() for part in LOWER_IS_BETTER)


def report_only(options: argparse.Namespace, job: Sequence[str]) -> None:
    """Draw the report of a folder again.

    Args:
        options: what was typed, with the folder as ``report``.
        job: arguments that are none of the command's own.

    Raises:
        ValueError: there is no finished run, or arguments of a job were given.
    """
    # Ignored arguments would look as if the report were of another job.
    if job:
        raise ValueError(f"compare --report trains nothing and takes no arguments of a job, got {' '.join(job)}.")
    store = RunStore(Path(options.report))
    records = store.read_all()
    for record in records[1:]:
        differ = _other_settings(records[0], record["settings"], [records[0], record])
        if records[0]["sweep"].keys() != record["sweep"].keys():
            differ["--sweep"] = ([*records[0]["sweep"]], [*record["sweep"]])
        if differ:
            raise ValueError(_do_not_compare(store, differ))
    labels = list(dict.fromkeys(record["label"] for record in records))
    baseline = options.baseline or (BASELINE if BASELINE in labels else labels[0])
    earlier = store.read_report()
    if earlier and options.metric in (None, earlier["metric"]):
        options.metric = earlier["metric"]
        options.mode = options.mode or ("max" if earlier["higher_is_better"] else "min")
    metric, higher = metric_of(options)
    _report(store, store.read_all, options, baseline, metric, higher)


def _report(
    store: RunStore,
    read: Callable[[], list[Record]],
    options: argparse.Namespace,
    baseline: str,
    metric: str,
    higher: bool,
) -> None:
    """Print the table, and write the report into the folder."""
    # Imported late: workers draw nothing.
    from lightning_norm.cli.compare import comparison

    def made_of(records: list[Record]) -> comparison.Report:
        check_metric(records, metric)
        return comparison.Report(records, metric, higher, options.take == "best", baseline)

    made = made_of(read())
    print(made.text())
    with store.writes_report():
        # Whoever had the lock before may have written a report of more runs, which this one is not to take back.
        if ended := len(now := read()) - len(made.records):
            print(f"{counted(ended, 'run has', 'runs have')} ended since, and {'is' if ended == 1 else 'are'} below.")
            print((made := made_of(now)).text())
        written = made.save(store.folder)
    for path in written:
        print(path)


def check_metric(records: Sequence[Record], metric: str) -> None:
    """Refuse a metric that some run does not have.

    Args:
        records: of all runs.
        metric: a name that was logged.

    Raises:
        ValueError: with the nearest name and all that were logged.

    >>> check_metric([{"test": {"test_acc": 0.9}, "history": {}}], "test_acc")
    """
    for record in records:
        known = [*record["test"], *record["history"]]
        if metric not in known:
            raise ValueError(
                f"the runs logged no metric {metric!r}.{did_you_mean(metric, known)} Logged: "
                f"{', '.join(dict.fromkeys(known)) or 'none'}. "
                "Nothing is lost: the same command with another --metric goes on from the runs that are done."
            )


def _train(
    store: RunStore,
    runs: Sequence[Run],
    job: Sequence[str],
    options: argparse.Namespace,
    interruption: Interruption,
    settings: Mapping[str, str],
) -> None:
    """Train the runs that no other process trains, one after the other, and wait for those.

    Args:
        store: the folder, whose locks tell which run another process has.
        runs: without a result so far.
        job: arguments of ``fit``.
        options: what was typed.
        interruption: by a signal.
        settings: of the job.

    Raises:
        ValueError: another process writes runs of other settings into the folder.
    """
    # Imported late: --help does not wait for Lightning.
    from lightning_norm.cli.compare.training import quiet, train

    elsewhere: list[Run] = []
    terminal = sys.stderr.isatty()
    with quiet(), tqdm(runs, desc="runs", unit="run", disable=not runs or options.worker or not terminal) as bar:
        for number, r in enumerate(bar, start=1):
            interruption.check()
            name = " ".join([r.contender.label, *(f"{k}={v}" for k, v in r.sweep), f"seed {r.seed}"])
            bar.set_postfix_str(name)
            # A bar moves the cursor, which makes a file of its output unreadable.
            if not terminal and not options.worker:
                print(f"Run {number}/{len(runs)}  {name}", file=sys.stderr, flush=True)
            with store.claim(r.name) as claimed:
                # Left to the process that has it, so that the others go on with what is free.
                if not claimed:
                    elsewhere.append(r)
                elif store.read(r.name) is None:  # another process may have finished it since
                    record = train(r, job, store.folder, options.take == "best", interruption.check)
                    # Two that begin at once both meet an empty folder: it belongs to the one that ends a run first.
                    _check_folder(store, runs, settings)
                    store.write(r.name, record)
                    # Told behind the first run and not the last. Of workers the process that started them tells it.
                    if not options.worker:
                        check_metric([record], metric_of(options)[0])
    if not options.worker:
        _wait(store, elsewhere, interruption)


def _wait(store: RunStore, runs: Sequence[Run], interruption: Interruption) -> None:
    """Wait for runs that other processes train.

    Args:
        store: the folder that they share.
        runs: that were claimed when this process came to them.
        interruption: by a signal.

    Raises:
        RuntimeError: such a process has ended without a result.
    """
    if any(store.read(r.name) is None for r in runs):
        print(f"Trained by other processes that share {store.folder}: {counted(len(runs), 'run')}. Waiting.")
    for r in runs:
        while store.read(r.name) is None:
            interruption.check()
            with store.claim(r.name) as free:
                # The lock ends with its process, so a free one without a result means that the process has died.
                if free and store.read(r.name) is None:
                    raise RuntimeError(
                        f"the run {r.name} was begun by another process, which ended without a result. The same "
                        "command trains it."
                    )
            time.sleep(1)


def _spread(
    argv: Sequence[str], jobs: int, store: RunStore, runs: Sequence[Run], metric: str, interruption: Interruption
) -> None:
    """Let several processes of this command take the runs one after another; show how many are done.

    Args:
        argv: the arguments of this command, which the processes get as well.
        jobs: how many processes.
        store: the folder that they share.
        runs: that remain.
        metric: that each of them is to have logged.
        interruption: by a signal.

    Raises:
        RuntimeError: a process has failed; with the end of what it wrote.
        ValueError: a run did not log the metric.
    """
    # Each process would otherwise take all cores, and all of them together run slower than one.
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", "lightning_norm", "compare", *argv, "--jobs", "1", "--worker"]
    with contextlib.ExitStack() as files:
        # Files and no pipes: a process would stand still once a pipe that nobody reads is full.
        errors = [files.enter_context(tempfile.TemporaryFile()) for _ in range(min(jobs, len(runs)))]
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for file in errors:
                workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file))
            terminal = sys.stderr.isatty()
            with tqdm(total=len(runs), desc="runs", unit="run", disable=not terminal) as bar:
                done = 0
                while True:
                    interruption.check()
                    running = [w for w in workers if w.poll() is None]
                    # Counted in the folder: the workers do not talk to this process.
                    records = _records(store, runs)
                    before, done = done, len(records)
                    bar.update(done - before)
                    check_metric(records, metric)
                    if not terminal and done > before:
                        print(f"Runs {done}/{len(runs)}", file=sys.stderr, flush=True)
                    if not running:
                        break
                    time.sleep(0.5)
        except BaseException:
            # Ctrl-C reaches them too, but another error in this process would leave them training.
            _end(workers)
            raise
        for worker, file in zip(workers, errors, strict=True):
            if worker.returncode:
                # The end of it: the exception stands behind all warnings.
                file.seek(0)
                error = file.read().decode(errors="replace")
                raise RuntimeError(
                    f"one of {len(workers)} processes ended with status {worker.returncode}:\n{error[-2000:]}"
                )


class Interruption:
    """Ctrl-C, or SIGTERM, by which a scheduler ends a job: each raises a KeyboardInterrupt, and is not forgotten.

    Python drops an exception that is raised while it collects garbage, say, and code of others may catch it. So whoever
    goes on asks :meth:`check` now and then.

    Attributes:
        status: to end the process with.
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGINT
        self._came = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only it may say what a signal does
            for number in (signal.SIGINT, signal.SIGTERM):
                # What a shell has ignored, as it does Ctrl-C of what runs in the background, stays so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _interrupt(self, number: int, _: object) -> None:
        self.status, self._came = 128 + number, True
        self.check()

    def check(self) -> None:
        """Raise a KeyboardInterrupt if there was a signal."""
        if self._came:
            raise KeyboardInterrupt


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and wait for them: each holds the claim of its run until then, and the next command wants it."""
    try:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            # Lightning ends a training at the end of its batch.
            worker.wait(PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # too long, or a second Ctrl-C
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()


def _settings_of(job: Sequence[str], run: Run, folder: Path) -> dict[str, str]:
    """Return what the job's configuration says, which all runs of a folder must share.

    Args:
        job: arguments of ``fit``.
        run: whose contender is parsed with them.
        folder: of the comparison.

    Raises:
        SystemExit: an argument or a configuration file is wrong; the message says where.
    """
    from lightning_norm.cli.compare.training import JobCLI, quiet

    # LightningCLI has no way to parse alone: an exception ends it before the model is built.
    class Parsed(Exception):  # noqa: N818  # no error: it ends the construction where everything is parsed
        pass

    class ParsedOnly(JobCLI):
        def instantiate_classes(self) -> None:
            raise Parsed(self.settings)

    try:
        with quiet():
            also = {"also": own_options(parser())}
            ParsedOnly([*job], run.contender.swap, [], folder, run.name, parser_kwargs=also)
    except Parsed as parsed:
        settings: dict[str, str] = parsed.args[0]
    return settings


def _try(job: Sequence[str], runs: Sequence[Run], folder: Path) -> None:
    """Parse each normalizer and each point of the sweep, and plan each swap, so that no mistake waits for its turn.

    Args:
        job: arguments of ``fit``.
        runs: that remain.
        folder: of the comparison.

    Raises:
        SystemExit: an entry of the sweep, or one under ``set``, is wrong; the message says where.
        TypeError: a normalizer takes no such argument.
        ValueError: a normalizer or a choice of layers does not fit the model.
    """
    from lightning_norm.cli.compare.training import plan_swap

    # Each once, and not all with all: a parse takes a second, and a large model its time to build.
    at_points = {r.sweep: r for r in reversed(runs)}.values()
    of_labels = {r.contender.label: r for r in reversed(runs)}.values()
    for run in {r.name: r for r in (*at_points, *of_labels)}.values():
        _settings_of(run.arguments(job), run, folder)
    for run in of_labels:
        if run.contender.swap:
            plan_swap(run, run.arguments(job), folder)


def _check_folder(store: RunStore, runs: Sequence[Run], settings: Mapping[str, str]) -> None:
    """Refuse a folder of another comparison before anything is trained into it.

    Args:
        store: the folder.
        runs: of this comparison.
        settings: of the job as it is now.

    Raises:
        ValueError: a run in it has other settings, or another sweep.
    """
    for name in store.names():
        record = store.read(name)
        # Another process may have deleted it since.
        if record is None:
            continue
        swept = dict(runs[0].sweep)
        differ = _other_settings(record, settings, [{"sweep": swept, "set": {}}, record])
        if record["sweep"].keys() != swept.keys():
            differ["--sweep"] = ([*record["sweep"]], [*swept])
        if differ:
            raise ValueError(_do_not_compare(store, differ))


def _finished(store: RunStore, r: Run, settings: Mapping[str, str]) -> bool:
    """Tell whether a run is there already.

    Args:
        store: the folder.
        r: the run.
        settings: of the job as it is now.

    Raises:
        ValueError: it is there with other settings or another meaning of its label.
    """
    from lightning_norm.cli.compare.training import plain

    record = store.read(r.name)
    if record is None:
        return False
    differ = _other_settings(record, settings, [{"sweep": dict(r.sweep), "set": r.contender.entries}])
    for entry, now in (("swap", r.contender.swap), ("set", r.contender.entries)):
        if record[entry] != plain(now):
            differ[r.contender.label] = (record[entry], now)
    if differ:
        raise ValueError(_do_not_compare(store, differ))
    return True


def _other_settings(record: Record, settings: Mapping[str, str], runs: Sequence[Record]) -> dict[str, tuple[Any, Any]]:
    """Return in what the settings of a run differ from others: name -> (of the run, of the others).

    Args:
        record: the run.
        settings: the others.
        runs: whose ``sweep`` and ``set`` name what differs between the runs of one comparison by design.
    """
    swept = [key.rstrip("+") for run in runs for key in (*run["sweep"], *run["set"])]
    return {
        name: (record["settings"].get(name), settings.get(name))
        for name in sorted(record["settings"].keys() | settings.keys())
        if record["settings"].get(name) != settings.get(name)
        and not any(name == key or name.startswith(f"{key}.") for key in swept)
    }


def _do_not_compare(store: RunStore, differ: Mapping[str, tuple[Any, Any]]) -> str:
    shown = "; ".join(f"{name}: {then!r} then, {now!r} now" for name, (then, now) in list(differ.items())[:3])
    return (
        f"{store.folder} holds runs with other settings ({shown}): runs of different settings do not compare. Choose "
        "another folder with --out, or delete this one."
    )


def _without(argv: Sequence[str], option: str) -> list[Any]:
    return [argument for argument in argv if argument != option]
