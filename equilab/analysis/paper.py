"""What the papers publish, as data; of GET: CIFAR-10, FID of 50,000 samples; what stands only in a plot is left out.

Source: Geng, Pokle, Kolter 2023, tables 1 to 8 and text; the column `where` says which.
"""

from __future__ import annotations

import pandas as pd

# FPDM (Bai and Melas-Kyriazi 2024), table 1: FID of 50,000 samples, ImageNet 256, by transformer blocks for an image
FPDM_BLOCKS = pd.DataFrame(
    [
        ("DiT", 140, 148.0, 110.0),
        ("DiT", 280, 80.9, 35.2),
        ("DiT", 560, 37.9, 16.5),
        ("FPDM", 140, 85.8, 33.9),
        ("FPDM", 280, 43.3, 22.4),
        ("FPDM", 560, 26.1, 19.6),
    ],
    columns=["model", "blocks", "DDPM", "DDIM"],
)
FPDM_COSTS = pd.DataFrame(  # table 1: XL/2, training memory as printed
    [("DiT", 674, 25.2), ("FPDM", 85, 10.2)], columns=["model", "parameters (M)", "training memory (GB)"]
)
FPDM_DATASETS = pd.DataFrame(  # table 2: FID at 280 blocks
    [("CelebA-HQ", 65.2, 11.1), ("FFHQ", 58.1, 18.2), ("LSUN-Church", 65.6, 22.7), ("ImageNet", 80.9, 43.3)],
    columns=["dataset", "DiT", "FPDM"],
)
FPDM_TRAININGS = pd.DataFrame(  # tables 3 to 5: at 280 blocks; parameters in millions as printed
    [
        ("table 3", "DiT-XL/2, 3 layers", 86, 350.6),
        ("table 3", "DiT-B/2, 11 layers", 130, 55.9),
        ("table 3", "FPDM-XL/2", 86, 31.5),
        *(
            ("table 4", f"S-JFB, M = N = {n}", 86, fid)
            for n, fid in ((3, 43.0), (6, 43.2), (12, 61.5), (24, 567.6))
        ),
        *(
            ("table 5", f"{name}, N = {n}", 86, fid)
            for n, fids in ((6, (567.6, 48.2, 43.2)), (12, (567.6, 79.9, 61.5)))
            for name, fid in zip(("JFB", "multi-step JFB", "S-JFB"), fids)
        ),
    ],
    columns=["where", "model", "parameters (M)", "FID"],
)

# GDD (Zheng and Yang 2024), table 3a: CIFAR-10, unconditional (and the FID with classes); images seen as the papers of the methods give them (GET's
# of its table 2, PD's and CD's as GET's figure 2 counts teacher and student together), where they do
GDD_METHODS = pd.DataFrame(
    [
        ("EDM", 35, 1.98, None, None, 1.79),
        ("PD", 1, 9.12, None, 179e6, None),
        ("CD", 1, 3.55, None, 409.6e6, None),
        ("GET", 1, 6.91, 9.16, 204.8e6, None),
        ("CTM", 1, 1.98, None, None, 1.73),
        ("SiD", 1, 1.92, 9.98, None, 1.71),
        ("GDD", 1, 1.66, 10.11, 5e6, 1.58),
        ("GDD-I", 1, 1.54, 10.10, 5e6, 1.44),
    ],
    columns=["method", "nfe", "fid", "inception score", "nimg", "fid with classes"],
)
GDD_DATASETS = pd.DataFrame(  # tables 3b, 3c and 4
    [
        *(
            ("AFHQv2 64x64", *row, None, None)
            for row in (("EDM", 79, 1.96), ("SiD", 1, 1.62), ("GDD", 1, 1.23), ("GDD-I", 1, 1.31))
        ),
        *(
            ("FFHQ 64x64", *row, None, None)
            for row in (("EDM", 79, 2.39), ("SiD", 1, 1.55), ("GDD", 1, 1.08), ("GDD-I", 1, 0.85))
        ),
        *(
            ("ImageNet 64x64, with classes", *row)
            for row in (
                ("EDM", 79, 2.64, None, None),
                ("PD", 1, 15.39, None, None),
                ("CD", 1, 6.20, 0.68, 0.63),
                ("SiD", 1, 1.52, 0.74, 0.63),
                ("GDD", 1, 1.42, 0.77, 0.59),
                ("GDD-I", 1, 1.16, 0.75, 0.60),
            )
        ),
    ],
    columns=["dataset", "method", "nfe", "fid", "precision", "recall"],
)
GDD_JUDGES = pd.DataFrame(  # table 1a
    [
        ("StyleGAN2 from scratch", "collapse"),
        ("StyleGAN2 pre-trained", "collapse"),
        ("VGG16", "4.04"),
        ("LPIPS", "3.49"),
        ("projected", "2.21"),
    ],
    columns=["discriminator", "FID"],
)
GDD_PENALTIES = (
    pd.DataFrame(  # table 1b; gamma as printed, against a loss summed over the 32 images of a device
        [
            ("diffaugment", None, 2.21),
            ("none", None, 1.98),
            ("none", 1e-3, 1.77),
            ("none", 1e-4, 1.66),
            ("none", 1e-5, 1.66),
        ],
        columns=["augmentation", "gamma of R1, of a sum of losses", "FID"],
    )
)
GDD_FROZEN = pd.DataFrame(  # table 2; the shares printed for each group, added up
    [
        ("nothing", 0.0, 1.66),
        ("convolutions", 85.8, 1.54),
        ("convolutions and QKV", 87.9, 1.60),
        ("convolutions, QKV and skips", 91.9, 2.51),
    ],
    columns=["frozen", "share of the parameters (%)", "FID"],
)

BATCH, ITERATIONS = 128, 800_000  # of training, where nothing else is said (section 4.1)

# Parameters in millions, as printed (table 2; table 7 says 8.9 for GET-Tiny). Multiply-accumulates of an image in
# 1e9 are counted by us from the published sizes (6 iterations); table 4 prints two of them as FLOPs, and they agree.
SIZES = {
    "GET-Tiny": (8.6, 7.0),
    "GET-Mini": (19.2, 15.1),
    "GET-Small": (37.2, 31.2),
    "GET-Base": (62.2, 81.2),
    "GET-Base+": (83.5, 69.0),
    "ViT-Base": (85.2, 23.0),
    "ViT-Base AdaLN-Zero": (128.9, None),
}
_COLUMNS = ("size", "iterations", "batch", "pairs", "conditioning", "fid", "inception_score", "where")
_RUNS = [
    ("GET-Tiny", ITERATIONS, BATCH, 1, "none", 15.19, 8.37, "table 2"),
    ("GET-Mini", ITERATIONS, BATCH, 1, "none", 10.72, 8.69, "tables 2, 4"),
    ("GET-Small", ITERATIONS, BATCH, 1, "none", 8.00, 9.03, "table 2"),
    ("GET-Base", ITERATIONS, BATCH, 1, "none", 7.42, 9.16, "table 2"),
    ("GET-Base+", ITERATIONS, BATCH, 1, "none", 7.19, 9.09, "table 2"),
    ("GET-Tiny", 4 * ITERATIONS, BATCH, 1, "none", 11.47, 8.64, "table 2"),
    ("GET-Base", ITERATIONS, 2 * BATCH, 1, "none", 6.91, 9.16, "table 2"),
    ("GET-Base", ITERATIONS, 2 * BATCH, 1, "additive", 6.25, 9.40, "table 3"),
    ("GET-Base", ITERATIONS, 2 * BATCH, 2, "additive", 5.66, 9.63, "text, section 4.2"),
    ("ViT-Base", ITERATIONS, BATCH, 1, "none", 11.49, 8.61, "table 4"),
    ("ViT-Base", 200_000, BATCH, 1, "none", 15.20, 8.27, "table 6"),
    ("ViT-Base", 200_000, BATCH, 1, "additive", 12.43, 8.69, "table 6"),
    ("ViT-Base AdaLN-Zero", 200_000, BATCH, 1, "adaln", 17.19, 8.38, "table 6"),
]
COSTS = pd.DataFrame(  # table 4: four A6000, batch 128
    [
        ("ViT-Base", 11.49, 85.2, 23.0, 10.1, 4.83),
        ("GET-Mini", 10.72, 19.2, 15.2, 9.2, 5.79),
        ("GET-Mini, O(1) memory", None, None, None, 5.0, 4.53),
    ],
    columns=[
        "model",
        "FID",
        "parameters (M)",
        "FLOPs as printed (G)",
        "training memory (GB)",
        "training speed (it/s)",
    ],
)
PROGRESSIVE_FID = 9.12  # PD, tables 1 and 5, the line of figure 2a


def runs() -> pd.DataFrame:
    """Return every published run: size, parameters, images seen, FLOPs as we count them (twice the
    multiply-accumulates; in training three forward passes for each image), pairs in millions, FID, where it stands."""
    table = pd.DataFrame(_RUNS, columns=_COLUMNS)
    table["parameters"] = [SIZES[size][0] * 1e6 for size in table["size"]]
    table["flops"] = [2e9 * SIZES[size][1] if SIZES[size][1] else None for size in table["size"]]
    table["nimg"] = table["iterations"] * table["batch"]
    table["train_flops"] = 3 * table["flops"] * table["nimg"]
    table["family"] = table["size"].str.split("-").str[0]
    return table


def sizes_table() -> pd.DataFrame:
    """Return the paper's table 2, with the ViT of table 4 and the conditional runs."""
    found = runs().sort_values(["family", "parameters", "nimg"])
    found["flops"] /= 1e9
    kept = {
        "size": "model",
        "parameters": "parameters",
        "flops": "GFLOP of an image, counted by us",
        "iterations": "iterations",
        "batch": "batch",
        "pairs": "pairs (M)",
        "conditioning": "classes",
        "fid": "FID",
        "inception_score": "inception score",
        "where": "where",
    }
    return found[list(kept)].rename(columns=kept)
