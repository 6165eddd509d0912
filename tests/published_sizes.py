"""The sizes of the published models, by the papers' tables: what the counts of tests are of."""

# GET (Geng 2023), table 7, where E of GET-Small is printed as 6 but its 37.2M parameters need 8; a head has 64 channels
GET_SHARED = {"patch": 2, "expansion": 4, "equilibrium_depth": 3, "normalise": False}
GET = {
    "GET-T/2": {"width": 256, "depth": 6, "heads": 4, "equilibrium_expansion": 6, **GET_SHARED},
    "GET-M/2": {"width": 384, "depth": 6, "heads": 6, "equilibrium_expansion": 6, **GET_SHARED},
    "GET-S/2": {"width": 512, "depth": 6, "heads": 8, "equilibrium_expansion": 8, **GET_SHARED},
    "GET-B/2": {"width": 768, "depth": 1, "heads": 12, "equilibrium_expansion": 12, **GET_SHARED},
    "GET-B/2+": {"width": 768, "depth": 6, "heads": 12, "equilibrium_expansion": 8, **GET_SHARED},
}

# GET (Geng 2023), table 8, with the other sizes of figure 2; a head has 64 channels (72 in XL), as in DiT
BACKBONES = {
    "S": {"width": 384, "depth": 12, "heads": 6, "expansion": 4},
    "B": {"width": 768, "depth": 12, "heads": 12, "expansion": 4},
    "L": {"width": 1024, "depth": 24, "heads": 16, "expansion": 4},
    "XL": {"width": 1152, "depth": 28, "heads": 16, "expansion": 4},
}
VIT = {
    f"ViT-{name}/{patch}": {**backbone, "patch": patch, "conditioning": "additive"}
    for name, backbone in BACKBONES.items()
    for patch in (2, 4, 8)
}

# DiT (Peebles and Xie 2023), table 1: width, depth and heads are those of ViT
DIT = {
    f"DiT-{name}/{patch}": {**backbone, "patch": patch, "learned_variance": True}
    for name, backbone in BACKBONES.items()
    for patch in (2, 4, 8)
}

# FPDM (Bai and Melas-Kyriazi 2024), section 4.1: layers of DiT-XL/2; figure 7 takes 0, 1, 2 and 4 for pre and post
FPDM_SHARED = {
    "patch": 2,
    "expansion": 4,
    "pre": 1,
    "post": 1,
    "learned_variance": True,
    "pre_post_timestep": False,
}
FPDM = {
    "FPDM-S/2": {"width": 384, "heads": 6, **FPDM_SHARED},
    "FPDM-B/2": {"width": 768, "heads": 12, **FPDM_SHARED},
    "FPDM-L/2": {"width": 1024, "heads": 16, **FPDM_SHARED},
    "FPDM-XL/2": {"width": 1152, "heads": 16, **FPDM_SHARED},
}
