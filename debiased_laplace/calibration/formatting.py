"""Numbers as text, with as many digits as their intervals support."""

from collections.abc import Iterable
from math import floor, log10

from debiased_laplace.calibration.contents import Estimate

MINUS = "\u2212"
NOTHING = "\u2013"
NO_BREAK = "\u00a0"
MAX_DECIMALS = 5


def choose_decimals(half_widths: Iterable[float | None]) -> int | None:
    """Return the decimals that show two digits of the smallest positive half-width; None without any."""
    positive = [w for w in half_widths if w]
    return min(MAX_DECIMALS, max(0, 1 - floor(log10(min(positive))))) if positive else None


def choose_common_decimals(estimates: Iterable[Estimate | None]) -> int | None:
    """Return the decimals that all methods' estimates of one metric share."""
    return choose_decimals(half_width(e.low, e.high) for e in estimates if e is not None)


def half_width(low: float | None, high: float | None) -> float | None:
    """Return half of the width of an interval; None where there is none."""
    return None if low is None or high is None else (high - low) / 2


def format_number(value: float | None, decimals: int | None = None, *, signed: bool = False) -> str:
    """Format with fixed decimals where these show the value well, else with about three digits; a dash for None.

    Args:
        value: the number.
        decimals: as `choose_decimals` returns them.
        signed: put a plus sign before numbers above zero.
    """
    if value is None:
        return NOTHING
    size = abs(value)
    if decimals is None or size >= 1e7 or 0 < size < 0.5 * 10.0**-MAX_DECIMALS:
        text = f"{size:.3f}" if 0.01 <= size < 10 else f"{size:.3g}" if size < 1e3 else f"{size:.5g}"
    else:
        text = f"{size:.{decimals}f}"
    sign = "" if float(text) == 0 else MINUS if value < 0 else "+" if signed else ""
    return sign + text.replace("-", MINUS)


def format_interval(low: float | None, high: float | None, decimals: int | None = None) -> str:
    """Format as `[low, high]`; empty where there is no interval."""
    if low is None or high is None:
        return ""
    return f"[{format_number(low, decimals)}, {format_number(high, decimals)}]"


def format_with_interval(
    value: float | None, low: float | None, high: float | None, decimals: int | None = None, *, signed: bool = False
) -> str:
    """Format as `value [low, high]`, or the value alone where there is no interval.

    Without `decimals` both have those that the interval supports.
    """
    if decimals is None:
        decimals = choose_decimals([half_width(low, high)])
    return f"{format_number(value, decimals, signed=signed)} {format_interval(low, high, decimals)}".rstrip()


def format_p_value(p: float | None) -> str:
    """Format as `p = ...` with the digits that matter; a dash for None."""
    if p is None:
        return NOTHING
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def format_level(level: str | int | float) -> str:
    """Format a confidence level in percent."""
    return f"{100 * float(level):g} %"


def format_count(n: int, what: str = "") -> str:
    """Format a count with its thousands apart, followed by the noun for what it counts, singular or plural."""
    noun = f" {what}{'s' * (n != 1)}" if what else ""
    return f"{n:,}".replace(",", "\u202f") + noun


def format_seconds(seconds: float) -> str:
    """Format a time with two digits below ten seconds."""
    return f"{seconds:.2g} s" if seconds < 10 else f"{format_count(round(seconds))} s"


def shorten(text: str, length: int) -> str:
    """Return a text on one line, cut with an ellipsis where it is longer than `length`."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"
