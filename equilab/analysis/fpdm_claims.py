"""The claims of the FPDM paper, its limitation included, as tests on a study's results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

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
        both = [rows[rows["model"] == chains.base(study.found, family)].set_index("spent") for family in ("DiT", "FPDM")]
        common = sorted(set(both[0].index) & set(both[1].index))
        if len(common) < 2:
            return None
        dit, fpdm = (rows.loc[common[0 if few else -1]] for rows in both)
        told = "; ".join(f"{blocks:.0f} blocks: DiT {study.value(both[0].loc[blocks])}, FPDM {study.value(both[1].loc[blocks])}"
                         for blocks in common)  # fmt: skip
        return study.compared(told, *((dit, fpdm) if few else (fpdm, dit)))

    return test


def parameters(study: Study) -> Found | None:
    """Test that FPDM has fewer parameters than the DiT it is compared with."""
    counts = study.found.rows.drop_duplicates("model").set_index("model")["parameters"]
    models = [chains.base(study.found, family) for family in ("DiT", "FPDM")]
    if not all(models):
        return None
    dit, fpdm = counts[models]
    return Found(f"FPDM {fpdm:,} parameters, DiT {dit:,}: {fpdm / dit:.0%}", "counted", "1", HOLDS if fpdm < dit else FAILS)


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
    FLOPs (within 1.28): the dearest of the chains that match."""
    rows = study.averaged(chains.usual(study.found)).query("method == 'ddim'")
    fpdm, dit = (rows[rows["family"] == family] for family in ("FPDM", "DiT"))
    if fpdm.empty or dit.empty:
        return None
    both = fpdm[fpdm["model"] == chains.base(study.found)].merge(dit, how="cross", suffixes=("", "_dit"))
    apart = {name: np.abs(np.log(both[f"{name}_dit"] / both[name])) for name in ("parameters", "flops")}
    both = both[(apart["parameters"] <= np.log(1.6)) & (apart["flops"] <= np.log(1.28))].sort_values(["flops", "flops_dit"])
    if both.empty:
        return None
    head = both.iloc[-1]
    other = head.filter(regex="_dit$").rename(lambda name: name.removesuffix("_dit"))
    told = f"{study.value(other)} of {other['label']} ({other['parameters']:,} parameters), {study.value(head)} of {head['label']}"
    return study.compared(f"{told} ({head['parameters']:,}), at {head['flops']:.3g} and {other['flops']:.3g} FLOPs", other, head)


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
        told, bounds = [], []
        for steps in (paired["steps"].max(), paired["steps"].min()):
            without, with_ = (paired[(paired["steps"] == steps) & (paired["reuse"] == one)].iloc[0] for one in (False, True))
            bounds.append(study.gain(without, with_))
            told.append(f"{with_['each']:.3g} iterations a step: {study.value(without)} without, {study.value(with_)} with")
        ours = f"{study.score} at {blocks:.0f} blocks; {'; '.join(told)}"
        if few:
            return Found(ours, f"{span(*bounds[0])} times", seeds_of(paired), verdict(*bounds[0]))
        low, high = bounds[0][0] / bounds[1][1], bounds[0][1] / bounds[1][0]
        return Found(ours, f"{span(low, high)} times more with few", seeds_of(paired), verdict(low, high))

    return test


def less_noisy(study: Study) -> Found | None:
    """Test that reuse lowers the residual more in the less noisy half of the timesteps than in the other."""
    found = chains.residuals(study.found)
    found = found[found["steps"] == found["steps"].max()]
    found = found[found["t"] < found["t"].max()]  # the first step has nothing to reuse
    if found["t"].nunique() < 2:
        return None
    last = found.sort_values("iteration").groupby(["seed", "t", "reuse"])["residual"].last().unstack("reuse")
    last = last.rename(columns={False: "without", True: "with"})
    gain, half = np.log(last["without"] / last["with"]).unstack("t").sort_index(axis=1), found["t"].nunique() // 2
    clean, noisy = gain.iloc[:, :half].mean(axis=1), gain.iloc[:, -half:].mean(axis=1)
    more, count = clean - noisy, len(gain)
    rule = study.config.rule
    reach = np.log1p(rule.margin_distance)
    if count > 1:
        reach = stats.t.ppf((1 + rule.confidence) / 2, count - 1) * more.std(ddof=1) / np.sqrt(count)
    low, high = np.exp(more.mean() - reach), np.exp(more.mean() + reach)
    ours = (f"reuse divides the residual by {np.exp(clean.mean()):.3g} in the less noisy half of the timesteps, by "
            f"{np.exp(noisy.mean()):.3g} in the other")  # fmt: skip
    return Found(ours, f"{span(low, high)} times more", str(count), verdict(low, high))


def kinds(kind: str) -> Test:
    """Return the test that a budget of this kind is somewhere better than a constant one of the same total: at the number of
    steps and blocks where it gains most, with an interval that holds for all of those tried."""

    def test(study: Study) -> Found | None:
        groups = [rows for rows in chains.alike(study.found) if {kind, "constant"} <= set(rows["budget"])]
        pairs = []
        for rows in groups:
            named = study.averaged(rows, len(groups)).drop_duplicates("budget").set_index("budget")
            pairs.append((named.loc["constant"], named.loc[kind]))
        if not pairs:
            return None
        first, last = max(pairs, key=lambda pair: study.gain(*pair))
        told = "; ".join(f"{a['steps']} steps, {a['blocks']:.0f} blocks: constant {study.value(a)}, {kind} {study.value(b)}" for a, b in pairs)
        return study.compared(told, first, last)

    return test


def _models(study: Study, but: str) -> pd.DataFrame:
    """Return the FPDMs that differ in one thing from the base at their headline setting, averaged."""
    rows = study.found.rows[(study.found.rows["family"] == "FPDM") & (study.found.rows["position"] == 0)]
    rows = rows.astype({name: object for name in chains.SETTING}).fillna({name: "-" for name in chains.SETTING})
    head = rows[rows["model"] == chains.base(study.found)].iloc[:1]
    same = rows.merge(head[[but, *chains.SETTING]].drop(columns="steps"), how="inner")  # at equal blocks
    return study.averaged(same)


def layers(study: Study) -> Found | None:
    """Test that one layer before and after the fixed point is better than none."""
    rows = _models(study, "but_layers")
    rows = rows[rows["pre"] == rows["post"]].set_index("pre").sort_index()
    if not {0, 1} <= set(rows.index):
        return None
    return study.compared(listed(rows.reset_index(), study.distance, "pre") + " layers", rows.loc[0], rows.loc[1])


def layers_at(few: bool) -> Test:
    """Return the test that at the fewest blocks the fewest explicit layers (but one before and after at least) are better than
    the most, or at the most blocks the most."""

    def test(study: Study) -> Found | None:
        rows = chains.usual(study.found).query("family == 'FPDM' and method == 'ddim' and pre == post and pre > 0")
        same = rows.loc[rows["model"] == chains.base(study.found), "but_layers"]
        rows = study.averaged(rows[rows["but_layers"].isin(same)]).drop_duplicates(["pre", "blocks"])
        spent = rows.groupby("blocks")["pre"].nunique()
        if spent.empty or spent.max() < 2:
            return None
        blocks = spent[spent == spent.max()].index[0 if few else -1]
        found = rows[rows["blocks"] == blocks].sort_values("pre")
        ends = (found.iloc[-1], found.iloc[0]) if few else (found.iloc[0], found.iloc[-1])
        return study.compared(f"at {blocks:.0f} blocks: {listed(found, study.distance, 'pre')} layers", *ends)

    return test


def few_iterations(study: Study) -> Found | None:
    """Test that the best of few iterations in training (6 at most) is better than the most, drawn as S-JFB does."""
    rows = _models(study, "but_training").query("gradient == 's_jfb'").sort_values("without")
    if rows["without"].nunique() < 2:
        return None
    few = rows.iloc[:-1].query("without <= 6").sort_values(study.distance)
    if few.empty:
        return None
    return study.compared(f"{listed(rows, study.distance, 'without')} = N", rows.iloc[-1], few.iloc[0])


def gradients(worse: str, better: str) -> Test:
    """Return the test that one gradient is better than another with as many iterations before it."""

    def test(study: Study) -> Found | None:
        rows = _models(study, "but_training")
        rows = rows[rows["gradient"].isin((worse, better))].sort_values("without")
        rows = rows[rows.groupby("without")["gradient"].transform("nunique") == 2].iloc[:2]
        named = rows.set_index("gradient")
        if named.empty:
            return None
        told = f"{worse} {study.value(named.loc[worse])}, {better} {study.value(named.loc[better])}, N = {rows['without'].iloc[0]:.0f}"
        return study.compared(told, named.loc[worse], named.loc[better])

    return test


COUNTED: dict[tuple[str, str], Test] = {
    **{("FPDM-1", f"{name} blocks, {chains.METHODS[method]}"): at_blocks(method, name == "few")
       for name in ("few", "many") for method in ("ddpm", "ddim")},
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
}  # fmt: skip
MEASURED: dict[tuple[str, str], Test] = {("FPDM-2", "training memory"): memory}
