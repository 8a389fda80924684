"""Numbers for people: as many digits as their interval supports."""

from collections.abc import Iterable
from math import floor, log10

from debiased_laplace.calibration.estimates import Estimate

MINUS = "\u2212"
NOTHING = "\u2013"
NO_BREAK = "\u00a0"
MAX_DECIMALS = 5


def choose_decimals(half_widths: Iterable[float | None]) -> int | None:
    """Decimals that show two digits of the smallest positive half-width; None without any."""
    positive = [w for w in half_widths if w]
    if not positive:
        return None
    return min(MAX_DECIMALS, max(0, 1 - floor(log10(min(positive)))))


def choose_common_decimals(estimates: Iterable[Estimate | None]) -> int | None:
    """Decimals for one metric of several methods, so that their columns compare."""
    return choose_decimals(half_width(e.low, e.high) for e in estimates if e is not None)


def half_width(low: float | None, high: float | None) -> float | None:
    """Half of an interval; None where there is none."""
    return None if low is None or high is None else (high - low) / 2


def format_number(value: float | None, decimals: int | None = None) -> str:
    """`value` with fixed decimals where these show it well, else about three digits; a dash where there is none."""
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
    """`format_number` with a plus sign above zero."""
    text = format_number(value, decimals)
    return f"+{text}" if not text.startswith((MINUS, NOTHING)) and float(text.replace(MINUS, "-")) != 0 else text


def format_interval(low: float | None, high: float | None, decimals: int | None = None) -> str:
    """`[low, high]`, or nothing where there is no interval."""
    if low is None or high is None:
        return ""
    return f"[{format_number(low, decimals)}, {format_number(high, decimals)}]"


def format_with_interval(
    value: float | None, low: float | None, high: float | None, decimals: int | None, *, signed: bool = False
) -> str:
    """`value [low, high]`, or the value alone where there is no interval."""
    show = format_signed if signed else format_number
    return f"{show(value, decimals)} {format_interval(low, high, decimals)}".rstrip()


def format_unbroken(estimate: Estimate, decimals: int | None) -> str:
    """Value and interval, which a line does not break inside."""
    interval = format_interval(estimate.low, estimate.high, decimals).replace(" ", NO_BREAK)
    return f"{format_number(estimate.value, decimals)} {interval}".rstrip()


def format_p_value(p: float) -> str:
    """`p = ...` with the digits that matter."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def format_bare_p_value(p: float) -> str:
    """`format_p_value` where a label says already that it is one."""
    return format_p_value(p).removeprefix("p ").removeprefix("= ")


def format_level(level: str | int | float) -> str:
    """A confidence level in percent."""
    return f"{100 * float(level):g} %"


def shorten(text: str, length: int) -> str:
    """`text`, cut with an ellipsis where it is longer than `length`."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"
