"""Imported once by the fork server of benchmarks on a CPU, so that its children need not; touches no GPU."""

import logging
import warnings

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402, F401
import transformers  # noqa: E402, F401

import engine.train.build  # noqa: E402, F401

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
