"""Learning rates as functions of the step."""

import math


def learning_rate(schedule: str, step: int, steps: int, *, peak: float, warmup: float, decay: float) -> float:
    """The learning rate of a step.

    Args:
        schedule: "constant"; "linear" to 0; "cosine" to 0 (arXiv:1608.03983); "inverse_sqrt" (arXiv:1706.03762); or
            "wsd", constant until a linear decay (warmup-stable-decay, arXiv:2404.06395).
        step: from 0.
        steps: steps of the run.
        peak: the highest rate, at the end of the warmup.
        warmup: fraction of the steps in which the rate rises linearly from 0.
        decay: fraction of the steps in which "wsd" decays to 0.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    match schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - done
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * done))
        case "inverse_sqrt":
            factor = math.sqrt(max(1, rising) / max(1, rising, step + 1))
        case "wsd":
            falling = max(1, round(decay * steps))
            factor = min(1.0, (steps - step) / falling)
        case _:
            raise ValueError(f"schedule is {schedule!r}")
    return peak * factor
