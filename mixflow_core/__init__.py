"""MixFlow training (arXiv 2512.19311): what the paper defines and measures, for any model, in one time convention.

Time runs from t = 0 (noise x0) to t = 1 (data x1); velocities point towards the data. The paper is read in this order:
`interpolant` (the path), `mixture` (Algorithm 1: the slowed interpolation mixture), `loss`, `samplers`, `slow_flow`,
`correctives` (what it is compared with).
"""
