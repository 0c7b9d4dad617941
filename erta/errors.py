"""What can go wrong, in words that say what to do. All of them are `ErtaError`."""


class ErtaError(ValueError):
    """Base class: a request that cannot be carried out, or a run that did not do what was planned."""


class BudgetError(ErtaError):
    """A threshold, a number of steps or a speed-up that no plan can meet."""


class SignatureMismatch(ErtaError):
    """A calibration or plan was made for something else. `field` names what differs."""

    def __init__(self, field: str, made_for: object, found: object) -> None:
        self.field = field
        super().__init__(
            f"this calibration does not fit: {field} was {_short(made_for)} when it was made and is {_short(found)} now. "
            "Make a new one with erta.calibrate(pipe, prompts, ...), or `python run.py experiment=calibrate model=...`."
        )


class ExecutionMismatch(ErtaError):
    """What a pipeline call executed is not what was planned; its result must not be reported as cached."""


class InstallError(ErtaError):
    """The cache cannot be put on, or taken off, this pipeline."""


def choice_index(key: str, value: str, choices: tuple[str, ...]) -> int:
    """Place of a choice; raises ErtaError for one that does not exist."""
    if value not in choices:
        raise ErtaError(f"{key} must be one of {', '.join(choices)}, not {value!r}")
    return choices.index(value)


def _short(value: object, limit: int = 90) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class NonFiniteError(ErtaError):
    """A transformer output holds NaN or infinity."""
