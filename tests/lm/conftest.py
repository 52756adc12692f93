"""A small corpus, and a run over it."""

import pytest

from kernel_index.lm.train import Trainer
from tests.lm.runs import SOURCE, config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(80):
        (folder / f"module_{i}.py").write_text(SOURCE.format(i) * (1 + i % 4))
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trainer = Trainer.start(config(corpus), folder)
    list(trainer.steps())
    return trainer


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (folder / f"module_{i}.py").write_text(f"def function_{i}(value):\n    return value + {i}\n" * (1 + i % 3))
    return str(folder)
