"""Imported once by the fork server, so that its children need not."""

import logging
import warnings

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402

import engine.train.build  # noqa: E402, F401

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
