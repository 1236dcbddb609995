"""The environment of the tests: the settings of the user must not lead them to a real cluster, bucket or proxy.

Imported for its effect, before anything that reads the environment. A test that needs such a variable sets it.
"""

from __future__ import annotations

import os
import signal

for name in list(os.environ):
    if name.upper().startswith(("AWS_", "RAY_", "SMSBATCH_")) or name.upper().endswith("_PROXY"):
        del os.environ[name]
os.environ |= {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",  # else a test without credentials would request some from the network
    "NO_PROXY": "127.0.0.1,localhost",  # some systems configure proxies elsewhere
    "no_proxy": "127.0.0.1,localhost",
    "RAY_worker_niceness": "0",  # else actors have a low priority and wait for all other tests
    "HF_HUB_OFFLINE": "1",  # a test that accesses a hub fails at once
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads would slow these small models down

# A shell lets its background processes ignore SIGINT, and the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
