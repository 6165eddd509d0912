"""The sizes of the published FPDMs, which the paper counts."""

# FPDM (Bai and Melas-Kyriazi 2024), section 4.1: layers of DiT-XL/2; figure 7 takes 0, 1, 2 and 4 for pre and post
SHARED = {
    "patch": 2,
    "expansion": 4,
    "pre": 1,
    "post": 1,
    "learned_variance": True,
    "pre_post_timestep": False,
}
FPDM = {
    "FPDM-S/2": {"width": 384, "heads": 6, **SHARED},
    "FPDM-B/2": {"width": 768, "heads": 12, **SHARED},
    "FPDM-L/2": {"width": 1024, "heads": 16, **SHARED},
    "FPDM-XL/2": {"width": 1152, "heads": 16, **SHARED},
}
