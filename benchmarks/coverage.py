"""How often 95% intervals hold the truth: a known law, noise, fits with bootstraps, many times.

    python benchmarks/coverage.py --trials 300 --bootstraps 100

Prints, for each grid, method and quantity, the share of trials whose interval holds the truth, the
interval's median width and the estimate's median error, both relative to the truth. Of held-out
runs it is the share of runs, over all trials, whose interval holds them. The last column counts the
trials that gave an interval.
"""

import argparse
import concurrent.futures
import os

import numpy as np

from t5x_lite.scaling import constrained, downstream, fit, kaplan, laws, optimum
from t5x_lite.scaling.points import Points

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}  # Hoffmann et al. 2022
KAPLAN = {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}  # 2020, table 2
REPEATED = {  # Muennighoff et al. 2023, §5
    "A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.353, "beta": 0.353, "R_D": 15.39, "R_N": 5.31,
}  # fmt: skip
SIGMOID = {"floor": 0.25, "ceiling": 0.9, "slope": 4.0, "middle": 2.6}
NOISE = 0.01  # standard deviation of log-losses; half of it of accuracies
TARGET = 1e23
CHINCHILLA = ("approach_3", "approach_3_tied", "variable_projection")
MINIMA = ("approach_2_parabola", "approach_2_akima")


def square():
    """Eight sizes by seven amounts of tokens each."""
    n = np.repeat(np.geomspace(1e7, 1e10, 8), 7)
    return n, n * np.tile(np.geomspace(2, 200, 7), 8)


def budgets(off_centre):
    """Seven budgets of nine sizes around the best, or around another size."""
    c = np.repeat(np.geomspace(6e18, 3e21, 7), 9)
    one = {name: np.array([value]) for name, value in TRUE.items()}
    best = np.concatenate([optimum.best_size(one, each) for each in c])
    n = best * off_centre * np.tile(np.geomspace(0.25, 4, 9), 7)
    return n, c / (6 * n)


def curves():
    """Fourteen sizes, each seen at thirty places of its training."""
    n = np.repeat(np.geomspace(2e7, 2e10, 14), 30)
    return n, n * np.tile(np.geomspace(1, 500, 30), 14)


def repeated():
    """Five sizes, three amounts of unique tokens, four numbers of epochs."""
    n, unique, epochs = (
        a.ravel() for a in np.meshgrid(
            np.geomspace(1e8, 8e9, 5), [1e8, 1.5e9, 2e10], [1, 4, 15, 50.0]
        )
    )  # fmt: skip
    return n, unique * epochs, unique


def plain(grid):
    """Columns of a grid, and the losses without noise."""
    n, d = grid[:2]
    columns = {"n": n, "d": d, "c": 6 * n * d}
    return columns, laws.CHINCHILLA.predict(TRUE, columns)


def of_chinchilla(grid, **more):
    """As `plain`."""
    columns, exact = plain(grid)
    return columns | more, exact


def of_kaplan(grid):
    """The same by Kaplan's law."""
    columns, _ = plain(grid)
    return columns, kaplan.BOTH.predict(KAPLAN, columns)


def of_one(column):
    """The same by a power of one column, with a constant for the methods that have one."""
    columns, _ = plain(square())
    return columns, (columns[column] / columns[column].mean()) ** -0.1


def of_repeated():
    """The same by the law of repeated tokens."""
    columns, _ = plain(repeated())
    columns["unique"] = repeated()[2]
    return columns, constrained.CONSTRAINED.predict(REPEATED, columns)


SCENES = {
    "square": (of_chinchilla(square()), CHINCHILLA),
    "budgets": (of_chinchilla(budgets(1.0)), (*CHINCHILLA, *MINIMA, "approach_1")),
    "budgets, off centre": (
        of_chinchilla(budgets(1.7)), (*CHINCHILLA, *MINIMA, "approach_1"),
    ),
    "curves": (of_chinchilla(curves(), run=np.repeat(np.arange(14), 30)), ("approach_1",)),
    "Kaplan's law": (of_kaplan(square()), ("kaplan_nd",)),
    "a power of N": (of_one("n"), ("kaplan_n",)),
    "a power of D": (of_one("d"), ("kaplan_d",)),
    "a power of C": (of_one("c"), ("kaplan_c",)),
    "repeated tokens": (of_repeated(), ("data_constrained",)),
    "accuracy": (of_chinchilla(square()), ("approach_3", "downstream")),
}  # fmt: skip


def truth(name, method):
    """What a method should find, by quantity."""
    own = {"kaplan_nd": (kaplan.BOTH, KAPLAN), "data_constrained": (None, REPEATED)}
    law, parameters = own.get(method, (laws.CHINCHILLA, TRUE))
    if name.startswith("a power of"):
        return {"alpha": 0.1}
    if law is None:
        return parameters
    one = {key: np.array([[value]]) for key, value in parameters.items()}
    best = optimum.of_law(law, 6.0)(one, np.array([TARGET]))
    found = {"n_exponent": float(optimum.exponent(law, one)[0, 0])}
    found |= {f"{key} at {TARGET:g}": float(value[0, 0]) for key, value in best.items()}
    if method == "downstream":
        loss = found[f"loss at {TARGET:g}"]
        return SIGMOID | {f"accuracy at {TARGET:g}": float(downstream.accuracy(SIGMOID, loss))}
    return found if method in (*MINIMA, "approach_1", "approach_3_tied") else parameters | found


def trial(name, seed, bootstraps):
    """{(method, quantity): (holds, width, error)} of one draw of noise."""
    (columns, exact), methods = SCENES[name]
    rng = np.random.default_rng(seed)
    errors = NOISE * rng.standard_normal(len(exact))
    if "run" in columns:  # a run's losses err together
        errors = (NOISE * rng.standard_normal(columns["run"].max() + 1))[columns["run"]]
    columns = columns | {"loss": exact * np.exp(errors)}
    if name == "accuracy":
        exact = downstream.accuracy(SIGMOID, exact)
        columns["accuracy"] = np.clip(exact + 0.5 * NOISE * rng.standard_normal(len(exact)), 0, 1)
    curves = columns if "run" in columns else None
    points = Points({key: v for key, v in columns.items() if key != "run"}, curves=curves)
    result = fit.fit(
        points, bootstraps=bootstraps, seed=seed, target=TARGET, force=True, only=methods,
        holdout=None if name == "square" else 0, starts=10,
    )  # fmt: skip
    found = {}
    for method, described in (result["methods"] | _downstream(result)).items():
        for quantity, true in truth(name, method).items():
            number = _number(described, quantity)
            if number is not None and "interval" in number:
                found[method, quantity] = judged(true, number["value"], *number["interval"])
    for method, check in result.get("validation", {"methods": {}})["methods"].items():
        if "inside" in check:
            loss = columns["loss"][result["validation"]["rows"]]
            width = np.mean((np.array(check["high"]) - check["low"]) / loss)
            found[method, "held-out runs"] = check["inside"], width, check["mean_error"]
    return found


def _downstream(result):
    return {"downstream": result["downstream"]} if "downstream" in result else {}


def _number(described, quantity):
    name, _, target = quantity.partition(" at ")
    if target:
        return described.get("optimum", {}).get(name)
    return described.get("parameters", {}).get(name, described.get(name))


def judged(true, found, low, high):
    """Whether the interval holds the truth; its width and the estimate's error, over the truth."""
    return low <= true <= high, (high - low) / true, (found - true) / true


def main():
    """Runs all trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--bootstraps", type=int, default=100)
    parser.add_argument("--grids", nargs="+", choices=SCENES, default=SCENES)
    args = parser.parse_args()
    print("| grid | method | quantity | holds | width | error | trials |")
    print("|---|---|---|---|---|---|---|")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for name in args.grids:
            jobs = [pool.submit(trial, name, s, args.bootstraps) for s in range(args.trials)]
            results = [job.result() for job in jobs]
            for key in dict.fromkeys(key for result in results for key in result):
                rows = np.array([result[key] for result in results if key in result], float)
                holds, (width, error) = rows[:, 0].mean(), np.median(rows[:, 1:], axis=0)
                cells = f"{holds:.1%} | {width:.1%} | {error:+.1%} | {len(rows)}"
                print(f"| {name} | {' | '.join(key)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
