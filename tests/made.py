"""A small results folder made by hand, as far as the tidy tables read it."""

import json

import numpy as np
import pandas as pd
import yaml

FAMILIES = {
    "distill/get": "get",
    "distill/vit": "vit",
    "diffusion/fpdm": "fpdm",
    "gan/gdd": "gdd",
    "consistency/cd": "cd",
    "progressive/pd": "pd",
}
CONFIGS = {"distill": {"pairs": 100}, "consistency": {"form": "text"}}  # how often the teacher is evaluated
SOLVER = {"method": "iterate", "tolerance": 0, "init": "zeros"}


def write_study(folder, runs, **sections):
    """Write params.yaml and results of a study; return its results folder.

    `runs` maps `of` to a dictionary: `fd` (a list, a value for each seed), and what differs from the defaults below.
    """
    params = {
        "study": {"name": "made by hand"},
        "teacher": {},
        "pairs": {
            "sampler": {"method": "heun", "steps": 18, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
        },
    }
    params |= {"evaluate": {}, **sections}
    results = folder / "results"
    keep(
        results / "evaluator/summary.json",
        {"floor": {"test": {"fd_train": 9.0}, "halves": {"fd_train": 4.0}}},
    )
    for of, given in runs.items():
        run = {"settings": [{}], "curve": [], "nimg": 1000, "config": {}, "arrays": {}, "l1": 0.1, **given}
        stage, _, name = of.partition("/")
        params.setdefault(stage, {})
        if name:
            params[stage][name] = {
                "optimisation": {
                    "nimg": run["nimg"],
                    "decay": "none",
                    "snapshots": [row["nimg"] for row in run["curve"]],
                }
            }
        params["evaluate"][name or of] = {"of": of, **params_of(run["settings"])}
        for seed, fd in enumerate(run["fd"]):
            write_run(results, of, seed, fd, run)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return results


def params_of(settings):
    """Return the settings of an entry of evaluate."""
    solver = [
        {**setting, "iterations": setting["most_iterations"]}
        for setting in settings
        if "most_iterations" in setting
    ]
    for setting in solver:
        del setting["most_iterations"]
    chain = [setting for setting in settings if "budget" in setting]
    split = [
        {key: value for key, value in setting.items() if key not in ("blocks", "budget", "reuse")}
        | {"fixed_point": {key: setting[key] for key in ("blocks", "budget", "reuse") if key in setting}}
        for setting in chain
    ]
    return {"sampler": [], "solver": solver, "chain": split}


def write_run(results, of, seed, fd, run):
    stage, _, name = of.partition("/")
    family = (
        "edm" if of == "teacher" else next(each for start, each in FAMILIES.items() if of.startswith(start))
    )
    about = {"of": of, "run": name or of, "seed": seed, "family": family}
    snapshots = [row["nimg"] for row in run["curve"]]
    config = {
        **CONFIGS.get(stage, {}),
        "seed": seed,
        "optimisation": {"lr": 0.1, "snapshots": snapshots},
        **run["config"],
    }
    summary = {
        "stage": stage,
        "run": name or None,
        "config": config,
        "nimg": run["nimg"],
        "train_flops_image": 30,
    }
    summary |= {"parameters": run.get("parameters", 1000), "flops_image": 10}
    summary |= {
        "environment": {"torch": "2", "threads": 1},
        "inputs": {"data": "0f"},
        **run.get("summary", {}),
    }
    keep(results / of / (str(seed) if name else "") / "summary.json", summary)
    log = [{"nimg": nimg, "loss": 1 / nimg, "lr": 0.1} for nimg in (run["nimg"] // 2, run["nimg"])]
    table(results / of / (str(seed) if name else "") / "log.csv", log)
    at = results / "evaluate" / (name or of) / str(seed)
    keep(at / "metrics.json", about)
    table(at / "sweep.csv", [scored(setting, fd, run) for setting in run["settings"]])
    table(at / "curve.csv", [{"nimg": row["nimg"], **distances(fd * row["times"])} for row in run["curve"]])
    np.savez(at / "iterates.npz", **{"images": np.zeros((1, 2, 1, 8, 8), np.uint8), **run["arrays"]})


def scored(setting, fd, run):
    """Return a row of sweep.csv: `times` of a setting multiplies its distance."""
    setting = dict(setting)
    cost = {
        "nfe": setting.get("steps", 1),
        "iterations": setting.get("most_iterations", 4),
        "flops": run.get("flops", 10),
    }
    scores = distances(fd * setting.pop("times", 1.0), run.get("held_out", 2.0))
    return {**setting, **cost, "block_evals": 8, "residual": 0.1, **scores, "l1_held_out": run["l1"]}


def distances(fd, held_out=2.0):
    """Return the distance to training images, and that to held-out ones, so many times as large."""
    return {"fd_train": fd, "fd_test": fd * held_out}


def keep(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pd.DataFrame(rows).to_csv(index=False) if rows else "\n")
