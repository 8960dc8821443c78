"""eqgen: generative decision-making in Equinox and JAX.

The import path is the file path (`from eqgen.samplers import ddim`); nothing is re-exported here, so
`import eqgen` costs nothing. See the README for the layout and the time convention
(t = 0 is data or action, t = 1 is noise).
"""

__version__ = "0.1.0"
