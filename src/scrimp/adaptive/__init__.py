"""Vision transformers whose cost depends on the image: tokens that do not matter are really dropped.

`token_sampling_` keeps as many as an image needs, without training; `token_halting_` and `gating_` learn where to stop
and what to leave out; `token_merging_` and `keep_tokens_` follow a fixed schedule and are the baselines that need no
training. Each is attached to a model whose code, modules and state_dict stay as they are, and gives a controller that
tells the cost of every image; `restore_` takes it off, `image_costs` asks once.
"""

from scrimp.adaptive.attach import attach_, controller_of, cost_bounds, image_costs, restore_
from scrimp.adaptive.control import Controller
from scrimp.adaptive.gating import gating_, usage_loss
from scrimp.adaptive.keep_tokens import keep_tokens_
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.token_halting import depth_prior_loss, ponder_loss, token_halting_
from scrimp.adaptive.token_merging import token_merging_
from scrimp.adaptive.token_sampling import token_sampling_

__all__ = [
    "Controller",
    "Method",
    "Run",
    "attach_",
    "controller_of",
    "cost_bounds",
    "depth_prior_loss",
    "gating_",
    "image_costs",
    "keep_tokens_",
    "ponder_loss",
    "restore_",
    "token_halting_",
    "token_merging_",
    "token_sampling_",
    "usage_loss",
]
