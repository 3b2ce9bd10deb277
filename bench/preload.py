"""Imported once by the fork server of benchmarks on a CPU, so that its children need not; touches no GPU.

A process has one fork server: tests of benchmarks share theirs with the tests behind them, whose ranks would else each
import what the first engine and the first optimizer bring, 1,400 modules (tests/distributed/preload.py).
"""

import gc
import logging
import warnings

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import transformers  # noqa: E402, F401

import engine.train.trainer  # noqa: E402, F401

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
gc.freeze()  # a collection in a child looks at what the child made
