"""A run's numbers as TensorBoard reads them."""

import contextlib
from pathlib import Path

import pytest

from pentad.train.loop import StepRecord
from pentad.train.trackers import open_trackers

pytest.importorskip("tensorboard", reason="make parity installs it")


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_steps_that_ran_again_replace_those_of_a_killed_process(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, loss in ((0, 2.0), (1, 3.0)):
        with contextlib.ExitStack() as stack:
            (write,) = open_trackers(["tensorboard"], tmp_path, {}, first, stack)
            for step in range(first + 1, 4):
                write(StepRecord(step, loss, 100, 1e-3, 1.0, 0.5, 10**6, {"accuracy": 0.5}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 3.0), (3, 3.0)]
    assert "accuracy" in events.Tags()["scalars"]
