"""Shared fixtures. Run everything with: python -m pytest"""
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads wait for each other whenever a core is busy: ten times slower then, and no faster else
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: kernels run on the CPU, as numpy

ROOT = Path(__file__).resolve().parents[1]


def other_precision():
    """The --mixed_precision that is not this processor's own."""
    from data.base import pick_precision
    return "no" if pick_precision("cpu")[0] == "bf16" else "bf16"


@pytest.fixture(scope="session")
def pair():
    """The embedded pair with the token <v>; tests that change it must load their own."""
    from data.base import load_pair
    return load_pair("emoji", "<v>", "dog")


@pytest.fixture(scope="session")
def encoders():
    from data.base import load_encoders
    return load_encoders("emoji")


@pytest.fixture
def concept(tmp_path):
    """A private copy of data/dog."""
    return Path(shutil.copytree(ROOT / "data" / "dog", tmp_path / "dog"))


@pytest.fixture(autouse=True)
def inside_tmp(tmp_path, monkeypatch):
    """Runs start in an empty folder, so that out/ is the test's own."""
    monkeypatch.chdir(tmp_path)


@contextmanager
def drawn_in_one_step():
    """Whatever draws takes one step. For tests of weights: in sixteen, a short run's pictures take most of its time."""
    from model import Denoiser
    sample = Denoiser.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "sample", lambda self, noise, context, steps, *rest: sample(self, noise, context, 1, *rest))
        yield


@pytest.fixture
def quick_pictures():
    with drawn_in_one_step():
        yield


@pytest.fixture(autouse=True)
def own_signals():
    """A run that stops early leaves its handlers behind; the next test must not inherit them."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def train(*flags):
    """Call train.py's main as a user would and return the run's folder."""
    import train as script
    script.main(["--concept", "dog", "--log_steps", "1", "--preview_steps", "0", *map(str, flags)])
    return Path("out") / "dog"


def exit_of(main, argv, capsys):
    """(exit code, the last line of stderr) of a call that must stop early."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]
