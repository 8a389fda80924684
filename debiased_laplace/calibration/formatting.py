"""Numbers for people: as many digits as their interval supports."""

from collections.abc import Iterable
from math import floor, log10

from debiased_laplace.calibration.contents import Estimate

MINUS = "\u2212"
NOTHING = "\u2013"
NO_BREAK = "\u00a0"
MAX_DECIMALS = 5


def choose_decimals(half_widths: Iterable[float | None]) -> int | None:
    """Choose the decimals that show two digits of the smallest positive half-width; None without any."""
    positive = [w for w in half_widths if w]
    if not positive:
        return None
    return min(MAX_DECIMALS, max(0, 1 - floor(log10(min(positive)))))


def choose_common_decimals(estimates: Iterable[Estimate | None]) -> int | None:
    """Choose the decimals of one metric of several methods, so that their columns compare."""
    return choose_decimals(half_width(e.low, e.high) for e in estimates if e is not None)


def half_width(low: float | None, high: float | None) -> float | None:
    """Return half of the width of an interval; None where there is none."""
    return None if low is None or high is None else (high - low) / 2


def format_number(value: float | None, decimals: int | None = None) -> str:
    """Format with fixed decimals where these show the value well, else with about three digits; a dash for None."""
    if value is None:
        return NOTHING
    size = abs(value)
    if decimals is None or size >= 1e7 or 0 < size < 0.5 * 10.0**-MAX_DECIMALS:
        text = f"{value:.3f}" if 0.01 <= size < 10 else f"{value:.3g}" if size < 1e3 else f"{value:.5g}"
    else:
        text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def format_signed(value: float | None, decimals: int | None = None) -> str:
    """Format as `format_number`, with a plus sign above zero."""
    text = format_number(value, decimals)
    return f"+{text}" if not text.startswith((MINUS, NOTHING)) and float(text.replace(MINUS, "-")) != 0 else text


def format_interval(low: float | None, high: float | None, decimals: int | None = None) -> str:
    """Format as `[low, high]`; empty where there is no interval."""
    if low is None or high is None:
        return ""
    return f"[{format_number(low, decimals)}, {format_number(high, decimals)}]"


def format_with_interval(
    value: float | None, low: float | None, high: float | None, decimals: int | None, *, signed: bool = False
) -> str:
    """Format as `value [low, high]`, or the value alone where there is no interval."""
    show = format_signed if signed else format_number
    return f"{show(value, decimals)} {format_interval(low, high, decimals)}".rstrip()


def format_p_value(p: float) -> str:
    """Format as `p = ...` with the digits that matter."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def format_bare_p_value(p: float) -> str:
    """Format as `format_p_value`, without the name."""
    return format_p_value(p).removeprefix("p ").removeprefix("= ")


def format_level(level: str | int | float) -> str:
    """Format a confidence level in percent."""
    return f"{100 * float(level):g} %"


def format_count(n: int, what: str = "") -> str:
    """Format a number with its thousands apart, and what it counts in the singular or plural."""
    return f"{n:,} {what}{'s' * (n != 1)}".replace(",", "\u202f") if what else f"{n:,}".replace(",", "\u202f")


def format_seconds(seconds: float) -> str:
    """Format a time with two digits below ten seconds."""
    return f"{seconds:.2g} s" if seconds < 10 else f"{format_count(round(seconds))} s"


def shorten(text: str, length: int) -> str:
    """Return a text on one line, cut with an ellipsis where it is longer than `length`."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"
