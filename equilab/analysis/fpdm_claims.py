"""The claims of the FPDM paper, its limitation included, as tests on a study's results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from equilab.analysis import chains
from equilab.analysis.chains import Chains
from equilab.analysis.verdicts import FAILS, HOLDS, OPEN, Comparisons, Found, listed, seeds_of, span, verdict


class Study(Comparisons):
    """What the claims are tested on."""

    found: Chains

    def averaged(self, rows: pd.DataFrame, among: int = 1) -> pd.DataFrame:
        """Return rows with their seeds averaged, with intervals that hold for `among` of them at once."""
        return self.found.averaged(rows, self.confidence(among))


Test = Callable[[Study], Found | None]  # None: the study trains nothing that could tell


def at_blocks(method: str, few: bool) -> Test:
    """Return the test of FPDM against DiT at the fewest blocks that both were sampled with, or the reverse at the most."""

    def test(study: Study) -> Found | None:
        rows = chains.usual(study.found)
        rows = rows.assign(spent=rows["blocks"].fillna(rows["block_evals"]))[rows["method"] == method]
        rows = study.averaged(rows)
        rows = rows.drop_duplicates(["model", "spent"])
        both = [
            rows[rows["model"] == chains.base(study.found, family)].set_index("spent")
            for family in ("DiT", "FPDM")
        ]
        common = sorted(set(both[0].index) & set(both[1].index))
        if len(common) < 2:
            return None
        dit, fpdm = (rows.loc[common[0 if few else -1]] for rows in both)
        told = "; ".join(
            f"{blocks:.0f} blocks: DiT {study.value(both[0].loc[blocks])}, FPDM {study.value(both[1].loc[blocks])}"
            for blocks in common
        )
        told += f"; at {dit.name:.0f} blocks FPDM takes {fpdm['flops'] / dit['flops']:.2f} times the FLOPs"
        return study.compared(told, *((dit, fpdm) if few else (fpdm, dit)))

    return test


def parameters(study: Study) -> Found | None:
    """Test that FPDM has fewer parameters than the DiT it is compared with."""
    counts = study.found.rows.drop_duplicates("model").set_index("model")["parameters"]
    models = [chains.base(study.found, family) for family in ("DiT", "FPDM")]
    if not all(models):
        return None
    dit, fpdm = counts[models]
    return Found(
        f"FPDM {fpdm:,} parameters, DiT {dit:,}: {fpdm / dit:.0%}",
        "counted",
        "1",
        HOLDS if fpdm < dit else FAILS,
    )


def memory(study: Study) -> Found | None:
    """Test that a training step of FPDM takes less memory than one of the DiT it is compared with, at an equal batch."""
    rows = chains.costs(study.found)
    found = [rows[rows["model"] == chains.base(study.found, family)] for family in ("DiT", "FPDM")]
    if any(one.empty for one in found):
        return None
    dit, fpdm = (one["memory_mib"].iloc[0] for one in found)
    told = f"FPDM {fpdm:.3g} MiB, DiT {dit:.3g} MiB at a batch of {rows['batch'].iloc[0]}: {fpdm / dit:.0%}"
    return Found(told, "measured once", "1", HOLDS if fpdm < dit else FAILS)


def own_size(study: Study) -> Found | None:
    """Test FPDM against DiTs of about as many parameters (within a factor of 1.6, as in the paper) at about as many sampling
    FLOPs (within 1.28) as its headline: the best of the chains that match."""
    rows = study.averaged(chains.usual(study.found)).query("method == 'ddim'")
    heads = rows[(rows["model"] == chains.base(study.found)) & (rows["position"] == 0)]
    if heads.empty:
        return None
    like = rows[rows["family"] == "DiT"]
    near = lambda name, times: np.abs(np.log(like[name] / heads[name].iloc[0])) <= np.log(times)  # noqa: E731
    chosen = near("parameters", 1.6) & near("flops", 1.28)
    if not chosen.any():
        return None
    rows = study.averaged(chains.usual(study.found), int(chosen.sum())).query("method == 'ddim'")
    head = rows[(rows["model"] == chains.base(study.found)) & (rows["position"] == 0)].iloc[0]
    others = rows[rows["family"] == "DiT"][chosen.to_numpy()].sort_values(study.distance)
    told = [
        f"{study.value(row)} of {row['label']} ({row['parameters']:,} parameters, {row['flops']:.3g} FLOPs)"
        for _, row in (*others.iterrows(), (0, head))
    ]
    return study.compared(", ".join(told), others.iloc[0], head)


def middle(study: Study) -> Found | None:
    """Test that the best number of iterations a step, at equal blocks, is neither the fewest nor the most."""
    rows, blocks = chains.fixed(study.found)
    rows = rows[rows["reuse"] == True]  # noqa: E712
    if rows["steps"].nunique() < 3:
        return None
    rows = study.averaged(rows, rows["steps"].nunique()).sort_values("each").reset_index(drop=True)
    best = rows[study.distance].idxmin()
    bounds = np.array([study.gain(rows.iloc[end], rows.iloc[best]) for end in (0, -1)]).min(0)
    told = FAILS if best in (0, len(rows) - 1) else verdict(*bounds)
    if told == FAILS:  # an end is ahead: of all in between, or the claim stays open
        nearest = rows.iloc[1:-1].sort_values(study.distance).iloc[0]
        told = FAILS if study.gain(nearest, rows.iloc[best])[0] > 1 else OPEN
    ours = f"{study.score} at {blocks:.0f} blocks: {listed(rows, study.distance, 'each')} iterations a step"
    return Found(ours, f"{span(*bounds)} times, against both ends", seeds_of(rows), told)


def reuse(few: bool) -> Test:
    """Return the test that reuse helps at the fewest iterations a step, or that it helps less at the most."""

    def test(study: Study) -> Found | None:
        rows, blocks = chains.fixed(study.found)
        rows = study.averaged(rows)
        paired = rows[rows.groupby("steps")["reuse"].transform("nunique") == 2]
        if paired["steps"].nunique() < 2:
            return None
        told, bounds, each = [], [], chains.fixed(study.found)[0]
        for steps in (paired["steps"].max(), paired["steps"].min()):
            without, with_ = (
                paired[(paired["steps"] == steps) & (paired["reuse"] == one)].iloc[0] for one in (False, True)
            )
            same = each[each["steps"] == steps]
            bounds.append(study.paired(same[same["reuse"] == False], same[same["reuse"] == True]))  # noqa: E712
            told.append(
                f"{with_['each']:.3g} iterations a step: {study.value(without)} without, {study.value(with_)} with"
            )
        ours = f"{study.score} at {blocks:.0f} blocks; {'; '.join(told)}"
        if few:
            return Found(ours, f"{span(*bounds[0])} times", seeds_of(paired), verdict(*bounds[0]))
        low, high = bounds[0][0] / bounds[1][1], bounds[0][1] / bounds[1][0]
        return Found(ours, f"{span(low, high)} times more with few", seeds_of(paired), verdict(low, high))

    return test


def less_noisy(study: Study) -> Found | None:
    """Test that reuse lowers the residual more in the less noisy half of the timesteps than in the other."""
    found = chains.residuals(study.found)
    found = found[found["steps"] == chains.longest(found)] if len(found) else found
    found = found[found["t"] < found["t"].max()]  # the first step has nothing to reuse
    if found["t"].nunique() < 2:
        return None
    last = found.sort_values("iteration").groupby(["seed", "t", "reuse"])["residual"].last().unstack("reuse")
    last = last.rename(columns={False: "without", True: "with"})
    gain, half = (
        np.log(last["without"] / last["with"]).unstack("t").sort_index(axis=1),
        found["t"].nunique() // 2,
    )
    clean, noisy = gain.iloc[:, :half].mean(axis=1), gain.iloc[:, -half:].mean(axis=1)
    low, high = study.times(clean - noisy)
    ours = (
        f"reuse divides the residual by {np.exp(clean.mean()):.3g} in the less noisy half of the timesteps, by "
        f"{np.exp(noisy.mean()):.3g} in the other"
    )
    return Found(ours, f"{span(low, high)} times more", str(len(gain)), verdict(low, high))


def kinds(kind: str) -> Test:
    """Return the test that a budget of this kind is somewhere better than a constant one of the same total: at the number of
    steps and blocks where it surely gains most, compared seed by seed with an interval that holds for all of those tried."""

    def test(study: Study) -> Found | None:
        groups = [rows for rows in chains.alike(study.found) if {kind, "constant"} <= set(rows["budget"])]
        told, bounds = [], []
        for rows in groups:
            first, last = (rows[rows["budget"] == one] for one in ("constant", kind))
            bounds.append(study.paired(first, last, len(groups)))
            values = [part[study.distance].mean() for part in (first, last)]
            told.append(
                f"{rows['steps'].iloc[0]} steps, {rows['blocks'].iloc[0]:.0f} blocks: constant {values[0]:.3g}, {kind} "
                f"{values[1]:.3g} ({span(*bounds[-1])} times)"
            )
        if not groups:
            return None
        best = max(bounds)
        seeds = pd.concat(groups)["seed"].nunique()
        return Found(f"{study.score} {'; '.join(told)}", f"{span(*best)} times", str(seeds), verdict(*best))

    return test


def _models(study: Study, but: str, among: int = 1) -> pd.DataFrame:
    """Return the FPDMs that differ in one thing from the base at their headline setting, averaged, with intervals that hold for
    `among` of them at once."""
    rows = chains.trained_alike(study.found).query("position == 0")
    rows = rows.astype(dict.fromkeys(chains.SETTING, object)).fillna(dict.fromkeys(chains.SETTING, "-"))
    head = rows[rows["model"] == chains.base(study.found)].iloc[:1]
    same = rows.merge(head[[but, *chains.SETTING]].drop(columns="steps"), how="inner")  # at equal blocks
    return study.averaged(same, among)


def _trained(rows: pd.DataFrame) -> str:
    """Return what the trainings of models that are compared have in common."""
    return (
        f", each after {rows['nimg'].iloc[0]:,.0f} images"
        if rows["nimg"].nunique() == 1
        else ", at equal training FLOPs"
    )


def layers(study: Study) -> Found | None:
    """Test that one layer before and after the fixed point is better than none, at every number of blocks: the least gain counts."""
    rows = _layers(study)
    counts = rows[rows["pre"] <= 1].groupby("blocks")["pre"].nunique()
    spent = counts.index[counts == 2]
    if not len(spent):
        return None
    rows, told, bounds = _layers(study, len(spent)), [], []
    for blocks in spent:
        none, one = (rows[(rows["blocks"] == blocks) & (rows["pre"] == count)].iloc[0] for count in (0, 1))
        bounds.append(study.gain(none, one))
        told.append(f"{study.value(none)} at none, {study.value(one)} at 1 with {blocks:.0f} blocks")
    low, high = np.min(bounds, axis=0)
    told = f"{study.score} {'; '.join(told)}{_trained(rows[rows['pre'] <= 1])}"
    return Found(
        told, f"{span(low, high)} times, least of all", seeds_of(rows[rows["pre"] <= 1]), verdict(low, high)
    )


def _layers(study: Study, among: int = 1) -> pd.DataFrame:
    """Return the FPDMs that differ from the base in their explicit layers at the usual settings, averaged."""
    rows = chains.usual(study.found).query("family == 'FPDM' and method == 'ddim' and pre == post")
    rows = rows[rows["run"].isin(chains.trained_alike(study.found)["run"])]
    same = rows.loc[rows["model"] == chains.base(study.found), "but_layers"]
    return study.averaged(rows[rows["but_layers"].isin(same)], among).drop_duplicates(["pre", "blocks"])


def layers_at(few: bool) -> Test:
    """Return the test that at the fewest blocks the fewest explicit layers (but one before and after at least) are better than
    the most, or at the most blocks the most."""

    def test(study: Study) -> Found | None:
        rows = _layers(study).query("pre > 0")
        spent = rows.groupby("blocks")["pre"].nunique()
        if spent.empty or spent.max() < 2:
            return None
        blocks = spent[spent == spent.max()].index[0 if few else -1]
        found = rows[rows["blocks"] == blocks].sort_values("pre")
        ends = (found.iloc[-1], found.iloc[0]) if few else (found.iloc[0], found.iloc[-1])
        return study.compared(
            f"at {blocks:.0f} blocks: {listed(found, study.distance, 'pre')} layers{_trained(found)}", *ends
        )

    return test


def few_iterations(study: Study) -> Found | None:
    """Test that the best of few iterations in training (6 at most) is better than the best of more, drawn as S-JFB does."""
    counts = _models(study, "but_training").query("gradient == 's_jfb'")["without"]
    if not (counts <= 6).any() or not (counts > 6).any():
        return None
    rows = _models(study, "but_training", int((counts <= 6).sum() * (counts > 6).sum())).query(
        "gradient == 's_jfb'"
    )
    best = [rows.query(side).sort_values(study.distance).iloc[0] for side in ("without > 6", "without <= 6")]
    return study.compared(
        f"{listed(rows.sort_values('without'), study.distance, 'without')} = N{_trained(rows)}", *best
    )


def gradients(worse: str, better: str) -> Test:
    """Return the test that one gradient is better than another with as many iterations before it, at every number of them: the
    least gain counts."""

    def test(study: Study) -> Found | None:
        def both(among: int) -> pd.DataFrame:
            rows = _models(study, "but_training", among)
            rows = rows[rows["gradient"].isin((worse, better))].sort_values("without")
            return rows[rows.groupby("without")["gradient"].transform("nunique") == 2]

        if both(1).empty:
            return None
        rows, told, bounds = both(both(1)["without"].nunique()), [], []
        for count, pair in rows.groupby("without"):
            named = pair.set_index("gradient")
            bounds.append(study.gain(named.loc[worse], named.loc[better]))
            told.append(
                f"{worse} {study.value(named.loc[worse])}, {better} {study.value(named.loc[better])} at N = {count:.0f}"
            )
        low, high = np.min(bounds, axis=0)
        least = f"{span(low, high)} times{', least of all' * (len(bounds) > 1)}"
        return Found(
            f"{study.score} {'; '.join(told)}{_trained(rows)}", least, seeds_of(rows), verdict(low, high)
        )

    return test


COUNTED: dict[tuple[str, str], Test] = {
    **{
        ("FPDM-1", f"{name} blocks, {chains.METHODS[method]}"): at_blocks(method, name == "few")
        for name in ("few", "many")
        for method in ("ddpm", "ddim")
    },
    ("FPDM-2", "parameters"): parameters,
    ("FPDM-3", ""): lambda study: None,  # a study has one dataset
    ("FPDM-4", ""): own_size,
    ("FPDM-5", ""): middle,
    ("FPDM-6", "few iterations"): reuse(few=True),
    ("FPDM-6", "many iterations"): reuse(few=False),
    ("FPDM-6", "less noisy"): less_noisy,
    ("FPDM-7", "one or none"): layers,
    ("FPDM-7", "small budget"): layers_at(few=True),
    ("FPDM-7", "large budget"): layers_at(few=False),
    ("FPDM-8", ""): few_iterations,
    ("FPDM-9", "one step"): gradients("jfb", "multi_step"),
    ("FPDM-9", "stochastic"): gradients("multi_step", "s_jfb"),
    **{("FPDM-10", kind): kinds(kind) for kind in chains.KINDS[1:]},
}
MEASURED: dict[tuple[str, str], Test] = {("FPDM-2", "training memory"): memory}
