"""The command line: what it says of itself, of the callbacks and of errors, the command `measure`, the examples."""

import os
import re
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer

from lyapunov_lightning import __version__, callbacks, search_under_way
from lyapunov_lightning.cli import TRAINER_COMMANDS, main
from lyapunov_lightning.cli.errors import own_error
from lyapunov_lightning.cli.help import callback_help, plain, reflowed
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.reporting import progress

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "configs" / "quickstart.yaml"
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.enable_checkpointing=false")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lyapunov-lightning"])  # LightningCLI warns of arguments in both places


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command prints that ends the program well."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert not exit_info.value.code
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of our own that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    own = [line for line in lines if line.startswith("lyapunov-lightning")]
    assert own == lines[-1:]
    assert "Traceback" not in "".join(lines)
    return own[0].removeprefix("lyapunov-lightning: error: ")


class Manual(LightningModule):
    """A module that the callbacks refuse, when it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.layer(batch).sum().backward()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> list[torch.Tensor]:
        return [torch.ones(3, 2)]


class Broken(Manual):
    """A module with a mistake of its own."""

    def __init__(self) -> None:
        super().__init__()
        raise ValueError("This is the module's own business.")


def test_help_names_all_commands_and_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert all(does in " ".join(text.split()) for does in TRAINER_COMMANDS.values())
    assert "\n    examples " in text
    assert "curvature" in text
    assert printed(capsys, "--version") == f"lyapunov-lightning {__version__}\n"


def test_unknown_command_is_an_error_that_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fti"])
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    assert all(name in text for name in (*TRAINER_COMMANDS, "examples"))


def test_help_and_examples_load_no_lightning(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom lyapunov_lightning.cli import main\nmain(['examples'])\n"
        "print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", callbacks.__all__)
def test_help_of_a_callback_says_what_it_is_logs_and_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "fit", f"--trainer.callbacks.help={name}")
    assert text.strip() == callback_help(name).strip()
    what, _, arguments = text.partition("\nArguments:\n")
    assert what.startswith(f"{name}\n\n")
    assert "\nLogged" in what
    assert f"{getattr(callbacks, name).group}/" in what.partition("\nLogged")[2]
    assert "--trainer.callbacks.every_n_steps" in arguments
    assert "--trainer.callbacks.hessian.seed" in arguments
    for markup in ("`", ":math:", ".. math", "\\", "**"):
        assert markup not in text
    assert max(map(len, what.splitlines())) < 80


def test_help_without_a_name_and_of_other_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "fit", "--trainer.callbacks.help")
    assert all(f"\n  {name}\n" in text for name in callbacks.__all__)
    assert "--trainer.callbacks.patience" in printed(capsys, "fit", "--trainer.callbacks.help", "EarlyStopping")


def test_markup_becomes_plain_text() -> None:
    text = "*Sharp* and ``a * b``, **bold**, `Name.of`, α*λ, gᵀv / λ_max"
    assert plain(text) == "Sharp and a * b, bold, Name.of, α*λ, gᵀv / λ_max"
    assert reflowed("as\n\n    α = min(1, x)\n\nwith\nx", 9) == "as\n\n  α = min(1, x)\n\nwith x"
    assert reflowed("one\ntwo\n\n- three\n  four\n- five", 9) == "one two\n\n- three\n  four\n- five"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("CurvatureProb", "no callback 'CurvatureProb'. Did you mean CurvatureProbe?"),
        ("lyapunov_lightning.SpectrumTraker", "no callback 'SpectrumTraker'. Did you mean SpectrumTracker?"),
    ],
)
def test_unknown_callback_in_a_configuration(
    change: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(QUICKSTART.read_text().replace("CurvatureProbe", change))
    error = error_of(capsys, "fit", "--config", str(config))
    assert said in error
    assert all(name in error for name in callbacks.__all__)


@pytest.mark.parametrize("option", ["--trainer.callbacks=NoSuchProbe", "--trainer.callbacks+=NoSuchProbe"])
def test_unknown_callback_among_the_arguments(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "fit", option)
    assert "no callback 'NoSuchProbe'" in error
    assert all(name in error for name in callbacks.__all__)
    assert "no callback 'Probe'" in error_of(capsys, "fit", "--trainer.callbacks.help", "Probe")


def test_wrong_argument_of_a_callback_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    for wrong, said in (
        ("every_n_step: 5", "CurvatureProbe: Option 'every_n_step' is not accepted."),
        ("every_n_steps: 0", "CurvatureProbe: `every_n_steps` should be a positive int, got 0."),
        ("hessian: {fraction: 2}", "CurvatureProbe: `fraction` should be in (0, 1], got 2.0."),
        ("schedule: {at_steps: [-1]}", "CurvatureProbe: `at_steps` should hold non-negative ints, got [-1]."),
    ):
        config.write_text(QUICKSTART.read_text().replace("        every_n_steps: 5", f"        {wrong}"))
        assert error_of(capsys, "fit", "--config", str(config)).startswith(said)


def test_other_errors_of_arguments_come_without_the_list_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(QUICKSTART), "--trainer.max_steps=many"])
    text = capsys.readouterr().err
    assert "trainer.max_steps" in text
    assert text.endswith("All arguments: lyapunov-lightning fit --help\n")
    assert len(text.splitlines()) < 5


@pytest.mark.filterwarnings("ignore")
def test_refusal_while_fitting_is_one_line_and_errors_of_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ("fit", *QUIET, "--trainer.callbacks=CurvatureProbe", "--trainer.accelerator=cpu")
    assert error_of(capsys, *fit, "--model=tests.test_cli.Manual").startswith("`CurvatureProbe` cannot")
    with pytest.raises(ValueError, match="own business"):
        main([*fit, "--model=tests.test_cli.Broken"])


def test_own_errors_are_those_that_the_package_raises() -> None:
    def error_in(call: object) -> BaseException:
        try:
            call()
        except Exception as error:
            return error
        raise AssertionError

    own = error_in(lambda: callbacks.CurvatureProbe(every_n_steps=0))
    assert own_error(own) is own

    def with_a_cause() -> None:
        try:
            callbacks.CurvatureProbe(every_n_steps=0)
        except ValueError as error:
            raise RuntimeError("Lightning says") from error

    found = own_error(error_in(with_a_cause))
    assert isinstance(found, ValueError)
    assert own_error(error_in(lambda: callbacks.CurvatureProbe(nonsense=1))) is None
    assert own_error(error_in(lambda: reflowed("text", "wide"))) is None  # raised by Python, while our code runs
    assert own_error(error_in(lambda: callback_help("NoSuchProbe"))) is None  # no message to a user
    assert own_error(MisconfigurationException("not raised by anybody")) is None


@pytest.mark.filterwarnings("ignore")
def test_measure_prints_a_table_and_draws_and_no_callback_acts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--data.steps_per_epoch=1", "--trainer.enable_progress_bar=false")
    fitted = main(["fit", "--config", str(QUICKSTART), *few, "--trainer.max_steps=3"])
    (checkpoint,) = tmp_path.glob("logs/**/*.ckpt")
    (saved,) = tmp_path.glob("logs/**/config.yaml")  # what `fit` writes, with arguments that only `fit` has
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()

    def acts(*args: object) -> None:
        raise AssertionError("A callback of the configuration was set up.")

    monkeypatch.setattr(callbacks.CurvatureProbe, "setup", acts)
    monkeypatch.setattr(callbacks.CurvatureProbe, "__init__", acts)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with_bar = "--trainer.enable_progress_bar=true"  # which `fit` had without
    few_values = ("--largest=2", "--smallest=1")
    measured = main(["measure", "--config", str(saved), with_bar, "--ckpt_path", str(checkpoint), *few_values])
    text, progress_and_notices = capsys.readouterr()
    assert "Hessian-vector products: " in progress_and_notices
    assert "more by the trend, at most" in progress_and_notices
    assert "--ckpt_path" not in progress_and_notices
    assert text.startswith("Hessian of the training loss of Classifier")
    assert "\r" not in text
    assert text.rstrip().endswith("The picture: spectrum.png")
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [tmp_path / "spectrum.png", tmp_path / "spectrum.svg"]
    assert all(f"\n{name} " in text for name in ("1", "2", "min_1"))
    # The parameters are those of the checkpoint, and the trainer is that of the configuration.
    assert f"loss {fitted.trainer.callback_metrics['train/loss']:.2g}"[:7] in text
    assert isinstance(measured.trainer, Trainer)

    fresh = ("--largest=1", "--smallest=0", "--max_batches=1", "--out=fresh.png")
    main(["measure", "--config", str(saved), *fresh])
    text, notices = capsys.readouterr()
    assert "no --ckpt_path is given, so the weights are those that the configuration makes" in notices
    assert "products" not in notices  # the bar is off
    assert "the first 1 batch, evaluation mode" in text

    # Ctrl-C in the fourth product, and again the same command.
    whole = text
    products = iter(range(100))
    begin_product = search_under_way.Clock.begin_product

    def interrupted(clock: object) -> None:
        if next(products) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        begin_product(clock)

    with monkeypatch.context() as patched:
        patched.setattr(search_under_way.Clock, "begin_product", interrupted)
        with pytest.raises(SystemExit) as ended:
            main(["measure", "--config", str(saved), *fresh, "--resume=search.pt"])
    assert ended.value.code == 130
    text = capsys.readouterr().out
    assert "interrupted during the search" in text
    assert Path("search.pt").exists()
    main(["measure", "--config", str(saved), *fresh, "--resume=search.pt"])
    assert (
        capsys.readouterr().out.partition("Hessian-vector products")[0] == whole.partition("Hessian-vector products")[0]
    )
    assert not Path("search.pt").exists()

    over = ("--plane.directions=gradient", "--plane.points=3", "--plane.reach=0.1")
    main(["measure", "--config", str(saved), *fresh, *over])
    told = capsys.readouterr().out
    assert "over the plane of 1 and gradient: the lowest loss lies" in told
    assert told.rstrip().endswith("The pictures: fresh.png, fresh-plane.png")
    assert {"fresh-plane.png", "fresh-plane.svg"} <= {path.name for path in tmp_path.iterdir()}
    main(["measure", "--config", str(saved), "--largest=0", "--smallest=0", "--plane=random", "--out=p.of.png"])
    assert capsys.readouterr().out.rstrip().endswith("The picture: p.of-plane.png")

    assert error_of(capsys, "measure", "--config", str(saved), "--ckpt_path=nowhere.ckpt") == (
        "There is no checkpoint nowhere.ckpt."
    )
    of_checkpoint = ("measure", "--config", str(saved), "--ckpt_path", str(checkpoint))
    assert "`largest` should be" in error_of(capsys, *of_checkpoint, "--largest=-1")
    too_few = ("--largest=1", "--smallest=0", "--plane=eigenvectors")
    assert "`plane='eigenvectors'` takes 2" in error_of(capsys, *of_checkpoint, *too_few)
    assert "on which data" in error_of(capsys, "measure", "--model=tests.test_cli.Manual")


def test_six_examples_are_written_one_for_each_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples"]) is None
    assert "lyapunov-lightning examples --all" in capsys.readouterr().out
    written = [path for path in (tmp_path / "examples").rglob("*") if path.is_file()]
    configs = [yaml.safe_load(path.read_text()) for path in written if path.suffix == ".yaml"]
    assert len(configs) == 6
    assert len(written) == 9
    first = [config["trainer"]["callbacks"][0]["class_path"] for config in configs]
    assert sorted(first) == sorted(callbacks.__all__)
    named = {module for path in written for module in re.findall(r"\bexamples\.(\w+)\.", path.read_text())}
    assert named == {"data", "models"}
    assert main(["examples", "--all"]) is None  # the six are no obstacle
    assert (tmp_path / "examples" / "papers").is_dir()


def test_what_the_start_page_tells_to_install_is_what_its_commands_need(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (extra,) = re.findall(r"pip install 'lyapunov_lightning\[(\w+)\]'", printed(capsys, "--help"))
    main(["examples"])
    assert f"lyapunov_lightning[{extra}]" in capsys.readouterr().out
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {"jsonargparse", "scikit-learn"} <= set(re.findall(r"^[\w-]+", setup["options.extras_require"][extra], re.M))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs scikit-learn.*lyapunov_lightning\[{extra}\]"):
        main(["fit", "--config", str(QUICKSTART), *QUIET])


def test_examples_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", "--all", "there"]) is None
    assert "cd there && lyapunov-lightning fit --config examples/configs/quickstart.yaml" in capsys.readouterr().out
    written = tmp_path / "there" / "examples"
    sources = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".yaml", ".md")]
    assert len(sources) > 10
    for path in sources:
        assert (written / path.relative_to(ROOT / "examples")).read_bytes() == path.read_bytes()
    (written / "data.py").write_text("mine")
    (written / "models.py").unlink()
    assert "is there already, and differs" in error_of(capsys, "examples", "there")
    assert (written / "data.py").read_text() == "mine"
    assert not (written / "models.py").exists()
