"""Models, data and configurations to try the callbacks on; `lyapunov-lightning examples` writes them anywhere."""
