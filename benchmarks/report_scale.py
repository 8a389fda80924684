"""How long a report of many probabilities takes, and how much memory.

Two methods, everything on: metrics, cross-fitted temperature, comparisons, selective prediction, page and JSON.
Each size runs in a process of its own, so that its peak memory is its own. Seconds are those of one run on this
machine, with whatever else it was doing; processor time, summed over threads, says what a quiet machine would need.
Threads that compete for busy processors wait for each other: then fewer are faster (--threads 1).

    python -m benchmarks.report_scale                  100,000 x 1,000, the target of 30 s and 4 GiB
    python -m benchmarks.report_scale --samples 20000 --classes 100
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

MAIN = (100_000, 1_000)


def draw(n: int, n_classes: int, *, sharpness: float):
    """Float32 probabilities of a method and labels, in portions, so that drawing needs no memory of its own."""
    import torch

    generator = torch.Generator().manual_seed(0)
    p, labels = torch.empty(n, n_classes), torch.empty(n, dtype=torch.int64)
    for first in range(0, n, 2_000):
        rows = slice(first, min(n, first + 2_000))
        logits = 2.5 * torch.randn(rows.stop - first, n_classes, generator=generator)
        p[rows] = (sharpness * logits).softmax(dim=1)
        labels[rows] = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return p, labels


def measure(n: int, n_classes: int) -> dict[str, float]:
    """Seconds of every stage and peak resident memory in GiB, in this process."""
    start = time.perf_counter()
    from debiased_laplace import calibration_report

    seconds = {"import": time.perf_counter() - start}
    start = time.perf_counter()
    (sharp, labels), (honest, _) = draw(n, n_classes, sharpness=1.3), draw(n, n_classes, sharpness=1.0)
    seconds["draw the data"] = time.perf_counter() - start
    before = peak_memory()

    start, processor = time.perf_counter(), time.process_time()
    report = calibration_report({"map": sharp, "laplace": honest}, labels, task="multiclass")
    seconds["report"] = time.perf_counter() - start
    start = time.perf_counter()
    page = report.to_html()
    seconds["HTML"] = time.perf_counter() - start
    start = time.perf_counter()
    document = report.to_json()
    seconds["JSON"] = time.perf_counter() - start

    seconds["report, HTML and JSON"] = sum(seconds[stage] for stage in ("report", "HTML", "JSON"))
    seconds["the same, processor time"] = time.process_time() - processor
    sizes = {"HTML, KiB": len(page.encode()) / 1024, "JSON, KiB": len(document.encode()) / 1024}
    data = (sharp.nbytes + honest.nbytes) / 2**30
    memory = {"data, GiB": data, "peak before the report, GiB": before, "peak, GiB": peak_memory()}
    return {**seconds, **sizes, **memory}


def peak_memory() -> float:
    """Peak resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_apart(n: int, n_classes: int, *, threads: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.report_scale",
        "--inside",
        "--samples",
        str(n),
        "--classes",
        str(n_classes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{n} x {n_classes} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=MAIN[0])
    parser.add_argument("--classes", type=int, default=MAIN[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.samples, options.classes)))
        return
    print(f"{options.samples} samples of {options.classes} classes, two methods, {options.threads} threads")
    for name, value in measure_apart(options.samples, options.classes, threads=options.threads).items():
        print(f"{name:>30}  {value:10.2f}")
    print(f"load of the machine over the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
