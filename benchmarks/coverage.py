"""How often 95% intervals hold the truth: a known law, noise, fits with bootstraps, many times.

    python benchmarks/coverage.py --trials 300 --bootstraps 100

Prints, for each grid, method and quantity, the share of trials whose interval holds the truth, the
interval's median width and the estimate's median error, both relative to the truth.
"""

import argparse
import concurrent.futures
import os

import numpy as np

from t5x_lite.scaling import fit, isoflop, laws, projection

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}  # Hoffmann et al. 2022
NOISE = 0.01  # standard deviation of log-losses
TARGET = 1e23


def square():
    """Eight sizes by seven amounts of tokens each."""
    n = np.repeat(np.geomspace(1e7, 1e10, 8), 7)
    return n, n * np.tile(np.geomspace(2, 200, 7), 8)


def budgets(off_centre):
    """Seven budgets of nine sizes around the best, or around another size."""
    c = np.repeat(np.geomspace(6e18, 3e21, 7), 9)
    one = {name: np.array([value]) for name, value in TRUE.items()}
    best = np.concatenate([fit.best_size(one, each) for each in c])
    n = best * off_centre * np.tile(np.geomspace(0.25, 4, 9), 7)
    return n, c / (6 * n)


GRIDS = {"square": square(), "budgets": budgets(1.0), "budgets, off centre": budgets(1.7)}


def quantities(parameters):
    """What is asked for, by name, of one fit or of its samples."""
    at = {name: np.atleast_1d(value) for name, value in parameters.items()}
    best = fit.best_size(at, TARGET)
    share = at["beta"] / (at["alpha"] + at["beta"])
    return at | {"n_exponent": share, f"N at {TARGET:g}": best}


def trial(name, seed, bootstraps):
    """{(method, quantity): (holds, width, error)} of one draw of noise."""
    n, d = GRIDS[name]
    columns = {"n": n, "d": d, "c": 6 * n * d}
    noise = np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(n)))
    columns["loss"] = laws.CHINCHILLA.predict(TRUE, columns) * noise
    options = {"bootstraps": bootstraps, "seed": seed}
    truth, result = quantities(TRUE), {}
    fits = {
        "approach 3": laws.fit(laws.CHINCHILLA, columns, starts=10, **options),
        "variable projection": projection.fit(columns, **options),
    }
    for method, fitted in fits.items():
        found, samples = quantities(fitted.parameters), quantities(fitted.samples)
        for quantity, true in truth.items():
            low, high = laws.percentiles(samples[quantity])
            result[method, quantity] = judged(true[0], found[quantity][0], low, high)
    for curve in ("parabola", "akima") if name.startswith("budgets") else ():
        try:
            found = isoflop.fit(columns, curve, **options)
        except ValueError:  # too few minima inside; counted as missing
            continue
        low, high = laws.percentiles(found.samples)
        result[f"approach 2, {curve}", "n_exponent"] = judged(
            truth["n_exponent"][0], found.exponent, low, high
        )
    return result


def judged(true, found, low, high):
    """Whether the interval holds the truth; its width and the estimate's error, over the truth."""
    return low <= true <= high, (high - low) / true, (found - true) / true


def main():
    """Runs all trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--bootstraps", type=int, default=100)
    args = parser.parse_args()
    print("| grid | method | quantity | holds | width | error | trials |")
    print("|---|---|---|---|---|---|---|")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for name in GRIDS:
            jobs = [pool.submit(trial, name, s, args.bootstraps) for s in range(args.trials)]
            results = [job.result() for job in jobs]
            for key in dict.fromkeys(key for result in results for key in result):
                rows = np.array([result[key] for result in results if key in result])
                holds, (width, error) = rows[:, 0].mean(), np.median(rows[:, 1:], axis=0)
                cells = f"{holds:.1%} | {width:.1%} | {error:+.1%} | {len(rows)}"
                print(f"| {name} | {' | '.join(key)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
