"""LightningCLI with one more command, `measure`. Importing this needs jsonargparse."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lyapunov_lightning import callbacks  # known by their short names once they are imported
from lyapunov_lightning.cli.errors import PROGRAM, explained, fail, own_error
from lyapunov_lightning.curvature.directions.plane import Plane, PlaneDirections
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.data.readings import HELD_BYTES
from lyapunov_lightning.training.lightning_names import MisconfigurationException

if TYPE_CHECKING:
    from lyapunov_lightning import SpectrumResult


_INTERRUPTED = 130
"""Exit status of a command that Ctrl-C has ended, by the convention of shells."""


class MeasuringTrainer(Trainer):
    """The Trainer with one more method, `measure`."""

    def measure(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str | None = None,
        largest: int = 5,
        smallest: int = 2,
        density: bool = False,
        lines: int = 0,
        plane: Plane | PlaneDirections | None = None,
        max_batches: int | None = None,
        max_batch_bytes: int = HELD_BYTES,
        resume: str | None = None,
        hessian: HessianConfig = HessianConfig(),
        out: str = "spectrum.png",
        weights_only: bool | None = None,
    ) -> "SpectrumResult":
        """Print a table of the ends of the Hessian's spectrum, and draw them.

        The table alone goes to the output: progress is shown on the error stream, if that is a terminal and
        ``--trainer.enable_progress_bar`` is not false. Ctrl-C ends the search with a table of what it has found by
        then, and the exit status 130.

        Args:
            model: The model whose training loss is measured.
            datamodule: The data on whose training dataloader it is measured.
            ckpt_path: The checkpoint to measure; without it the model as the configuration makes it, which is said.
            largest: How many of the largest eigenvalues.
            smallest: How many of the smallest.
            density: Whether to measure the density of the whole spectrum too.
            lines: Along how many eigenvectors of each end to scan the loss.
            plane: A plane to evaluate the loss on, at 441 points by default: ``eigenvectors``, ``gradient`` or
                ``random``, or ``plane.directions`` with ``plane.points`` and ``plane.reach``. Its contours are a
                picture of their own.
            max_batches: On how many batches to measure, the first ones of the data; on all by default.
            max_batch_bytes: How many bytes of batches may be held in memory. Data that take more are read anew for
                every product.
            resume: A file in which to keep the search while it is under way. The same command goes on with it where it
                was interrupted, by Ctrl-C, a kill or a crash; it is removed once all is measured.
            hessian: Which Hessian; by default that of all training data, in evaluation mode.
            out: The picture to write, as PNG; the same is written as SVG next to it. That of a plane has ``-plane`` at
                the end of its name.
            weights_only: Accepted because configurations written for ``fit`` have it; it has no effect here.

        """
        from lyapunov_lightning import measure

        if datamodule is None:
            raise MisconfigurationException(
                "`measure` does not know on which data to measure. Name them in the configuration, or with `--data`."
            )
        # A path with a protocol is opened by fsspec, which is the only one to know whether it exists.
        if ckpt_path is not None and "://" not in ckpt_path and not Path(ckpt_path).exists():
            raise FileNotFoundError(f"There is no checkpoint {ckpt_path}.")
        if ckpt_path is None and self.is_global_zero:
            sys.stderr.write(
                f"{PROGRAM}: no --ckpt_path is given, so the weights are those that the configuration makes, before any"
                " training.\n"
            )
        result = measure(
            model,
            datamodule,
            largest=largest,
            smallest=smallest,
            density=density,
            lines=lines,
            plane=plane,
            max_batches=max_batches,
            max_batch_bytes=max_batch_bytes,
            resume=resume,
            hessian=hessian,
            ckpt_path=ckpt_path,
            trainer=self,
        )
        # Every rank has the whole result, and one picture is enough.
        if self.is_global_zero:
            written = [result.plot().save(out)[0]] if largest + smallest or density else []
            if result.plane is not None:
                path = Path(out)
                written += result.plot_plane().save(path.with_name(f"{path.stem}-plane{path.suffix}"))[:1]
            named = "The picture" if len(written) == 1 else "The pictures"
            print(f"{result.summary()}\n\n{named}: {', '.join(map(str, written))}")
        if result.is_interrupted:
            raise SystemExit(_INTERRUPTED)
        return result


class Parser(LightningArgumentParser):
    """Reports errors in a few words, without the hundreds of arguments that the Trainer and the model have."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Whoever parses from Python, as tests and notebooks do, wants the exception and not the end of the process.
        if not self.exit_on_error:
            super().error(message, ex)
        short = explained(message)
        if "\n" in short:
            command = (getattr(ex, "subcommand_parser", None) or self).prog.split()[-1]
            subcommand = f" {command}" if command != PROGRAM else ""
            sys.stderr.write(f"{PROGRAM}: error: {short}\nAll arguments: {PROGRAM}{subcommand} --help\n")
            raise SystemExit(2)
        fail(short)


class CommandLine(LightningCLI):
    """LightningCLI with this package's callbacks known by their short names, and the command `measure`.

    Args:
        **kwargs: The arguments of LightningCLI.

    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(trainer_class=MeasuringTrainer, parser_class=Parser, **kwargs)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "measure": {"model", "datamodule"}}

    @override
    def before_instantiate_classes(self) -> None:
        if self.subcommand != "measure":
            return
        # Nothing is trained: the callbacks, loggers and checkpoints that the configuration has for a training are left
        # out, and its file is not written again.
        self.save_config_callback = None
        trainer: jsonargparse.Namespace = self.config["measure"]["trainer"]
        trainer["callbacks"] = None
        trainer["logger"] = False
        trainer["enable_checkpointing"] = False

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # Its cause: jsonargparse tells of all types that the Trainer takes as callbacks.
            cause = own_error(error)
            owner = None if cause is None else self._owner_of(str(cause))
            if owner is None:
                raise
            raise ValueError(f"{owner}: {cause}") from error

    def _owner_of(self, message: str) -> str | None:
        """The callback of this package whose arguments are refused with a message.

        The error itself may come from a value that is made before the callback, such as its `HessianConfig`.

        """
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        given = config["trainer"]["callbacks"]
        parts = [part for part in (given if isinstance(given, list) else [given]) if part is not None]
        for part in parts:
            name = str(part["class_path"]).rpartition(".")[2]
            if name in callbacks.__all__:
                try:
                    getattr(callbacks, name)(**part["init_args"].as_dict())
                except ValueError as error:
                    if str(error) == message:
                        return name
        return None
