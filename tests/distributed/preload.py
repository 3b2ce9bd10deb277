"""Imported once by the fork server, so that its children need not.

The first engine and the first optimizer of a process import 1,400 modules more, which is most of the CPU time of a rank
that trains a tiny model for six steps: what brings them is named here, too.
"""

import gc
import logging
import warnings

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402

import engine.train.build  # noqa: E402, F401

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
gc.freeze()  # a collection in a child looks at what the child made
