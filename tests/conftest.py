"""What all tests have in common: one thread for each test process, and a quiet Lightning."""

import logging
import os

# Lightning takes what is set here for the user's choice. Without it a test that trains with DDP makes all later tests
# of its process wait for threads that the other test process keeps from running.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
