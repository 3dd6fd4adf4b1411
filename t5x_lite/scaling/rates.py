"""Learning rates and batch sizes by published laws, each from runs of the sizes that it names."""

import dataclasses
import math

from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a law says of a run: the peak rate, and tokens a batch; None where it says nothing."""

    learning_rate: float
    batch_tokens: float | None


def deepseek(n: float, d: float, c: float) -> Settings:
    """DeepSeek LLM (2024, §3.1, eq. 1): from runs of 1e17 to 2e19 FLOPs, AdamW."""
    return Settings(0.3118 * c**-0.1250, 0.2920 * c**0.3271)


def step_law(n: float, d: float, c: float) -> Settings:
    """Li et al. 2025 ("Step Law", eq. 1): from 60 M to 1 B parameters, 2 to 100 G tokens."""
    return Settings(1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571)


def kaplan(n: float, d: float, c: float) -> Settings:
    """Kaplan et al. 2020 (§D.6): the rate from the size; no law of the batch is used."""
    return Settings(0.003239 - 0.0001395 * math.log(n), None)


LAWS = {"deepseek": deepseek, "step_law": step_law, "kaplan": kaplan}


def settings(law: str, n: float, d: float, c: float) -> Settings:
    """What `law` says of a run of n parameters, d tokens and c FLOPs.

    `law` is a name of `LAWS`, or a number: that rate for every run, as muP allows.

    Raises:
      UserError: neither, or the rate comes out negative.
    """
    if law in LAWS:
        found = LAWS[law](n, d, c)
    else:
        try:
            found = Settings(float(law), None)
        except ValueError:
            names = ", ".join(LAWS)
            raise UserError(f"rates {law!r} are neither a law ({names}) nor a number.") from None
    if not 0 < found.learning_rate < 1:
        raise UserError(
            f"law {law} gives {n:.3g} parameters a rate of {found.learning_rate:.3g}: it doesn't "
            f"reach that far; name another, or give a number."
        )
    return found


def rows(batch_tokens: float, length: int, d: float, fewest_steps: int = 200) -> int:
    """Rows of a batch: a multiple of a power of two, few enough for `fewest_steps` updates."""
    most = d / fewest_steps / length
    wanted = max(1.0, min(batch_tokens / length, most))
    unit = 2 ** max(0, math.floor(math.log2(wanted)) - 2)
    return max(1, round(wanted / unit) * unit)
