"""Peak memory of a call, by `tracemalloc`."""

import tracemalloc


def traced_peak(call, *, at_most=None, attempts=3):
    """Return the peak, in bytes, of what Python and numpy allocate while `call()` runs: the least of some attempts.

    `tracemalloc` counts all threads of the process and the modules that a first call imports, so one measurement may be
    far above what the call takes, and never below it. With `at_most`, the first attempt below it is enough.
    """
    peaks = []
    for _ in range(attempts):
        tracemalloc.start()
        try:
            call()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        if at_most is not None and peaks[-1] < at_most:
            break
    return min(peaks)
