"""What is said of free memory is what the system says."""

import math
import os
from pathlib import Path

import pytest
import torch

from lyapunov_lightning.curvature.vectors import memory
from lyapunov_lightning.curvature.vectors.memory import free_bytes


def test_available_memory_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(memory, "_MEMORY_FILE", file)
    assert free_bytes(torch.device("cpu")) == 5000 * 1024


def test_without_that_file_free_pages_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMORY_FILE", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf_names", {"SC_AVPHYS_PAGES": 1})
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_bytes(torch.device("cpu")) == 40960


def test_what_is_not_told_is_no_bound() -> None:
    assert free_bytes(torch.device("meta")) == math.inf


def test_reserved_memory_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_bytes(torch.device("cuda")) == 1400
