"""What all tests have in common: one thread for each test process, and a quiet Lightning."""

import logging

import torch

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
