"""Scenes of 3-D Gaussian splats: read, write, compress, render, train.

A scene is a `Splats`; every format reads into one (`read`) and is written from one (`write`). `encode` and `decode` are
the smallest container that we know how to make, `render` draws what a `Camera` sees, and `fit` trains a scene to the
photographs of `open_dataset`, with a format's rounding in the loop where a quantiser is passed; `evaluate` compares it
with those held out.
"""

from scrimp.splats.camera import Camera, look_at
from scrimp.splats.container import decode
from scrimp.splats.dataset import Dataset, View, open_dataset
from scrimp.splats.files import read, write
from scrimp.splats.fit import Fitting, fit
from scrimp.splats.fit_settings import FitSettings, Fitted, Progress, Rates
from scrimp.splats.fit_together import Together
from scrimp.splats.orbit import orbit_cameras, orbit_of
from scrimp.splats.quality import Quality, evaluate
from scrimp.splats.quantised import ContainerQuantiser
from scrimp.splats.quantised_sog import SogQuantiser
from scrimp.splats.rate import encode_at as encode
from scrimp.splats.rate import settings_at
from scrimp.splats.render import Rendered, rasterize, render
from scrimp.splats.scene import Splats
from scrimp.splats.strategy import Classic, Mcmc
from scrimp.splats.thinning import Thinning, prune_unseen

__all__ = [
    "Camera",
    "Classic",
    "ContainerQuantiser",
    "Dataset",
    "FitSettings",
    "Fitted",
    "Fitting",
    "Mcmc",
    "Progress",
    "Quality",
    "Rates",
    "Rendered",
    "SogQuantiser",
    "Splats",
    "Thinning",
    "Together",
    "View",
    "decode",
    "encode",
    "evaluate",
    "fit",
    "look_at",
    "open_dataset",
    "orbit_cameras",
    "orbit_of",
    "prune_unseen",
    "rasterize",
    "read",
    "render",
    "settings_at",
    "write",
]
