"""What the tests of training share."""

from dataclasses import replace

from kernel_index.lm.train import RunConfig, read_metrics

SOURCE = "def function_{0}(value):\n    return value + {0}\n\n\nclass Thing{0}:\n    name = 'thing {0}'\n"


def config(corpus, **changes) -> RunConfig:
    base = RunConfig.from_preset("nano", data=str(corpus), checkpoint_every=4, seed=3)
    return replace(base, **{"steps": 12, "evaluate_every": 6, **changes})


def losses(folder):
    return [(m.step, m.loss, m.validation, m.gradient_norm) for m in read_metrics(folder)]
