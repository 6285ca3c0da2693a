"""``python -m lyapunov_lightning`` is the command ``lyapunov-lightning``."""

from lyapunov_lightning.cli import run

if __name__ == "__main__":
    run()
