"""NormCLI: LightningCLI with the package's classes known by their short names, and its own job.

From the command line to the training, in this order:

1. ``--norm sn`` and ``--root DIR`` are written out (:func:`lightning_norm.cli.section.expand_norm`,
   :func:`expand_root`), and jsonargparse parses arguments and files; what is wrong becomes a few lines
   (:func:`clarify`).
2. The hyper-parameters of a ``ckpt_path`` go to the model (``_parse_ckpt_path``).
3. A plan is written out and the built-in job completed (``before_instantiate_classes``), then model and data are built.
4. The Trainer is built, with the swap before all callbacks (``instantiate_trainer``).
5. The subcommand runs, between ``before_fit`` and ``after_fit``.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import pkgutil
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import lightning.pytorch as pl
import lightning.pytorch.callbacks
import torch
import yaml
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

import lightning_norm.callbacks
import lightning_norm.plugins
from lightning_norm.callbacks import NormScheduler, NormSwap
from lightning_norm.callbacks.lightning_private import starts_processes
from lightning_norm.cli.parsing import nearest, with_nearest
from lightning_norm.cli.screen import QuietWorkers, bar_is_unreadable, screen_callbacks
from lightning_norm.cli.section import (
    PARSER_MODE,
    SECTION,
    add_section,
    check_sections,
    expand_norm,
    known_names,
    norm_swap_of,
    write_out_plan,
)
from lightning_norm.demo import job
from lightning_norm.demo.data import ImageData
from lightning_norm.errors import yaml_mistake
from lightning_norm.layers.base import Normalizer
from lightning_norm.normalizers import resolve
from lightning_norm.ops.sync import end_gloo_before_exit
from lightning_norm.schedules import composed, curves
from lightning_norm.surgery.checkpoint_files import check_file
from lightning_norm.surgery.manifest import manifest_in

DESCRIPTION = """{what}

example:
  lightning-norm {name} --model ImageClassifier {more}

Any LightningModule and LightningDataModule can be named, your own by its dotted path (--model my_module.MyModel), here
or in a file (--config job.yaml).
--root DIR is short for --data.init_args.root DIR.
"""
COMMANDS = {
    "fit": ("Train, validate every epoch; with the built-in job, test at the end.", "--norm sn --trainer.max_epochs 5"),
    "validate": ("Validate a checkpoint.", "--ckpt_path FILE.ckpt"),
    "test": ("Test a checkpoint.", "--ckpt_path FILE.ckpt"),
    "predict": ("Predict with a checkpoint.", "--ckpt_path FILE.ckpt"),
}


OURS = (job, lightning_norm.callbacks, curves, composed, lightning_norm.plugins)
NAMED = (*OURS, lightning.pytorch.callbacks)
"""Where the classes live that a configuration names without a prefix."""


class NormParser(LightningArgumentParser):
    """LightningCLI's parser; an error is the few lines that matter, with the nearest name."""

    def __init__(self, *args: Any, parser_mode: str = PARSER_MODE, also: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, parser_mode=parser_mode, **kwargs)
        # Of the command that has this parser read what it does not know itself.
        self.also = tuple(also)

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse; a configuration that is no text is an error of the user's."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            typed = [str(argument).rpartition("=")[2] for argument in (args[0] if args else ()) or ()]
            files = [path for path in typed if Path(path).is_file() and Path(path).read_bytes() == error.object]
            self.error(f"{files[0] if files else 'a configuration'} is no text in UTF-8: {error}")

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2 and the few lines of the message that matter."""
        if not self.exit_on_error:
            super().error(message, ex)
        # The options to suggest are those of the subcommand in which the mistake was made.
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [f"--{name}" for name, _ in parser.get_defaults().items()]
        self.exit(2, f"lightning-norm: error: {clarify(message, [*self.also, *options, *_options_of(parser)])}\n")


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser and of its subcommands, as they are typed."""
    # Most subcommands have the same ones, and which of them was meant is not known here.
    subparsers = [p for a in parser._actions for p in (getattr(a, "_name_parser_map", None) or {}).values()]
    options = [*parser._option_string_actions, *(o for p in subparsers for o in p._option_string_actions)]
    return [option for option in options if not option.endswith(".help")]


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the lines of a description as they are.

    It has a name in this module so that processes which are spawned can be sent the parser.
    """


class SavedConfig(SaveConfigCallback):
    """Save the configuration beside the logs; without a logger, under a name that is free."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Without a logger every run has the same folder, which may hold the user's own config.yaml: Lightning stops.
        if not self.already_saved and trainer.log_dir is not None:
            folder = Path(trainer.log_dir)
            names = (f"config-v{i}.yaml" if i else "config.yaml" for i in itertools.count())
            free = next(name for name in names if not (folder / name).exists())
            self.config_filename = trainer.strategy.broadcast(free)
        super().setup(trainer, pl_module, stage)


class NormCLI(LightningCLI):
    """LightningCLI for any model and data, in which ``class_path: NormSwap`` and ``ImageClassifier`` need no prefix.

    The section ``norm:`` holds the arguments of a :class:`lightning_norm.NormSwap` that comes before all callbacks:

    .. code-block:: yaml

        norm: {norm: sn, exclude: [bn1]}
        model: my_module.MyModel
        data: my_module.MyData
        trainer: {max_epochs: 90, callbacks: [NormMonitor]}

    With a ``ckpt_path``, the model takes the hyper-parameters that the file holds, and is swapped as the file says
    unless the configuration swaps it. The configuration is saved beside the logs, with a plan written out in full.

    Args:
        args: command line; ``sys.argv`` by default.
        run: with a subcommand, run it; otherwise only build model, data and Trainer.
        options: of LightningCLI.

    Raises:
        SystemExit: an argument or a configuration file is wrong; the message says where.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True, **options: Any) -> None:
        # Without subcommands there is one parser, and these are texts for several.
        if run:
            options.setdefault("parser_kwargs", _descriptions())
        super().__init__(
            pl.LightningModule,
            None,  # data are not required: a model may bring its own
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=NormParser,
            seed_everything_default=0,
            **({"save_config_callback": SavedConfig} | options),
            trainer_defaults={"max_epochs": 5},
            args=expand_root(expand_norm(list(args))) if args is not None else None,
            run=run,
        )

    _checkpoint: Mapping[str, Any] = MappingProxyType({})
    """What the file of ``--ckpt_path`` holds, without its tensors."""

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Lightning's arguments and the section ``norm:``."""
        super().add_core_arguments_to_parser(parser)
        add_section(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and refuse a section that holds one value where its options should be."""
        # As LightningCLI does, without its warning on arguments that come from the caller.
        self.config = parser.parse_args(args)
        command = self.config.get("subcommand")
        check_sections(self.config[command] if command else self.config)

    @override
    def _parse_ckpt_path(self) -> None:
        """Take the hyper-parameters of a checkpoint for the model, whoever wrote it.

        Lightning's method knows those that its own command wrote, with the class of the model among them.
        """
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path is None or _is_keyword(path):
            return
        # A missing or damaged file is told here, before a model is built.
        self._checkpoint = check_file(path)
        saved = dict(self._checkpoint.get("hyper_parameters") or {})
        saved.pop("_instantiator", None)
        written_for = saved.pop("_class_path", None)
        model = self.config[command].model
        if written_for not in (None, model.class_path):
            rank_zero_info(
                f"{path} was written for {written_for}; its hyper-parameters are used for {model.class_path}."
            )
        # What else was saved, such as the arguments of a data module, the class would refuse.
        known = inspect.signature(pkgutil.resolve_name(model.class_path)).parameters
        arguments = {name: value for name, value in saved.items() if name in known}
        if arguments:
            spec = {"class_path": model.class_path, "init_args": arguments}
            self.config = self.parser.parse_object({command: {"model": spec}}, self.config)

    @override
    def before_instantiate_classes(self) -> None:
        """Write out a plan; complete the built-in job: its data are Digits, the number of classes is theirs."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        write_out_plan(config[SECTION])
        # Another job has data of its own, and gets none that it did not ask for.
        if config.model.class_path != class_path(job.ImageClassifier):
            return
        if config.get("data") is None:
            # A parser of its own turns the name into a class and its defaults, without the rest of the configuration.
            parser = NormParser()
            parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True)
            config.data = parser.parse_object({"data": "Digits"}).data
        data = {class_path(c): c for c in built_in_data()}.get(config.data.class_path)
        if data is not None:
            data.check_installed()  # told before the network is built
        # A number that was typed stays; the model refuses one that does not fit.
        if data is not None and config.model.init_args.get("num_classes") is None:
            config.model.init_args.num_classes = data.num_classes

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer; the swap of the section ``norm:``, or of the checkpoint, comes before all callbacks."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        callbacks = config.trainer.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        path = config.get("ckpt_path")
        if (
            self.subcommand != "fit"
            and path
            and Path(path).is_file()
            and not any(isinstance(c, Checkpoint) for c in callbacks)
            and config.trainer.get("enable_checkpointing") is not False
        ):
            # The Trainer compares the folder of the file that it reads with the one it would write to.
            callbacks = [*callbacks, ModelCheckpoint(dirpath=Path(path).parent)]
        # The swap comes first: the other callbacks are to find the layers that are trained.
        swap = norm_swap_of(config.get(SECTION))
        if swap is None and not any(isinstance(c, NormSwap) for c in callbacks):
            swap = self._swap_of_checkpoint(path)
        # In front of the swap, which begins to watch its layers when the training starts.
        screen = screen_callbacks(config.trainer, callbacks) if self.subcommand == "fit" else []
        if not screen and bar_is_unreadable(config.trainer, callbacks):
            kwargs["enable_progress_bar"] = False
        kwargs["callbacks"] = [QuietWorkers(), *screen, *(() if swap is None else (swap,)), *callbacks]
        end_gloo_before_exit()  # also where nothing is swapped
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Swap now if the strategy starts processes, ``ddp_spawn`` say, before a callback is asked; tell of no swap."""
        swaps = [c for c in self.trainer.callbacks if isinstance(c, NormSwap)]  # type: ignore[attr-defined]
        if not swaps:
            rank_zero_info("No norm: nothing is swapped. Type --norm sn (say) to swap the BatchNorm layers.")
        # Nobody can call swap_before_launch from a command line.
        if starts_processes(self.trainer):
            for callback in swaps:
                callback.swap_before_launch(self.model)

    def _swap_of_checkpoint(self, path: str | None) -> NormSwap | None:
        """Return a callback that swaps the model as the checkpoint says, unless the model does that by itself.

        Args:
            path: of the checkpoint, which has been read by now.
        """
        manifest = manifest_in(self._checkpoint) if self._checkpoint else None
        if manifest is None:
            return None
        layers = dict(self.model.named_modules())
        present = [layers[row["name"]] for row in manifest["layers"] if row["name"] in layers]
        if present and all(isinstance(layer, Normalizer) for layer in present):
            return None
        rank_zero_info(f"The model is swapped as {path} says.")
        return NormSwap(plan=str(path))

    def after_fit(self) -> None:
        """Test the built-in job's best weights, or its last where no checkpoint is monitored, and say what is next."""
        # A run that was cut short has nothing to test.
        trainer = self.trainer
        if not trainer.state.finished or trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        checkpoint: Any = trainer.checkpoint_callback
        # Before a test, whose metrics take their place.
        line, compare = [], self._comparison()
        # Another job has its own idea of a test.
        if isinstance(self.model, job.ImageClassifier):
            # The best weights as validation saw them, so that the test set chooses nothing.
            best = "best" if getattr(checkpoint, "monitor", None) and checkpoint.best_model_path else None
            results = trainer.test(
                None if best else self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False
            )
            # With limit_test_batches=0 there is nothing to tell.
            accuracy = results[0]["test_acc"] if results else math.nan
            line.append(f"Test accuracy {accuracy:.3f}" + (f" (best {checkpoint.monitor})" if best else ""))
        if path := getattr(checkpoint, "best_model_path", ""):
            line.append(f"Weights: {_short(path)}")
        if isinstance(trainer.logger, TensorBoardLogger):
            line.append(f"TensorBoard: tensorboard --logdir {_short(trainer.logger.root_dir)}")
        if compare:
            line.append(f"compare: lightning-norm compare {compare}")
        if trainer.is_global_zero and line:
            print("     ".join(line), flush=True)

    def _comparison(self) -> str:
        """Return arguments of ``compare`` for the job that was trained; "" if its files or its metrics do not tell."""
        # A schedule is of a value that the other normalizers may not have.
        if any(isinstance(c, NormScheduler) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            return ""
        files = [_short(str(file)) for file in self.config.fit.get("config") or ()]
        built_in = isinstance(self.model, job.ImageClassifier)
        if built_in and not files:
            return "--norms bn,sn,bcn"
        # What the training itself logs would compare how well each norm fits the training data.
        logged = [name for name in self.trainer.callback_metrics if not name.startswith("train")]
        if not files or not (logged or built_in):
            return ""
        monitored = getattr(self.trainer.checkpoint_callback, "monitor", None)
        metric = "test_acc" if built_in else monitored or logged[0]
        typed = [*(word for file in files for word in ("--config", file)), "--norms", "bn,sn,bcn", "--metric", metric]
        return shlex.join(typed)


def expand_root(args: list[str]) -> list[str]:
    """Write ``--root DIR`` as ``--data.init_args.root DIR``, behind everything else: after the data was chosen.

    >>> expand_root(["fit", "--root", "d", "--data", "MNIST"])
    ['fit', '--data', 'MNIST', '--data.init_args.root', 'd']
    """
    # Behind all others, for the data may be chosen after --root, and its class clears earlier arguments.
    others: list[str] = []
    root: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--root":
            root = ["--data.init_args.root", *[value for value in [next(rest, None)] if value is not None]]
        elif arg.startswith("--root="):
            root = ["--data.init_args.root", arg.partition("=")[2]]
        else:
            others.append(arg)
    return others + root


def clarify(message: str, options: Sequence[str]) -> str:
    """Return a message of jsonargparse as one line: what went wrong where, and the nearest name.

    Args:
        message: of many lines, with every type that a value could have had.
        options: of the parser, among which the nearest name is looked for.

    >>> clarify("Subcommand 'fit' does not accept option 'trainer.max_epoch'", ["--trainer.max_epochs"])
    "Subcommand 'fit' does not accept option 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?"
    """
    if re.search(r"arguments are required: (\w+\.)?model$", message):
        return (
            "no model. Type --model my_module.MyModel for your own, --model ImageClassifier for the built-in one, or "
            "--config FILE."
        )
    if "unrecognized arguments: " in message:
        return with_nearest(message, options)
    text = _in_one_line(message)
    other = re.search(r"Import path ([\w.]+) does not correspond to a subclass of Lightning", text)
    if other and any(c.__module__.startswith("pytorch_lightning.") for c in pkgutil.resolve_name(other[1]).__mro__):
        return f"{text}. It is one of pytorch_lightning: type import lightning.pytorch as pl where it is defined."
    file = re.search(r"Unable to load config ['\"]?([\w.,]+)", text)
    if file and text.startswith(f"{SECTION}:") and not Path(file[1]).is_file():
        return f"{SECTION}: {_no_section(file[1])}"
    typo = re.search(
        r"(?:[Oo]ption|[Kk]ey|arguments?:?) '?-{0,2}([\w.]+)'? is not accepted|accept option '([\w.]+)'", text
    )
    if typo is None:
        name = re.search(r"(?:Expected a dot import path string: |has no attribute ')(\w+)", message)
        # jsonargparse imports any class_path itself, and knows no keys.
        if name and name[1] in known_names():
            path = f"lightning_norm.{resolve(name[1])[0].__name__}"
            return f"{text}. Type norm: {name[1]} with norm_args: {{...}}, or class_path: {path} in full."
        # The class of an argument of a class may be of any kind.
        known = _classes_for("" if "given class_path" in text else text.partition(":")[0])
        if module := re.search(r"module '([\w.]+)' has no attribute", text):
            known = [n for n, v in vars(sys.modules[module[1]]).items() if isinstance(v, type)]
        if absent := re.search(r"No module named '(\w+)'", text):
            # A module of the user's lies in the folder where the command is typed.
            name, known = absent, [module.name for module in pkgutil.iter_modules([str(Path.cwd())])]
        close = nearest(name[1], known) if name else None
        return text + (f". Did you mean {close!r}?" if close else "")
    known = [option.lstrip("-") for option in options]
    # The last class before the option has it, or lacks it; those behind were tried in its place.
    owner = re.findall(r"class_path '([\w.]+)'", text[: typo.start()]) or re.findall(r"class_path '([\w.]+)'", text)
    # A misspelt argument of a class is compared with the arguments of that class.
    if owner:
        known = list(inspect.signature(pkgutil.resolve_name(owner[-1])).parameters)
    # One guess: several would be as long as the help, which is one option away.
    near = nearest(typo[1] or typo[2], known)
    names = f" It takes {', '.join(known)}." if owner else ""
    return text + (f". Did you mean {near!r}?" if near else ".") + names


def _no_section(typed: str) -> str:
    """Return what to say of a text in the place of the section ``norm:``.

    >>> _no_section("sn,bn")
    "one normalizer in a training, got 'sn,bn'. Type lightning-norm compare --norms sn,bn."
    """
    if "," in typed:
        return f"one normalizer in a training, got {typed!r}. Type lightning-norm compare --norms {typed}."
    if typed.endswith((".yaml", ".yml", ".json")):
        return f"there is no file {typed!r}."
    return f"is a section with the arguments of NormSwap, got {typed!r}. Type {SECTION}: {{norm: {typed}}}."


def _in_one_line(message: str) -> str:
    """Return the reason in a message of many lines, which tells of every type that a value could have had.

    Args:
        message: of jsonargparse.
    """
    noise = (
        "Does not validate against",
        "Subtypes:",
        "Errors:",
        "Expected a <class 'NoneType'>",
        # The other form of a norm, of which nobody who typed a name thinks.
        "Expected a <class 'collections.abc.Mapping'>",
        "Expected a path but",
    )
    parts: list[str] = []
    choices: list[str] = []
    for line in message.splitlines():
        part = line.strip().removeprefix("- ")
        # What follows repeats the whole value, or lists every class that would have been valid.
        if part.startswith(("Given value", "Not a valid subclass")):
            break
        if part.startswith(noise):
            continue
        part = part.replace("Not of type NormName: ", "").removeprefix("Problems parsing config: ")
        part = re.sub(r"^Parser key \"([\w.+]+)\":", r"\1:", part)
        part = re.sub(r"^Expected a dot import path string: ([\w.]+)$", r"'\1' is no dotted path of a class", part)
        part = re.sub(r"^Expected a <class '(\w+)'>", r"expected \1", part)
        part = re.sub(r"^Unexpected config: ?(.*)", r"a configuration holds sections such as norm: sn, got: \1", part)
        if literal := re.match(r"Expected a typing.Literal\[(.*)\]", part):
            choices.append(literal[1])
        elif part and part not in parts:
            parts.append(part)
    if choices:
        parts.append(f"expected one of {', '.join(choices)}")
    while len(parts) > 1 and parts[-1].endswith(":"):
        parts.pop()  # a heading with nothing below
    typed = re.search(r"Given value: (\S.{0,60})$", message, re.MULTILINE)
    if typed and typed[1].startswith(("[", "{")):
        try:
            yaml.safe_load(typed[1])
        except yaml.YAMLError as error:
            return f"{parts[0].partition(':')[0]}: cannot read {typed[1]!r}: {yaml_mistake(error)}"
    if parts[-1].endswith(":"):
        parts.append("expected a mapping such as {name: value}")
    text = ""
    for part in parts:
        text += part if not text else f" {part}" if text.endswith(":") else f"; {part}"
    # Of an argument of a class jsonargparse tells the value by itself, and once more as an object of its own.
    text, told = re.subn(r"(expected \w+)\. Got value: (.+)$", r"\1, got '\2'", text)
    return f"{text}, got {typed[1]!r}" if typed and not told and parts[-1].startswith("expected ") else text


def _classes_for(key: str) -> list[str]:
    """Return the names of the classes that may stand at a key of the configuration, without their modules.

    Args:
        key: dotted, "trainer.callbacks+" for one.

    >>> "CosineAnnealingLR" in _classes_for("lr_scheduler"), "NormSwap" in _classes_for("trainer.callbacks+")
    (True, True)
    """
    last = key.rpartition(".")[2].rstrip("+")
    if last == SECTION:
        return sorted(known_names())
    if last in ("optimizer", "lr_scheduler"):
        module: Any = torch.optim if last == "optimizer" else torch.optim.lr_scheduler
        return [name for name in dir(module) if name[0].isupper()]
    base = {"model": pl.LightningModule, "data": pl.LightningDataModule, "callbacks": pl.Callback}.get(last, object)
    # Every public class of these modules may be written without a prefix.
    return [
        name
        for module in NAMED
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and not name.startswith("_")
    ]


def class_path(cls: type) -> str:
    """Return what the parsed configuration calls a class.

    >>> class_path(NormCLI)
    'lightning_norm.cli.norm_cli.NormCLI'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def built_in_data() -> list[type[ImageData]]:
    """Return the data sets that come with the built-in job."""
    return [job.Digits, job.MNIST, job.FashionMNIST, job.CIFAR10, job.CIFAR100]


def _descriptions() -> dict[str, Any]:
    """Return the help text of each subcommand."""
    return {
        name: {
            "description": DESCRIPTION.format(what=what, name=name, more=more),
            "formatter_class": HelpFormatter,
        }
        for name, (what, more) in COMMANDS.items()
    }


def _is_keyword(path: str) -> bool:
    """Tell whether Lightning itself finds the file: the best, the last, or one of a registry.

    >>> _is_keyword("best"), _is_keyword("last.ckpt")
    (True, False)
    """
    return path in ("best", "last", "hpc") or path.startswith("registry")


def _short(path: str) -> str:
    """Return a path as one would type it here."""
    # A relative path is shorter, and can be copied from the screen as long as one stays in this folder.
    here, there = Path.cwd(), Path(path).resolve()
    return str(there.relative_to(here)) if there.is_relative_to(here) else str(there)
