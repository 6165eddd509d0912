"""Diffusion: schedules, losses and samplers, over noise levels and over discrete timesteps."""
