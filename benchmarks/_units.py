"""Numbers as people read them: sizes, times, rates and ratios."""

__all__ = ["figures", "rate", "size", "span", "speed", "time", "times"]


def size(count: float) -> str:
    """Bytes, with 1 KB = 1024 B.

    >>> size(4), size(4096), size(2**28)
    ('4 B', '4 KB', '256 MB')
    """
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024 or unit == "GB":
            break
        count /= 1024
    return f"{count:g} {unit}"


def time(microseconds: float) -> str:
    """Microseconds, in the unit that fits, to three figures.

    >>> time(1.234), time(56.78), time(12345.6)
    ('1.23 µs', '56.8 µs', '12.3 ms')
    """
    for unit in ("µs", "ms", "s"):
        if microseconds < 1000 or unit == "s":
            break
        microseconds /= 1000
    return f"{figures(microseconds)} {unit}"


def figures(value: float) -> str:
    """Three figures, never in powers of ten.

    >>> figures(0.1234), figures(12.34), figures(1234.5)
    ('0.123', '12.3', '1234')
    """
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def rate(bytes_per_second: float) -> str:
    """Bytes a second, with 1 GB/s = 10**9 B/s.

    >>> rate(8.123e9), rate(724e3), rate(2.35e13)
    ('8.12 GB/s', '724 KB/s', '23.5 TB/s')
    """
    for unit in ("B/s", "KB/s", "MB/s", "GB/s", "TB/s"):
        if bytes_per_second < 1000 or unit == "TB/s":
            break
        bytes_per_second /= 1000
    return f"{figures(bytes_per_second)} {unit}"


def speed(ratio: float) -> str:
    """A time divided by the baseline's, said as a person would.

    >>> speed(0.2), speed(1.0), speed(1.5)
    ('5.00x faster', 'the same', '1.50x slower')
    """
    if 0.995 < ratio < 1.005:
        return "the same"
    return f"{figures(1 / ratio)}x faster" if ratio < 1 else f"{figures(ratio)}x slower"


def span(low: float, high: float) -> str:
    """Two ends of a range.

    >>> span(1.234, 1.5)
    '1.23 to 1.50'
    """
    return f"{figures(low)} to {figures(high)}"


def times(low: float, high: float) -> str:
    """Two ends of a range of microseconds.

    >>> times(1.234, 1500.0)
    '1.23 µs to 1.50 ms'
    """
    return f"{time(low)} to {time(high)}"
