"""Learning-rate schedules as factors of the largest rate."""


def llr(step: int, steps: int, warmup: float = 0.1) -> float:
    """Linear schedule with warm-up: the factor of the largest rate at a step counted from 0.

    It rises linearly over the first `warmup` of the steps and falls linearly to zero after the last one
    (LLR of "How I Learned To Stop Worrying And Love Retraining", ICLR 2023).

    >>> [llr(step, 10, warmup=0.2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising)
